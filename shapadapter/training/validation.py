"""The data of a training, looked at before its first step: labels as the model counts classes, crops, mean colour."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from shapadapter.adapter import ShapleyLayer
from shapadapter.core.errors import ImageError, ShapleyError
from shapadapter.core.phrases import some
from shapadapter.data.augmentation import seeded
from shapadapter.data.classes import are_numbers, as_model_counts, columns_of, is_transformed, labels_of, named_classes
from shapadapter.data.collator import ImageCollator
from shapadapter.data.images import DECODING_ERRORS, IMAGE_COLUMNS, image_side, open_image, prepare_opened, undecoded
from shapadapter.data.labels import IGNORED, LABEL_COLUMNS, PROBLEMS, LabelRules, as_shares, known_labels
from shapadapter.data.processors import frames, unseen
from shapadapter.data.rows import GuardedRows, readable_rows, some_rows
from shapadapter.explanation.passes import base_of
from shapadapter.training.arguments import TASK_OPTIONS, ShapleyTrainingArguments

_LABEL_REMEDY = (
    "Load the base with AutoModelForImageClassification.from_pretrained(..., id2label=dict(enumerate(names)), "
    "label2id={name: index for index, name in enumerate(names)}, ignore_mismatched_sizes=True), where names are "
    'dataset.features["label"].names.'
)
_NUMBER_REMEDY = "Load the base with AutoModelForImageClassification.from_pretrained(..., num_labels={}, ignore_mismatched_sizes=True)."


class LabelledData:
    """What the labels of a model's data may be, by its classes.

    A model whose classes have no names gets those of the training data. Columns in `label_names` come first.
    """

    def __init__(self, model: Any, layer: ShapleyLayer, args: ShapleyTrainingArguments, dataset: Any) -> None:
        config: Any = getattr(base_of(model), "config", None)
        columns = tuple(dict.fromkeys([*(args.label_names or ()), *LABEL_COLUMNS]))
        self.rules = LabelRules(layer.classes, getattr(config, "problem_type", None), columns)
        self.names: Mapping[int, str] | None = getattr(config, "id2label", None)
        unnamed = [f"LABEL_{index}" for index in range(layer.classes)]
        column, own = named_classes(dataset, columns)
        if not own or [str(name) for name in (self.names or {}).values()] != unnamed:
            return
        if len(own) != layer.classes:
            remedy = _NUMBER_REMEDY.format(len(own)) if are_numbers(own) else _LABEL_REMEDY
            raise ShapleyError(
                f"The data's column {column!r} has {len(own)} classes, the model {layer.classes} without names. {remedy}"
            )
        if not are_numbers(own):
            self.names = dict(enumerate(own))
            self.give_names(model, layer)

    def give_names(self, model: Any, layer: ShapleyLayer) -> None:
        """Write the names into the base's configuration, and into the adapter's, which keeps them for the checkpoint."""
        config: Any = getattr(base_of(model), "config", None)
        if self.names is not None and config is not None:
            config.id2label = dict(self.names)
            config.label2id = {name: index for index, name in self.names.items()}
            model.peft_config[layer.active].id2label = dict(self.names)

    def needed(self, layer: ShapleyLayer) -> bool:
        """Whether the active adapter learns its prediction from labels alone."""
        return layer.active is not None and layer.rules[layer.active].prediction == "vote"

    def check(self, dataset: Any, collator: Any) -> None:
        """Refuse a data set, or one of several, in whose labels there is anything else, as far as they can be read.

        What the first ones are is kept.
        """
        if type(collator) is not ImageCollator:  # which may make labels of anything
            return
        if are_several(dataset):
            for part in dataset.values():
                self.check(part, collator)
            return
        found = None if is_transformed(dataset) else labels_of(dataset, self.rules.columns)
        if found is not None and len(found[1]):
            kind, known = self.rules.check(found[1], found[0])
            if self.rules.problem is None and known:
                self.rules = LabelRules(self.rules.classes, PROBLEMS[kind], self.rules.columns)
                collator.labels = collator.labels and self.rules

    def check_known(self, dataset: Any) -> None:
        """Refuse to train a prediction by vote on data without labels: it would learn no classes."""
        columns = columns_of(dataset)
        if columns is not None and self.rules.column(columns) is None:
            raise self.missing(columns)
        found = None if is_transformed(dataset) else labels_of(dataset, self.rules.columns)
        if found is not None and len(found[1]) and self.rules.check(found[1], found[0])[1] == 0:
            raise ShapleyError(
                f"prediction='vote' learns the classes from labels, and none of the {len(found[1])} labels in the column "
                f"{found[0]!r} is known. Without labels only ShapleyConfig(prediction='classifier') can be trained."
            )

    def missing(self, columns: Sequence[str]) -> ShapleyError:
        """The error about columns of which none holds labels."""
        others = [name for name in columns if name not in IMAGE_COLUMNS and not name.startswith("__")]
        words = ("label", "class", "target", "categ")
        likely = [name for name in others if any(word in name.lower() for word in words)]
        remedy = ""
        if guess := next(iter([*likely, *others]), None):
            remedy = (
                f"Use dataset.rename_column({guess!r}, 'label') or ShapleyTrainingArguments(label_names=[{guess!r}]). "
            )
        return ShapleyError(
            f"prediction='vote' learns the classes from labels: expected a column "
            f"{' or '.join(map(repr, self.rules.columns))}, got {sorted(map(str, columns))}. {remedy}Without labels only "
            "ShapleyConfig(prediction='classifier') can be trained."
        )

    def with_unknown_marked(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """A batch of another's collator, whose labels (B,) or (B, K) are classes, or marked as the loss knows it."""
        labels = inputs["labels"]
        self.rules.check_batch(labels.cpu())
        quantities = self.rules.kind(several=False) == "quantity"
        labels = labels.float() if quantities else labels
        missing = torch.nan if labels.is_floating_point() else IGNORED
        return {**inputs, "labels": labels.where(known_labels(labels, quantities), missing)}


