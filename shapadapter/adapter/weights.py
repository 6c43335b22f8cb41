"""The weight file of an adapter, looked at before anything is loaded from it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from shapadapter.core.documents import open_tensors
from shapadapter.core.errors import CheckpointError

if TYPE_CHECKING:
    from shapadapter.adapter.config import ShapleyConfig


_FLOATS = ("F64", "F32", "F16", "BF16")


def check_weights(path: Path, config: ShapleyConfig) -> dict[str, tuple[int, ...]]:
    """Refuse a safetensors file that is damaged, or in which part of token and head is missing or of another shape.

    Returns:
        The shape of each tensor in it.

    Raises:
        CheckpointError: the file is not what its header announces, or not of this configuration, or holds numbers that no
            training gives.
    """
    with open_tensors(path) as file:
        saved = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        own = {key[key.rindex("lora_shapley_") :]: shape for key, shape in saved.items() if "lora_shapley_" in key}
        _check_shapes(path, own, config)
        for key in (key for key in saved if "lora_" in key):
            kind = file.get_slice(key).get_dtype()
            if kind not in _FLOATS:
                raise CheckpointError(f"{path} holds {key} as {kind}; expected one of {', '.join(_FLOATS)}.")
            if not file.get_tensor(key).isfinite().all():
                raise CheckpointError(not_finite(path, key))
    return saved


def not_finite(where: Path | str, key: str) -> str:
    """What to say of weights with which nothing can be computed."""
    return (
        f"{where} holds numbers in {key} that are not finite: the training diverged, or the file was changed. Take an earlier "
        "checkpoint."
    )


def _check_shapes(path: Path, saved: Mapping[str, tuple[int, ...]], config: ShapleyConfig) -> None:
    """Compare the tensors of token and head with the configuration; the width of the features is theirs to say.

    Raises:
        CheckpointError: one is missing, or has another shape.
    """
    width = (saved.get("lora_shapley_norm.weight") or (1,))[0]
    classes = config.num_classes or (saved.get("lora_shapley_vote.weight") or (1,))[0]
    expected = config.shapes(width, classes)
    missing = [name for name in expected if name not in saved]
    if missing:
        raise CheckpointError(
            f"{path} lacks {len(missing)} of {len(expected)} tensors of token and head, e.g. {missing[0]}. It was not "
            "written by shapadapter, or not with the configuration beside it."
        )
    other = next((name for name, shape in expected.items() if saved[name] != shape), None)
    if other is not None:
        raise CheckpointError(
            f"{path} holds {other} of shape {saved[other]}, and the configuration beside it asks for {expected[other]}: the "
            "two were not saved together."
        )
