"""An explanation in other forms: two files that belong together, JSON, and an `Explanation` of the shap library."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

import numpy as np
from numpy.typing import NDArray
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from shapadapter.core.documents import fault, open_tensors, read_bytes, read_json, reading, shown
from shapadapter.core.errors import CheckpointError
from shapadapter.core.files import write_together

if TYPE_CHECKING:
    from shapadapter.explanation.explanation import Explanation

_FORMAT = "shapadapter.explanation"
# 2 added standard errors, evaluations and the method, 3 the frames of originals; older files are still read.
_FORMAT_VERSION = 3

TENSORS_NAME = "explanation.safetensors"
JSON_NAME = "explanation.json"


# -- files -----------------------------------------------------------------------------------------------------------


class Words(TypedDict):
    """What `explanation.json` holds."""

    format_version: int
    sha256: str
    labels: list[str]
    method: NotRequired[str]
    shapadapter_version: NotRequired[str | None]


def write_explanation(directory: Path, tensors: Mapping[str, Tensor], words: Mapping[str, Any]) -> None:
    """Write both files into a directory, which is created if missing; refuse to replace what is not ours."""
    taken = [name for name in (TENSORS_NAME, JSON_NAME) if (directory / name).exists()]
    if taken and not _is_ours(directory / JSON_NAME):
        raise FileExistsError(f"{directory / taken[0]} is not part of an Explanation: move it or save elsewhere.")
    # Cloned, because safetensors refuses tensors that share memory.
    data = save_tensors({name: value.clone().contiguous() for name, value in tensors.items()})
    try:
        version = metadata.version("shapadapter")
    except metadata.PackageNotFoundError:
        version = None
    about = {
        "format": _FORMAT,
        "format_version": _FORMAT_VERSION,
        "shapadapter_version": version,
        "sha256": hashlib.sha256(data).hexdigest(),
        **words,
    }
    directory.mkdir(parents=True, exist_ok=True)
    write_together({directory / JSON_NAME: json.dumps(about, indent=2).encode(), directory / TENSORS_NAME: data})


def _is_ours(path: Path) -> bool:
    try:
        return bool(read_json(path).get("format") == _FORMAT)
    except CheckpointError:
        return False


def read_explanation(directory: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the words that `write_explanation` wrote, bit for bit; refuse what is damaged or mixed up."""
    named, path = directory / JSON_NAME, directory / TENSORS_NAME
    expected = f"Expected {JSON_NAME} and {TENSORS_NAME} of an Explanation in {directory}: missing or unreadable."
    try:
        about = read_json(named)
    except CheckpointError as error:
        raise CheckpointError(f"{expected} {error}") from error
    if about.get("format") != _FORMAT or not path.exists():
        raise CheckpointError(expected)
    version, writer = about.get("format_version"), about.get("shapadapter_version")
    if version not in range(1, _FORMAT_VERSION + 1):
        raise CheckpointError(
            f"Expected format_version 1 to {_FORMAT_VERSION} in {directory}, but shapadapter {shown(writer).strip(chr(39))} wrote "
            f"{shown(version)}. Install that version, or a later one."
        )
    if trouble := fault(about, Words, ""):
        raise CheckpointError(f"The Explanation in {directory} is incomplete: of {JSON_NAME} {trouble}.")
    with open_tensors(path):  # a header that announces more than there is, before anything is read
        data = read_bytes(path, path.stat().st_size)
    if hashlib.sha256(data).hexdigest() != about.get("sha256"):
        raise CheckpointError(
            f"{path} ({len(data)} bytes) is not the file that {JSON_NAME} describes: it was cut short, changed or "
            "belongs to another explanation."
        )
    with reading(path):
        return load_tensors(data), about


# -- JSON ------------------------------------------------------------------------------------------------------------


def as_dict(explanation: Explanation) -> dict[str, Any]:
    """What `Explanation.to_dict` returns."""
    return {
        "method": explanation.method,
        "players": list(explanation.attributions.shape[1:3]),
        "sums_to_logits": explanation.sums_to_logits,
        "images": [_image(explanation[index]) for index in range(len(explanation))],
    }


def _image(one: Explanation) -> dict[str, Any]:
    order = one.logits.gather(1, one.classes)[0].argsort(descending=True).tolist()  # (1, K) -> (1, C) -> (C,)
    return {
        "prediction": one.top(1)[0][0].label,
        "evaluations": None if one.evaluations is None else int(one.evaluations[0]),
        "classes": [_class(one, column) for column in order],
    }


def _class(one: Explanation, column: int) -> dict[str, Any]:
    """One shown class of an explanation of one image."""
    index = int(one.classes[0, column])
    values = one.attributions[0, :, :, column]  # (1, rows, cols, C) -> (rows, cols)
    found = {
        "label": one.labels[index],
        "index": index,
        "logit": float(one.logits[0, index]),
        "probability": float(one.probabilities[0, index]),
        "null_value": float(one.null_values[0, index]),
        "sum": float(values.double().sum()),
        "attributions": values.tolist(),
    }
    if one.standard_errors is not None:
        found["standard_errors"] = one.standard_errors[0, :, :, column].tolist()  # (1, rows, cols, C) -> (rows, cols)
    return {name: _finite(value) for name, value in found.items()}


def _finite(value: Any) -> Any:
    """The same with None for every number that is not finite, which JSON does not know."""
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# -- shap ------------------------------------------------------------------------------------------------------------


def as_shap(explanation: Explanation, label: str | int | None) -> Any:
    """What `Explanation.to_shap` returns."""
    try:
        import shap
    except ImportError as error:
        raise ImportError("to_shap() makes an object of the shap library: pip install shap") from error
    if label is None:
        return shap.Explanation(
            # With the axis of colors that shap expects: (B, rows, cols, C) -> (B, rows, cols, 1, C)
            values=explanation.attributions.unsqueeze(3).numpy().copy(),
            base_values=explanation.null_values.gather(1, explanation.classes).numpy(),  # (B, K) -> (B, C)
            data=explanation.images.numpy().copy(),  # (B, H, W, 3)
            output_names=np.array(explanation.labels)[explanation.classes.numpy()],  # (B, C)
        )
    index, errors = explanation.class_index(label), explanation.standard_errors
    rows, cols = explanation.attributions.shape[1:3]
    gray = explanation.images.float().mean(dim=3) / 255  # (B, H, W, 3) -> (B, H, W)
    return shap.Explanation(
        values=_flat(explanation.for_label(index)),
        base_values=explanation.null_values[:, index].numpy().copy(),  # (B, K) -> (B,)
        # The mean brightness of each player, in 0..1: what shap's plots print or color as a feature's value.
        data=_flat(adaptive_avg_pool2d(gray, (rows, cols))),
        # In raster order, counted as on the pages.
        feature_names=[f"row {row}, column {col}" for row in range(1, rows + 1) for col in range(1, cols + 1)],
        error_std=None if errors is None else _flat(explanation.column(errors, index)),
    )


def _flat(values: Tensor) -> NDArray[np.float32]:
    """Values (B, rows, cols) as an array (B, N)."""
    return values.flatten(1).numpy().copy()
