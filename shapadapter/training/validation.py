"""The data of a training, looked at before its first step: labels as the model counts classes, crops, mean colour."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, Subset

from shapadapter.adapter import ShapleyLayer
from shapadapter.core.errors import ImageError, ShapleyError
from shapadapter.data.augmentation import Augmented, seeded
from shapadapter.data.classes import Relabelled, are_numbers, as_model_counts, named_classes
from shapadapter.data.collator import ImageCollator
from shapadapter.data.images import DECODING_ERRORS, IMAGE_COLUMNS, image_side, open_image, prepare_opened, undecoded
from shapadapter.data.labels import IGNORED, LABEL_COLUMNS, PROBLEMS, LabelRules, as_row, known_labels
from shapadapter.data.processors import frames, unseen
from shapadapter.data.rows import is_transformed, readable_rows, some_rows
from shapadapter.explanation.passes import base_of
from shapadapter.training.arguments import ShapleyTrainingArguments

_LABEL_REMEDY = (
    "Load the base with AutoModelForImageClassification.from_pretrained(..., id2label=dict(enumerate(names)), "
    "label2id={name: index for index, name in enumerate(names)}, ignore_mismatched_sizes=True), where names are "
    'dataset.features["label"].names.'
)
_NUMBER_REMEDY = "Load the base with AutoModelForImageClassification.from_pretrained(..., num_labels={}, ignore_mismatched_sizes=True)."


class LabelledData:
    """What the labels of a model's data may be, by its classes.

    Args:
        model: a wrapped classifier.
        layer: its adapter.
        args: of the training; columns in `label_names` come first.
        dataset: the training data, or None.

    Attributes:
        rules: what labels may be.
        names: of the model's classes, by index; those of the training data where it had none, which it then has.

    Raises:
        ShapleyError: the data has names for another number of classes than the model, which has none.
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
        columns = _columns_of(dataset)
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
        guess = next(
            (name for name in others if any(word in name.lower() for word in words)), next(iter(others), None)
        )
        remedy = (
            ""
            if guess is None
            else (
                f"Use dataset.rename_column({guess!r}, 'label') or ShapleyTrainingArguments(label_names=[{guess!r}]). "
            )
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

    def count(self, inputs: Mapping[str, Any]) -> Tensor:
        """How many labels of a batch are known, (); one whose image could not be read counts, though it has no say."""
        labels, readable = inputs.get("labels"), inputs.get("readable")
        if not isinstance(labels, Tensor):
            return torch.zeros((), device="cpu")
        known = known_labels(labels, self.rules.kind(several=False) == "quantity")  # (B,) or (B, K)
        if readable is not None:
            known = known | ~readable.view(-1, *[1] * (known.ndim - 1))
        return known.sum()


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
    return as_model_counts(dataset, labelled.names, _LABEL_REMEDY, labelled.rules.columns)


def check_classes(dataset: Any, classes: int) -> None:
    """Refuse a data set whose label feature has more classes than the model."""
    for column, feature in (getattr(dataset, "features", None) or {}).items():
        count = getattr(feature, "num_classes", None)
        if column in ("label", "labels") and count is not None and count > classes:
            raise ShapleyError(
                f"The data set's column {column!r} has {count} classes, the model {classes}. {_NUMBER_REMEDY.format(count)}"
            )


def labels_of(dataset: Any, columns: Sequence[str]) -> tuple[str, Any] | None:
    """The column of labels and its values (n,) or (n, K), as an array or a list; None where images would have to be read."""
    if isinstance(dataset, Augmented):
        return labels_of(dataset.dataset, columns)
    if isinstance(dataset, Subset | Relabelled):
        found = labels_of(dataset.dataset, columns)
        if found is None:
            return None
        column, values = found
        if isinstance(dataset, Subset):
            return column, [values[index] for index in dataset.indices]
        rules = LabelRules(len(dataset.numbers))
        rules.check(values, column)
        rows: list[dict[str, Any]] = [{}] * len(values)
        own = rules.collated(values, column, rows).numpy()  # (n,)
        return column, np.where(own >= 0, np.asarray(dataset.numbers)[own.clip(0)], own)
    if isinstance(dataset, list):
        rows = [as_row(row) for row in dataset]
        name = next((name for name in columns if rows and name in rows[0]), None)
        return None if name is None else (name, [row.get(name) for row in rows])
    if hasattr(dataset, "targets") and hasattr(dataset, "classes"):  # of torchvision
        changed = getattr(dataset, "target_transform", None) is not None
        return None if changed else ("label", np.asarray(dataset.targets))
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "with_format"):
        return None
    name = next((name for name in columns if name in dataset.column_names), None)
    return None if name is None else (name, _as_array(dataset.with_format("arrow", columns=[name])[:].column(name)))


def _as_array(column: Any) -> Any:
    """A column of Arrow as an array (n,) or (n, K) of numbers, or else as a list."""
    import pyarrow as pa

    array = column.combine_chunks()
    array = pa.concat_arrays(array.chunks) if isinstance(array, pa.ChunkedArray) else array
    kind = array.type
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return array.to_numpy(zero_copy_only=False)
    if pa.types.is_list(kind) and array.null_count == 0 and len(array):
        inside, lengths = array.flatten(), np.diff(array.offsets.to_numpy())
        if len(set(lengths.tolist())) == 1 and (pa.types.is_integer(inside.type) or pa.types.is_floating(inside.type)):
            return inside.to_numpy(zero_copy_only=False).reshape(len(array), -1)
    return array.to_pylist()


def _columns_of(dataset: Any) -> list[str] | None:
    """The columns of the rows; None for a stream that does not tell."""
    if isinstance(dataset, Relabelled | Augmented | Subset):
        return _columns_of(dataset.dataset)
    features = getattr(dataset, "features", None)
    if isinstance(features, Mapping) and not is_transformed(dataset):
        return list(features)
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__") or not len(dataset):
        return None
    with suppress(Exception), seeded(0):  # whatever is wrong with the first row is told when it is its turn
        return list(as_row(dataset[0]))
    return None


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
            stacklevel=3,
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
