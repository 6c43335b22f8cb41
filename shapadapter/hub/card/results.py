"""Results for a card: what an evaluation or the trainer measured, as rows of a table and as entries of the model index."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from huggingface_hub import EvalResult

from shapadapter.core.phrases import one_line
from shapadapter.hub.card.facts import LONG, Facts, code, count, mapping, number, repository, text

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
_NOT_SHOWN = ("runtime", "per_second", "loss", "model_preparation_time", "is_bound", "skipped_images", "epoch")
"""Ends of names of what a trainer logs beside results."""


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
    """What a card needs of `Evaluation.to_dict()`; no paths, of the data's folder only its name."""

    def interval(value: Any) -> list[Any]:
        return [mapping(value).get(part) for part in ("mean", "low", "high", "count")]

    about, folder = mapping(found.get("about")), text(mapping(found.get("about")).get("folder"))
    return {
        **{name: about[name] for name in _ABOUT if name in about},
        **({} if folder is None else {"data_name": PurePath(folder).name}),
        "task": {name: interval(value) for name, value in mapping(found.get("task")).items() if name in TASK},
        "methods": {
            one_line(method, LONG): {name: interval(value) for name, value in mapping(values).items() if name in _KEPT}
            for method, values in mapping(found.get("methods")).items()
        },
        "equivalent": mapping(found.get("equivalents")).get(_OWN),
    }


def rows(facts: Facts) -> list[Row]:
    """The results of an evaluation or, without one, those of the trainer."""
    return list(_evaluated(facts.of("evaluation")) if facts.of("evaluation") else _logged(facts))


def _evaluated(found: Mapping[str, Any]) -> Iterator[Row]:
    task, own = mapping(found.get("task")), mapping(mapping(found.get("methods")).get(_OWN))
    chance = mapping(mapping(found.get("methods")).get("random"))
    for names, values in ((TASK, task), (EXPLAINING, own)):
        for name, (label, kind) in names.items():
            mean, low, high, images = _interval(values.get(name))
            if mean is None:
                continue
            ratio = name in ("time", "memory")
            shown = _short(mean) + (" times" if ratio else "")
            if low is not None and high is not None and low != high:
                shown += f" ({_short(low)} to {_short(high)})"
            beside = _interval(chance.get(name))[0] if name in ("insertion", "deletion") else None
            shown += "" if beside is None else f" · random order {_short(beside)}"
            yield Row(label, kind, mean, shown, None if ratio else images)  # a ratio is one, of a batch
            if name == "error":
                yield from _equivalent(mapping(found.get("equivalent")), images)


def _interval(value: Any) -> tuple[float | None, float | None, float | None, int | None]:
    """Mean, ends and number of images of an interval as `compact` keeps it; None for what is not known."""
    mean, low, high, images = (*value, None, None, None, None)[:4] if isinstance(value, list) else (None,) * 4
    return number(mean), number(low), number(high), count(images)


def _equivalent(found: Mapping[str, Any], images: int | None) -> Iterator[Row]:
    value = number(found.get("evaluations"))
    if value is None:
        return
    bound = {"<": "fewer than ", ">": "more than "}.get(str(found.get("bound")), "")
    low, high = number(found.get("low")), number(found.get("high"))
    spread = "" if bound or low is None or high is None or low == high else f" ({low:,.0f} to {high:,.0f})"
    label, kind = _EQUIVALENT
    yield Row(label, None if bound else kind, value, f"{bound}{value:,.0f} evaluations{spread}", images)


def _logged(facts: Facts) -> Iterator[Row]:
    """What the trainer's evaluations found: means without intervals."""
    metrics = facts.of("metrics")
    values, images = mapping(metrics.get("values")), count(metrics.get("evaluator_images"))
    for name, given in values.items():
        value, short = number(given), re.sub(r"^(eval|test)_", "", name)
        if value is None or short.endswith(_NOT_SHOWN):
            continue
        if short == "equivalent_evaluations":
            bounded = number(values.get(f"{name}_is_bound")) == 1
            shown = f"{'at the end of the budgets: ' if bounded else ''}{value:,.0f} evaluations"
            yield Row(_EQUIVALENT[0], None if bounded else _EQUIVALENT[1], value, shown, images)
            continue
        explains = short in EXPLAINING and short != "coalition_fit"
        label, kind = {**TASK, **EXPLAINING}.get(short, (code(short), None))
        yield Row(
            label, kind, value, _short(value), images if explains else count(facts.of("data").get("eval_images"))
        )


def _short(value: float) -> str:
    size = abs(value)
    style = ".0f" if size >= 1000 else ".1f" if size >= 10 else ".3f" if size >= 1e-3 or not size else ".1e"
    return f"{value:,{style}}"


def eval_results(facts: Facts) -> list[EvalResult]:
    """The results as the Hub's model index takes them."""
    about, data = facts.of("evaluation"), facts.of("data")
    how = {
        "removal": text(about.get("removal")) or text(facts.config.get("removal")),
        "truth": about.get("truth"),
        "truth_evaluations": about.get("truth_evaluations"),
    }
    how = {name: value for name, value in how.items() if isinstance(value, str | int | float)}
    of_task = {kind for _, kind in TASK.values()}
    return [
        EvalResult(
            task_type=facts.task,
            task_name=facts.task.replace("-", " ").capitalize(),
            dataset_type=repository(data.get("id")) or "image-folder",
            dataset_name=one_line(text(about.get("data_name")) or text(data.get("name")) or "held-out images", LONG),
            metric_type=row.kind,
            metric_value=row.value,
            metric_name=one_line(row.label.rstrip(" ↑↓"), LONG),
            metric_args={
                **({} if row.images is None else {"images": row.images}),
                **({} if row.kind in of_task else how),
            },
            verified=False,
        )
        for row in rows(facts)
        if row.kind is not None
    ]
