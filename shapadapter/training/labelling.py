"""What a data set tells about its labels without reading its images, checked before a training starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, Subset

from shapadapter.augmenting import Augmented, seeded
from shapadapter.errors import ShapleyError
from shapadapter.images import IMAGE_COLUMNS
from shapadapter.labels import LabelRules, Relabelled, as_row

from .reading import is_transformed


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
