"""One json file for each image that has been measured, so that an interrupted evaluation goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shapadapter.atomic import write_together

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
            self.folder.mkdir(parents=True, exist_ok=True)
            write_together({self.folder / "settings.json": json.dumps(plain(settings), indent=2).encode()})

    def find(self, name: str) -> Record | None:
        """The record of this name, if it is there and whole."""
        path = None if self.folder is None else self.folder / f"{name}.json"
        return json.loads(path.read_text()) if path is not None and path.is_file() else None

    def keep(self, name: str, record: Record) -> None:
        """Write a record; it is never seen half-written."""
        if self.folder is not None:
            write_together({self.folder / f"{name}.json": json.dumps(record).encode()}, tidy=False)


def digest(tensors: Mapping[str, Any]) -> bytes:
    """A fingerprint of tensors and their names."""
    found = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        if isinstance(value, Tensor):
            found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            flat = value.detach().cpu().contiguous().flatten()
            found.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return found.digest()
