"""One json file for each image that has been measured, so that an interrupted evaluation goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from shapadapter.core.documents import read_json
from shapadapter.core.errors import CheckpointError
from shapadapter.core.files import write_together
from shapadapter.core.links import refuse_link

Record = dict[str, Any]
"""Plain numbers, lists and dicts of what was measured about one image; None where a measure says nothing."""


def as_numbers(values: Tensor) -> Any:
    """A tensor as json can hold it: nan becomes None."""
    return plain(values.tolist())


def plain(value: Any) -> Any:
    """Numbers in lists and dicts, with None for what is not finite."""
    if isinstance(value, Mapping):
        return {str(name): plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _Kept(TypedDict):
    sha256: str
    record: Record


class Records:
    """A folder of records, or nothing at all.

    Args:
        folder: where; None keeps nothing.
        settings: what the records depend on besides the model and the image. Other settings, other files.
        model: whose weights they depend on.
    """

    def __init__(self, folder: str | Path | None, settings: Mapping[str, Any], model: nn.Module) -> None:
        self.folder = None
        if folder is not None:
            key = hashlib.sha256(json.dumps(plain(settings), sort_keys=True).encode())
            key.update(digest(dict(model.state_dict())))
            self.folder = Path(folder) / key.hexdigest()[:16]
            refuse_link(self.folder, Path(folder))
            self.folder.mkdir(parents=True, exist_ok=True)
            write_together({self.folder / "settings.json": json.dumps(plain(settings), indent=2).encode()})

    def find(self, name: str) -> Record | None:
        """The record of this name, if it is there and whole; of a damaged one nothing, so that it is measured again."""
        path = None if self.folder is None else self.folder / f"{name}.json"
        if path is None or path.is_symlink():
            return None
        try:
            kept = read_json(path, _Kept)
        except CheckpointError:
            return None
        record: Record = kept["record"]
        return record if kept["sha256"] == _sign(record) else None

    def keep(self, name: str, record: Record) -> None:
        """Write a record; it is never seen half-written."""
        if self.folder is not None:
            content = {"sha256": _sign(record), "record": record}
            write_together({self.folder / f"{name}.json": json.dumps(content).encode()}, tidy=False)


def _sign(record: Record) -> str:
    """By which a record is known that nobody and nothing has changed."""
    return hashlib.sha256(json.dumps(record).encode()).hexdigest()


def digest(tensors: Mapping[str, Any]) -> bytes:
    """A fingerprint of tensors and their names."""
    found = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        if isinstance(value, Tensor):
            found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            flat = value.detach().cpu().contiguous().flatten()
            found.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return found.digest()
