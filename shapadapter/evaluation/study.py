"""Explain and measure a part of the data, image by image, and sum up."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from shapadapter.core.errors import ImageError
from shapadapter.core.statistics import Interval
from shapadapter.evaluation.compared import ONE_PASS
from shapadapter.evaluation.cost import costs
from shapadapter.evaluation.dataset import Rows, choose
from shapadapter.evaluation.measure import Measurer
from shapadapter.evaluation.montage import montages
from shapadapter.evaluation.plan import Plan, about, settings_of
from shapadapter.evaluation.records import Record, Records
from shapadapter.evaluation.result import Evaluation
from shapadapter.evaluation.summary import by_name, equivalent, mean_curves, mean_of, per_method

_IMAGES_TIMED = 8
"""How many images the cost of the one pass is measured on."""

_IMAGES_TOGETHER = 32
"""Of so many images in a forward pass, one is measured at a time: it brings thousands of coalitions."""


def study(
    model: nn.Module, rows: Rows, plan: Plan, masks: str | None, groups: Tensor | None, cache: str | Path | None
) -> Evaluation:
    """Measure `plan.images` images; everything but the task and the cost.

    Args:
        model: a wrapped model in evaluation mode.
        rows: the data.
        plan: what to measure.
        masks: the column of masks, None without.
        groups: (R,) the group of each row of the data, None without.
        cache: the folder of records, None without.
    """
    chosen = choose(len(rows), plan.images, plan.seed)
    measurer = Measurer(model, rows, plan, masks)
    kept = Records(cache, settings_of(model, plan, masks), model)
    records = _measured(measurer, kept, chosen)
    own = None if groups is None else groups[torch.tensor(chosen, device="cpu")]
    budgets = by_name(
        [dict(zip(map(str, plan.budgets), record["kernel_shap"], strict=True)) for record in records], own, plan.seed
    )
    methods = per_method(records, own, plan.seed)
    notes = _thorough(measurer, kept, records, methods) if plan.thorough else []
    error = sum(record["truth_error"] for record in records) / len(records)
    notes += _doubts(error, methods[ONE_PASS].get("error"), math.prod(records[0]["players"]))
    known = {name: equivalent(records, name, plan.budgets, own, plan.seed) for name in plan.methods.names}
    counts = {
        "data": len(rows),
        "images": len(chosen),
        "groups": None if own is None else len(own.unique()),
        "truth_error": error,
        "area": _area(records, own, plan.seed),
    }
    return Evaluation(
        about=about(model, plan, measurer.predict(rows.batch(chosen[:1]).inputs), counts),
        task={},
        methods=methods,
        kernel_shap={int(budget): error for budget, error in budgets.items()},
        equivalents={name: found for name, found in known.items() if found is not None},
        curves=mean_curves(records, own, plan.seed),
        notes=tuple(notes),
    )


def _thorough(
    measurer: Measurer, kept: Records, records: Sequence[Record], methods: dict[str, dict[str, Interval]]
) -> list[str]:
    """Add to the measures of `methods` what is not measured image by image; returns what could not be measured."""
    pointed, reason = montages(measurer, kept, records)
    played = [record for record in pointed if record["methods"]]
    few = [record["index"] for record in records[:_IMAGES_TIMED]]
    extra = [
        per_method(played, None, measurer.plan.seed) if played else {},
        costs(measurer.model, measurer.methods, measurer.predict(measurer.rows.batch(few).inputs)),
    ]
    for found in extra:
        for name, values in found.items():
            methods[name].update(values)
    return [] if reason is None else [reason]


def _doubts(truth: float, own: Interval | None, players: int) -> list[str]:
    """Warn of a truth whose error is more than half of the one pass's, the relative L2 errors being `truth` and `own`."""
    if own is None or truth <= own.mean / 2:
        return []
    words = (
        f"The truth's own error, {truth:.2g}, is more than half of the one pass's, {own.mean:.2g}: errors and equivalents "
        f"say little. Pass more truth_evaluations, 16 for each player or more: {16 * players}."
    )
    warnings.warn(words, stacklevel=4)
    return [words]


def _measured(measurer: Measurer, kept: Records, chosen: Sequence[int]) -> list[Record]:
    """The record of every chosen row, from the cache or measured now."""
    plan = measurer.plan
    found: dict[int, Record] = {}
    names = {index: measurer.name_of(index) for index in chosen} if kept.folder is not None else {}
    for index, name in names.items():
        record = kept.find(name)
        if record is not None:
            found[index] = record
    missing = [index for index in chosen if index not in found]
    together = max(1, plan.batch_size // _IMAGES_TOGETHER)
    with tqdm(total=len(chosen), initial=len(found), desc="Images", unit="image", disable=not plan.progress) as bar:
        for start in range(0, len(missing), together):
            part = missing[start : start + together]
            for index, record in zip(part, measurer.records(part), strict=True):
                found[index] = record
                kept.keep(names.get(index, ""), record)
            _check_players(found)
            bar.update(len(part))
    return [found[index] for index in chosen]


def _check_players(found: Mapping[int, Record]) -> None:
    """Refuse images whose curves have no mean.

    Raises:
        ImageError: they have several grids of players.
    """
    grids = sorted({tuple(record["players"]) for record in found.values()})
    if len(grids) > 1:
        raise ImageError(f"Expected images of one size, got {grids} players. Resize them, or evaluate them apart.")


def _area(records: Sequence[Record], groups: Tensor | None, seed: int) -> float | None:
    """The mean share of the image that is the object; None without masks."""
    if "area" not in records[0]:
        return None
    return mean_of(torch.tensor([record["area"] for record in records], device="cpu"), groups, seed).mean
