"""What was measured about each image, on disk, and the means of it with their intervals."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from shapadapter.core.documents import read_json
from shapadapter.core.errors import CheckpointError
from shapadapter.core.files import refuse_link, write_together
from shapadapter.core.statistics import EquivalentEvaluations, Interval, bootstrap_intervals, equivalent_evaluations

Record = dict[str, Any]
"""Plain numbers, lists and dicts of what was measured about one image; None where a measure says nothing."""


def plain(value: Any) -> Any:
    """Numbers in tensors, lists and dicts as json can hold them, with None for what is not finite."""
    if isinstance(value, Tensor):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(name): plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _Kept(TypedDict):
    sha256: str
    record: Record


class Records:
    """A folder with a json file for each image, or nothing at all where `folder` is None.

    The files lie in a folder of their own for other settings, or a model with other weights.
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
        """The record of this name, if it is there and complete; None of a damaged one, so that it is measured again."""
        path = None if self.folder is None else self.folder / f"{name}.json"
        if path is None or path.is_symlink():
            return None
        try:
            kept = read_json(path, _Kept)
        except CheckpointError:
            return None
        return kept["record"] if kept["sha256"] == _sign(kept["record"]) else None

    def keep(self, name: str, record: Record) -> None:
        """Write a record; it is never seen half-written."""
        if self.folder is not None:
            content = {"sha256": _sign(record), "record": record}
            write_together({self.folder / f"{name}.json": json.dumps(content).encode()}, tidy=False)


def _sign(record: Record) -> str:
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


# -- means -----------------------------------------------------------------------------------------------------------

_DRAWS = 1000
_NUMBERS_AT_ONCE = 10_000_000


@dataclass(frozen=True)
class Equivalent(EquivalentEvaluations):
    """The KernelSHAP budget whose error equals a method's, with a 95 % bootstrap interval.

    Attributes:
        low: the lower end, in evaluations; not below the smallest budget.
        high: the upper end; not above the largest.
    """

    low: float = float("nan")
    high: float = float("nan")


@dataclass(frozen=True)
class Means:
    """Means over images with their intervals, from draws of images, or of groups (R,) of them where there are any."""

    groups: Tensor | None
    seed: int

    def of_columns(self, rows: Sequence[Sequence[float | None]] | Tensor) -> list[Interval]:
        """Of columns (R, P), all from the same draws; None is left out."""
        values = rows if isinstance(rows, Tensor) else _numbers(rows)
        draws = min(_DRAWS, max(100, _NUMBERS_AT_ONCE // len(values)))  # of very many images fewer will do
        return bootstrap_intervals(values, self.groups, draws=draws, seed=self.seed)

    def of_names(self, records: Sequence[Mapping[Any, Any]]) -> dict[Any, Interval]:
        """Of named numbers, a mapping for each image; a number that is missing or None is left out."""
        names = list(dict.fromkeys(name for record in records for name in record))
        if not names:
            return {}
        means = self.of_columns([[record.get(name) for name in names] for record in records])
        return {name: mean for name, mean in zip(names, means, strict=True) if mean.count}

    def of_methods(self, records: Sequence[Record]) -> dict[str, dict[str, Interval]]:
        """Of every measure of every method."""
        names = list(dict.fromkeys(name for record in records for name in record["methods"]))
        return {name: self.of_names([record["methods"].get(name, {}) for record in records]) for name in names}

    def of_curves(self, records: Sequence[Record]) -> dict[str, dict[str, tuple[Interval, ...]]]:
        """Of every curve of every method, an interval at each point."""
        return {
            method: {name: tuple(self.of_columns([one["curves"][method][name] for one in records])) for name in lines}
            for method, lines in records[0]["curves"].items()
        }

    def equivalent(self, records: Sequence[Record], method: str, budgets: Sequence[int]) -> Equivalent | None:
        """The KernelSHAP budget whose mean error is that of a method; None without errors."""
        values = _numbers([[one["methods"][method].get("error"), *one["kernel_shap"]] for one in records])
        known = values.isfinite().all(dim=1)  # (R,)
        if not bool(known.any()):
            return None
        values = values[known]  # (r, 1 + budgets)
        groups = torch.arange(len(known), device="cpu") if self.groups is None else self.groups
        names = groups[known].unique(return_inverse=True)[1]  # (r,)
        sizes = names.bincount().double()[:, None]  # (G, 1)
        sums = values.new_zeros(len(sizes), values.shape[1]).index_add(0, names, values)  # (G, 1 + budgets)
        best = _budget(values.mean(dim=0), budgets)
        if len(sizes) < 2:
            return Equivalent(best.evaluations, best.bound)
        generator = torch.Generator().manual_seed(self.seed)
        chosen = torch.randint(len(sizes), (_DRAWS, len(sizes)), generator=generator, device="cpu")  # (draws, G)
        means = sums[chosen].sum(dim=1) / sizes[chosen].sum(dim=1)  # (draws, 1 + budgets)
        drawn = values.new_tensor([_budget(mean, budgets).evaluations for mean in means])
        low, high = drawn.quantile(values.new_tensor([0.025, 0.975])).tolist()
        return Equivalent(best.evaluations, best.bound, low, high)


def _numbers(rows: Sequence[Sequence[float | None]]) -> Tensor:
    numbers = [[math.nan if value is None else float(value) for value in row] for row in rows]
    return torch.tensor(numbers, dtype=torch.float64, device="cpu")


def _budget(means: Tensor, budgets: Sequence[int]) -> EquivalentEvaluations:
    """From the mean errors (1 + budgets,) of a method and of each budget."""
    error, *ladder = means.tolist()
    return equivalent_evaluations(error, budgets, ladder)
