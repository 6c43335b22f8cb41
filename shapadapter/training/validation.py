"""What is checked before a training starts, because it would fail, or silently go wrong, only later."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import IterableDataset, Subset

from shapadapter.adapter import ShapleyLayer
from shapadapter.core.errors import ImageError, ShapleyError
from shapadapter.data.augmentation import Augmented, seeded
from shapadapter.data.classes import Relabelled
from shapadapter.data.collator import ImageCollator
from shapadapter.data.frames import frames, unseen
from shapadapter.data.images import DECODING_ERRORS, IMAGE_COLUMNS, image_side, open_image, prepare_opened
from shapadapter.data.labels import LabelRules, as_row
from shapadapter.data.rows import is_transformed, readable_rows, some_rows
from shapadapter.explanation.game import active_layer
from shapadapter.training.arguments import LORA_LEARNING_RATE, ShapleyTrainingArguments


def labels_of(dataset: Any, columns: Sequence[str]) -> tuple[str, Any] | None:
    """The column of labels and its values (n,) or (n, K), as an array or a list; None where images would have to be read.

    Raises:
        ShapleyError: labels that are to be counted as the model counts them are none of the data's own.
    """
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


def columns_of(dataset: Any) -> list[str] | None:
    """The columns of the rows; None for a stream that does not tell."""
    if isinstance(dataset, Relabelled | Augmented | Subset):
        return columns_of(dataset.dataset)
    features = getattr(dataset, "features", None)
    if isinstance(features, Mapping) and not is_transformed(dataset):
        return list(features)
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__") or not len(dataset):
        return None
    with suppress(Exception), seeded(0):  # whatever is wrong with the first row is told when it is its turn
        return list(as_row(dataset[0]))
    return None


def check_labelled(dataset: Any, rules: LabelRules) -> None:
    """Refuse to train a prediction by vote on data without labels: it would learn no classes.

    Raises:
        ShapleyError: there is no column of labels, or no label in it is known.
    """
    columns = columns_of(dataset)
    if columns is not None and rules.column(columns) is None:
        raise no_labels(columns, rules)
    found = None if is_transformed(dataset) else labels_of(dataset, rules.columns)
    if found is not None and len(found[1]) and rules.check(found[1], found[0])[1] == 0:
        raise ShapleyError(
            f"prediction='vote' learns the classes from labels, and none of the {len(found[1])} labels in the column "
            f"{found[0]!r} is known. Without labels only ShapleyConfig(prediction='classifier') can be trained."
        )


def no_labels(columns: Sequence[str], rules: LabelRules) -> ShapleyError:
    """The error about columns of which none holds labels."""
    others = [name for name in columns if name not in IMAGE_COLUMNS and not name.startswith("__")]
    likely = [name for name in others if any(word in name.lower() for word in ("label", "class", "target", "categ"))]
    guess = next(iter([*likely, *others]), None)
    remedy = (
        ""
        if guess is None
        else f"Use dataset.rename_column({guess!r}, 'label') or ShapleyTrainingArguments(label_names=[{guess!r}]). "
    )
    return ShapleyError(
        f"prediction='vote' learns the classes from labels: expected a column {' or '.join(map(repr, rules.columns))}, got "
        f"{sorted(map(str, columns))}. {remedy}Without labels only ShapleyConfig(prediction='classifier') can be trained."
    )


# A classifier whose logits differ by less than this between images says the same about all of them.
_CONSTANT_SPREAD = 0.05


def check_setting(model: nn.Module, args: ShapleyTrainingArguments, trains: bool) -> None:
    """Refuse what would fail, or silently go wrong, only later.

    Raises:
        ShapleyError: with what to do instead.
    """
    if args.n_gpu > 1:
        raise ShapleyError(
            f"{args.n_gpu} GPUs are visible to one process, which torch would use by DataParallel; its replicas share "
            "one adapter state. Start with accelerate launch, or set CUDA_VISIBLE_DEVICES=0."
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ShapleyError(
            "The model's weights are offloaded, or were never loaded: they are on the meta device, and the Trainer cannot "
            "move them. Train it before it is offloaded; an offloaded one can be explained and evaluated."
        )
    if trains and not any(parameter.requires_grad for parameter in model.parameters()):
        raise ShapleyError(
            "No parameter is trainable. Load the adapter with PeftModel.from_pretrained(..., is_trainable=True)."
        )
    own = {id(parameter) for parameter in active_layer(model).parameters()}
    alone = all(id(parameter) in own for parameter in model.parameters() if parameter.requires_grad)
    if trains and alone and args.learning_rate != LORA_LEARNING_RATE:
        warnings.warn(
            f"learning_rate={args.learning_rate} has no effect: only token and head are trained, at "
            f"head_learning_rate={args.head_learning_rate}.",
            stacklevel=3,
        )
    if args.load_best_model_at_end and not isinstance(model, PeftModel):
        raise ShapleyError(
            "load_best_model_at_end needs a PeftModel: transformers cannot load the best adapter of a model wrapped "
            "by add_adapter. Wrap it with get_peft_model(model, ShapleyConfig())."
        )


LABEL_REMEDY = (
    "Load the base with AutoModelForImageClassification.from_pretrained(..., id2label=dict(enumerate(names)), "
    "label2id={name: index for index, name in enumerate(names)}, ignore_mismatched_sizes=True), where names are "
    'dataset.features["label"].names.'
)
"""What to do about classes that the model does not have."""


def is_constant(spread: float, classes: int) -> bool:
    """Whether logits that vary by `spread` between images (standard deviation, mean over classes) are a constant's.

    A single output is a regression, whose unit is the user's.
    """
    return classes > 1 and spread < _CONSTANT_SPREAD


def check_classes(dataset: Any, classes: int) -> None:
    """Refuse a data set whose label feature names more classes than the model has.

    Raises:
        ShapleyError: it does.
    """
    for column, feature in (getattr(dataset, "features", None) or {}).items():
        count = getattr(feature, "num_classes", None)
        if column in ("label", "labels") and count is not None and count > classes:
            raise ShapleyError(
                f"The data set's column {column!r} has {count} classes, the model {classes}. {number_remedy(count)}"
            )


def number_remedy(classes: int) -> str:
    """What to do where model and data differ in the number of classes, which have no names."""
    return (
        f"Load the base with AutoModelForImageClassification.from_pretrained(..., num_labels={classes}, "
        "ignore_mismatched_sizes=True)."
    )


def check_game(layer: ShapleyLayer, args: ShapleyTrainingArguments, trains: bool) -> None:
    """Refuse settings that do not fit the active adapter's game.

    Raises:
        ShapleyError: with what to do instead.
    """
    name = layer.active
    if args.coalition_task_weight > 0 and layer.anatomy.kind == "matching":
        raise ShapleyError(
            "coalition_task_weight is for classes; a model that matches images with texts has none. Set it to 0."
        )
    config = layer.configs.get(name or "")
    if trains and config is not None and config.tune == "full" and args.learning_rate == LORA_LEARNING_RATE:
        warnings.warn(
            f"learning_rate={args.learning_rate} is the default for LoRA; with tune='full' it may overwrite what the "
            "model was pretrained for. Pass a smaller one, such as learning_rate=5e-5.",
            stacklevel=3,
        )
    learned = name is not None and name in layer.lora_shapley_fill  # type: ignore[operator]
    if trains and learned and not (args.coalition_gradients or args.coalition_task_weight > 0):
        raise ShapleyError(
            "fill='learned' learns from what coalitions predict: set coalition_task_weight (e.g. 0.5) or "
            "coalition_gradients=True, or use fill='mean'."
        )


_IMAGES = 16


def warn_of_crops(dataset: Any, collator: Any) -> None:
    """Warn where the image processor cuts off 1 % or more, on average over a few images spread over the data set.

    Args:
        dataset: rows by index; a stream is left alone.
        collator: what makes batches of them; its image processor is asked.
    """
    processor = image_side(getattr(collator, "processor", None))
    listed = (
        hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__") and not isinstance(dataset, IterableDataset)
    )
    if processor is None or not isinstance(collator, ImageCollator) or not listed:
        return
    shares: list[float] = []
    shape = (0, 0)
    count = min(len(dataset), _IMAGES)
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


# Images that are looked at. The mean of 256 is within a few hundredths of a standard deviation of that of all.
_IMAGES_OF_COLOR = 256
_BATCH = 32


def mean_color(dataset: Any, collate: Callable[[list[Any]], dict[str, Any]]) -> list[float]:
    """The mean of each channel over up to 256 images, evenly spread over a data set that has a length.

    The same in every process and in every run: no random numbers are drawn that the training would miss.

    Args:
        dataset: the training data.
        collate: makes a batch with `pixel_values` (B, C, H, W) of its rows.

    Returns:
        One number for each channel, as the image processor scales them.
    """
    sums: list[Tensor] = []
    with seeded(0):
        rows = some_rows(dataset, _IMAGES_OF_COLOR)
        while batch := list(itertools.islice(rows, _BATCH)):
            inputs, read, _ = readable_rows(collate(batch))
            pixels = inputs["pixel_values"][:read].float()  # (R, C, H, W)
            sums.append(pixels.mean(dim=(2, 3)))  # (B, C)
    return [round(mean, 6) for mean in torch.cat(sums).mean(dim=0).tolist()]