def are_several(dataset: Any) -> bool:
    """Whether these are data sets by name, and not one."""
    return isinstance(dataset, Mapping) and not hasattr(dataset, "features")


def as_model_reads(dataset: Any, labelled: LabelledData | None, several: bool = False) -> Any:
    """The data set, or several by name, with labels as the model counts classes of the same name; streams undecoded."""
    if are_several(dataset):
        if several:
            return {name: as_model_reads(part, labelled) for name, part in dataset.items()}
        raise ShapleyError(
            f"Expected a data set, got the splits {list(dataset)}: choose one, e.g. "
            f"dataset[{next(iter(dataset), 'train')!r}]."
        )
    dataset = undecoded(dataset)
    if labelled is None:
        return dataset
    for column in ("label", "labels"):
        count = getattr((getattr(dataset, "features", None) or {}).get(column), "num_classes", None) or 0
        if count > labelled.rules.classes:
            raise ShapleyError(
                f"The data set's column {column!r} has {count} classes, the model {labelled.rules.classes}. "
                f"{_NUMBER_REMEDY.format(count)}"
            )
    return as_model_counts(dataset, labelled.names, _LABEL_REMEDY, labelled.rules.columns)


def look_at(trainer: Any) -> None:
    """Refuse what cannot be trained on, and measure the color of absent pixels where that is the data's mean."""
    args, data, collator, labelled = trainer.args, trainer.train_dataset, trainer.data_collator, trainer.labelled
    if labelled is not None:
        labelled.check(data, collator)
        if args.eval_strategy != "no":
            labelled.check(trainer.eval_dataset, collator)
        if labelled.needed(trainer.layer) and type(collator) is ImageCollator:
            labelled.check_known(data)
    rows = trainer.guarded(data)
    if isinstance(rows, GuardedRows) and args.corrupt_images == "fail":
        rows.look(args.process_index, args.world_size)
    name = trainer.layer.active or ""
    config = trainer.accelerator.unwrap_model(trainer.model).peft_config.get(name)
    means = config is not None and config.removal == "pixels" and config.fill != "learned"
    if means and config.fill_color is None:
        config.fill_color = mean_color(rows, collator)
        trainer.layer.read_rules(name, config)
    if trainer.is_world_process_zero():
        warn_of_crops(data, collator)


# Images that are looked at: for the crops, and for the colour, whose mean is then within a few hundredths of a standard
# deviation of that of all.
_CROPPED, _COLORED, _BATCH = 16, 256, 32


