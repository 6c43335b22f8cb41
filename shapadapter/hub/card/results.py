"""Results for a card: what an evaluation or the trainer found, as rows of a table and as entries of the model index."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from shapadapter.hub.card.facts import Facts, code, mapping, number, one_line, repository, text

_ABOUT = ("data", "images", "groups", "truth", "truth_evaluations", "truth_error", "removal", "players", "curves_read")
_KEPT = ("error", "spearman", "insertion", "deletion", "evaluations", "time", "memory")
_OWN = "shapadapter"

# Of each measure: what a reader sees, and its name in metadata.
TASK = {
    "accuracy": ("Accuracy ↑", "accuracy"),
    "cross_entropy": ("Cross-entropy ↓", "cross_entropy"),
    "absolute_error": ("Absolute error ↓", "mae"),
    "squared_error": ("Squared error ↓", "mse"),
}
EXPLAINING = {
    "error": ("Relative L2 error to the true Shapley values ↓", "shapley_relative_error"),
    "spearman": ("Spearman correlation with them ↑", "shapley_spearman"),
    "insertion": ("Insertion ↑", "insertion_auc"),
    "deletion": ("Deletion ↓", "deletion_auc"),
    "coalition_fit": ("Share of the differences between coalitions explained ↑", "coalition_fit"),
    "time": ("Time, over the plain forward pass ↓", "time_ratio"),
    "memory": ("Memory, over the plain forward pass ↓", "memory_ratio"),
}
_EQUIVALENT = ("KernelSHAP needs for the same error ↑", "kernel_shap_equivalent_evaluations")
_OF_RUNNING = ("runtime", "per_second", "loss", "model_preparation_time", "is_bound", "skipped_images")


@dataclass(frozen=True)
class Row:
    """One result.

    Attributes:
        label: for people, Markdown.
        kind: its name in metadata; None for one that stays out of it.
        value: a number.
        shown: the number with its interval and unit.
        images: how many images it is a mean of, None if unknown.
    """

    label: str
    kind: str | None
    value: float
    shown: str
    images: int | None


def compact(found: Mapping[str, Any]) -> dict[str, Any]:
    """What a card needs of `Evaluation.to_dict()`; no paths, of the data's folder the last part."""
    about = mapping(found.get("about"))
    folder = text(about.get("folder"))
    methods = mapping(found.get("methods"))
    return {
        **{name: about[name] for name in _ABOUT if name in about},
        **({} if folder is None else {"data_name": PurePath(folder).name}),
        "task": {name: _interval(value) for name, value in mapping(found.get("task")).items() if name in TASK},
        "methods": {
            one_line(method): {name: _interval(value) for name, value in mapping(values).items() if name in _KEPT}
            for method, values in methods.items()
        },
        "equivalent": mapping(found.get("equivalents")).get(_OWN),
    }


def _interval(value: Any) -> list[Any]:
    return [mapping(value).get(part) for part in ("mean", "low", "high", "count")]


def rows(facts: Facts) -> list[Row]:
    """The results of an evaluation or, without one, those of the trainer."""
    return list(_evaluated(facts.of("evaluation")) if facts.of("evaluation") else _watched(facts))


def _evaluated(found: Mapping[str, Any]) -> Iterator[Row]:
    task, own = mapping(found.get("task")), mapping(mapping(found.get("methods")).get(_OWN))
    chance = mapping(mapping(found.get("methods")).get("random"))
    for names, values in ((TASK, task), (EXPLAINING, own)):
        for name, (label, kind) in names.items():
            row = _row(label, kind, values.get(name), " times" if name in ("time", "memory") else "")
            if row is None:
                continue
            beside = _row(label, None, chance.get(name), "") if name in ("insertion", "deletion") else None
            note = "" if beside is None else f" · random order {_short(beside.value)}"
            yield Row(label, kind, row.value, row.shown + note, row.images)
            if name == "error":
                yield from _equivalent(mapping(found.get("equivalent")), row.images)


