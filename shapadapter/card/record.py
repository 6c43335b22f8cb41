"""The record that travels in `adapter_config.json`: data, training and results, and of which weights they speak."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from shapadapter.atomic import write_together
from shapadapter.errors import CheckpointError
from shapadapter.reading import read_json

from .facts import mapping

CONFIG = "adapter_config.json"
_OF_WEIGHTS = ("evaluation", "metrics", "pictures")


def weights_digest(tensors: Mapping[str, Tensor]) -> str | None:
    """By what the trained numbers of an adapter are recognised, whatever their names and precision; None if not at hand."""
    own = [tensor for name, tensor in tensors.items() if "lora_" in name]
    if not own or any(tensor.is_meta or hasattr(tensor, "device_mesh") for tensor in own):
        return None
    parts = sorted(hashlib.sha256(t.detach().float().cpu().contiguous().numpy().tobytes()).digest() for t in own)
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def settled(record: Mapping[str, Any] | None, weights: str | None, folder: Path) -> dict[str, Any] | None:
    """The record to be saved with these weights.

    Results of other weights are left out. What was added to the folder since the same weights were saved there, as an
    evaluation, stays.

    Args:
        record: what is known, with the digest of the weights that it speaks of, or without one if it is new.
        weights: the digest of what is saved, None if it is not known.
        folder: where it is saved.
    """
    found = dict(mapping(record))
    if weights is None:
        return found or None
    if found.get("weights") not in (None, weights):
        speaks = any(name in found for name in (*_OF_WEIGHTS, "training"))
        found = {name: value for name, value in found.items() if name not in _OF_WEIGHTS}
        found |= {"changed": True} if speaks else {}
    before = mapping(read_config(folder).get("record"))
    if before.get("weights") == weights:
        found = {**before, **found}
    return {**found, "weights": weights}


def read_config(folder: Path) -> dict[str, Any]:
    """The content of a folder's `adapter_config.json`; empty where there is none that can be read."""
    try:
        found: dict[str, Any] = read_json(folder / CONFIG)
    except CheckpointError:
        return {}
    return found


def write_record(folder: Path, record: Mapping[str, Any] | None) -> None:
    """Put a record into the `adapter_config.json` of a folder, where there is one."""
    config = read_config(folder)
    if config:
        write_together({folder / CONFIG: json.dumps({**config, "record": record}, indent=2, sort_keys=True).encode()})