def warn_of_crops(dataset: Any, collator: Any) -> None:
    """Warn where the image processor cuts off 1 % or more, on average over a few images spread over the data set."""
    processor = image_side(getattr(collator, "processor", None))
    listed = (
        hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__") and not isinstance(dataset, IterableDataset)
    )
    if processor is None or not isinstance(collator, ImageCollator) or not listed:
        return
    shares: list[float] = []
    shape = (0, 0)
    count = min(len(dataset), _CROPPED)
    for place in range(count):
        with seeded(0), suppress(ImageError, *DECODING_ERRORS):  # of which the training tells
            row = dataset[place * (len(dataset) - 1) // max(1, count - 1)]
            if isinstance(row, Mapping) and "pixel_values" in row:
                return
            image = open_image(row)
            pixels = prepare_opened([image], processor)["pixel_values"]
            if pixels.ndim != 4:  # patches of a whole image
                return
            shape = (pixels.shape[2], pixels.shape[3])
            shares += unseen(frames([image], processor, shape)).tolist()
    share = torch.tensor(shares, device="cpu").nanmean().item()
    if share >= 0.01:
        size = {"height": shape[0], "width": shape[1]}
        remedy = f" To keep it, load the processor with do_center_crop=False, size={size}."
        warnings.warn(
            f"On average {100 * share:.0f} % of an image's area is cut off by the center crop of "
            f"{type(processor).__name__}, and neither training nor explanations see it."
            + (remedy if getattr(processor, "do_center_crop", False) else ""),
            stacklevel=4,
        )


def mean_color(dataset: Any, collate: Callable[[list[Any]], dict[str, Any]]) -> list[float]:
    """The mean of each channel over up to 256 images, evenly spread over a data set that has a length.

    The same in every process and in every run: no random numbers are drawn that the training would miss.
    """
    sums: list[Tensor] = []
    with seeded(0):
        rows = some_rows(dataset, _COLORED)
        while batch := list(itertools.islice(rows, _BATCH)):
            inputs, read, _ = readable_rows(collate(batch))
            pixels = inputs["pixel_values"][:read].float()  # (R, C, H, W)
            sums.append(pixels.mean(dim=(2, 3)))  # (B, C)
    return [round(mean, 6) for mean in torch.cat(sums).mean(dim=0).tolist()]


@dataclass
class SoftTask:
    """Cross-entropy with weighted classes and soft labels.

    It is the sum over images of `-sum_k w_k q_k log p_k`, divided by the number of those whose label is known (a mixed
    image counts for the share whose label is) and not by the sum of their weights: so micro-batches add up to the whole
    batch. With weights of 1 and one class for an image it is the usual cross-entropy.

    Attributes:
        weights: (K,) of the classes, None for 1.
        smoothing: share of each label that is spread evenly over all classes.
    """

    weights: Tensor | None = None
    smoothing: float = 0.0

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of logits (B, K) on class indices (B,) or shares of classes (B, K)."""
        targets = as_shares(labels, logits.shape[-1])  # (B, K)
        mass = targets.sum(dim=1, keepdim=True)  # (B, 1), 0 for an image without a label
        targets = (1 - self.smoothing) * targets + self.smoothing * mass / logits.shape[-1]
        if self.weights is not None:
            self.weights = self.weights.to(logits.device)
            targets = targets * self.weights
        losses = -(targets * logits.float().log_softmax(dim=-1)).sum(dim=1)  # (B,)
        known = mass.sum()
        return losses.sum() / known.where(known > 0, 1)


def soft_task(
    args: ShapleyTrainingArguments, layer: ShapleyLayer, labelled: LabelledData | None, dataset: Any, own_loss: Any
) -> SoftTask | None:
    """The task loss where one of `TASK_OPTIONS` is on, None for the base model's; `own_loss` is the user's, or None."""
    asked = [name for name in TASK_OPTIONS if getattr(args, name)]
    if not asked:
        return None
    what, problem = " and ".join(asked), labelled and labelled.rules.problem
    other = {
        "a model that matches images with texts": labelled is None,
        "several labels": problem == PROBLEMS["classes"],
        "regression": problem == PROBLEMS["quantity"] or layer.classes == 1,
    }
    if found := next((name for name, so in other.items() if so), None):
        raise ShapleyError(f"{what}: only for one class for each image, not for {found}. Leave it out.")
    if layer.anatomy.family.patches and max(args.mixup_alpha, args.cutmix_alpha) > 0:
        raise ShapleyError(
            "mixup_alpha and cutmix_alpha: this model takes images of many shapes as patches, which are not mixed. Set them "
            "to 0."
        )
    if own_loss is not None:
        raise ShapleyError(f"{what} and compute_loss_func both say what the task loss is. Leave one of them out.")
    names = None if labelled is None else labelled.names
    weights = None if args.class_weights is None else class_weights(args.class_weights, dataset, layer.classes, names)
    return SoftTask(weights, args.label_smoothing_factor)


def class_weights(
    wanted: Sequence[float] | str, dataset: Any, classes: int, names: Mapping[int, str] | None
) -> Tensor:
    """The weights (K,) of the classes, as given, or `n / (K * n_k)` for `n_k` of `n` training images in class k.

    So their mean over the images is 1 (King & Zeng 2001; as in scikit-learn).
    """
    if not isinstance(wanted, str):
        if len(wanted) != classes:
            raise ShapleyError(f"class_weights has {len(wanted)} numbers; the model has {classes} classes.")
        return torch.tensor(wanted, dtype=torch.float32, device="cpu")
    found = labels_of(dataset, LABEL_COLUMNS)
    if found is None or LabelRules(classes).kind(np.ndim(found[1]) > 1) != "class":
        raise ShapleyError(
            "class_weights='balanced' counts the labels of a datasets.Dataset, or a list of rows, with a column of class "
            f"numbers named one of {LABEL_COLUMNS}; got {type(dataset).__name__}. Pass class_weights as a list of numbers."
        )
    column, values = found
    rows: list[Any] = [{}] * len(values)
    labels = LabelRules(classes, "single_label_classification").collated(values, column, rows)  # (n,)
    counts = np.bincount(labels[labels >= 0].numpy(), minlength=classes)  # (K,)
    missing = np.flatnonzero(counts[:classes] == 0).tolist()
    if missing:
        shown = some((names or {}).get(index, index) for index in missing)
        raise ShapleyError(
            f"class_weights='balanced' divides by the images of each class, and {len(missing)} of {classes} classes have "
            f"none in the training data: {shown}. Pass class_weights as a list of {classes} numbers."
        )
    return torch.from_numpy(counts.sum() / (classes * counts)).float()