def _row(label: str, kind: str | None, interval: Any, unit: str) -> Row | None:
    mean, low, high, count = (*interval, None, None, None, None)[:4] if isinstance(interval, list) else (None,) * 4
    value = number(mean)
    if value is None:
        return None
    ends = (number(low), number(high))
    spread = (
        ""
        if ends[0] is None or ends[1] is None or ends[0] == ends[1]
        else f" ({_short(ends[0])} to {_short(ends[1])})"
    )
    images = count if type(count) is int and not unit else None  # of a ratio there is one, of a batch
    return Row(label, kind, value, f"{_short(value)}{unit}{spread}", images)


def _equivalent(found: Mapping[str, Any], images: int | None) -> Iterator[Row]:
    value = number(found.get("evaluations"))
    if value is None:
        return
    bound = {"<": "fewer than ", ">": "more than "}.get(str(found.get("bound")), "")
    low, high = number(found.get("low")), number(found.get("high"))
    spread = "" if bound or low is None or high is None or low == high else f" ({low:,.0f} to {high:,.0f})"
    label, kind = _EQUIVALENT
    yield Row(label, None if bound else kind, value, f"{bound}{value:,.0f} evaluations{spread}", images)


def _watched(facts: Facts) -> Iterator[Row]:
    """What the trainer's evaluations found: means without intervals."""
    metrics = facts.of("metrics")
    values = mapping(metrics.get("values"))
    data, images = facts.of("data").get("eval_images"), metrics.get("evaluator_images")
    for name, given in values.items():
        value, short = number(given), re.sub(r"^(eval|test)_", "", name)
        if value is None or short.endswith(_OF_RUNNING) or short == "epoch":
            continue
        if short == "equivalent_evaluations":
            bounded = number(values.get(f"{name}_is_bound")) == 1
            shown = f"{'at the end of the budgets: ' if bounded else ''}{value:,.0f} evaluations"
            yield Row(_EQUIVALENT[0], None if bounded else _EQUIVALENT[1], value, shown, _count(images))
            continue
        explains = short in EXPLAINING and short != "coalition_fit"
        label, kind = {**TASK, **EXPLAINING}.get(short, (code(short), None))
        yield Row(label, kind, value, _short(value), _count(images if explains else data))


def _count(value: Any) -> int | None:
    return value if type(value) is int else None


def _short(value: float) -> str:
    """A number for people."""
    size = abs(value)
    style = ".0f" if size >= 1000 else ".1f" if size >= 10 else ".3f" if size >= 1e-3 or not size else ".1e"
    return f"{value:,{style}}"


def model_index(facts: Facts, title: str) -> list[dict[str, Any]]:
    """The results as the Hub's model index; empty without any."""
    about, data = facts.of("evaluation"), facts.of("data")
    removal = text(about.get("removal")) or text(facts.config.get("removal"))
    how = {"removal": removal, "truth": about.get("truth"), "truth_evaluations": about.get("truth_evaluations")}
    metrics = [
        {
            "type": row.kind,
            "value": row.value,
            "name": one_line(row.label.rstrip(" ↑↓")),
            "verified": False,
            "args": {
                **({} if row.images is None else {"images": row.images}),
                **({} if row.kind in {kind for _, kind in TASK.values()} else _known(how)),
            },
        }
        for row in rows(facts)
        if row.kind is not None
    ]
    if not metrics:
        return []
    name = one_line(text(about.get("data_name")) or text(data.get("name")) or "held-out images")
    kind = repository(data.get("id")) or "image-folder"
    task = {"type": facts.task, "name": facts.task.replace("-", " ").capitalize()}
    result = {"task": task, "dataset": {"name": name, "type": kind}, "metrics": metrics}
    return [{"name": one_line(title), "results": [result]}]


def _known(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if isinstance(value, str | int | float)}
