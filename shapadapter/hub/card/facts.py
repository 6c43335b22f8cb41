"""What a card can say: the content of `adapter_config.json`, the results in its record, and words of others made harmless."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from shapadapter.adapter.saving import OWN_PICTURE
from shapadapter.core.documents import fault
from shapadapter.core.phrases import one_line

LONG = 80
MATCHING = "zero-shot-image-classification"

# As huggingface_hub allows names of repositories.
_REPOSITORY = re.compile(r"[A-Za-z0-9_][\w.-]{0,95}(/[A-Za-z0-9_][\w.-]{0,95})?", re.ASCII)
_OWN, _GRADIENT = "shapadapter", "gradient"

# -- words of others --------------------------------------------------------------------------------------------------


def code(text: Any, limit: int = LONG) -> str:
    """A code span, in which Markdown reads nothing: no link, picture, tag or entity."""
    line = one_line(text, limit)
    if not line:
        return "(empty)"
    fence = "`" * (max((len(run) for run in re.findall("`+", line)), default=0) + 1)
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def words(text: Any, limit: int = LONG) -> str:
    """Ordinary text for a heading or a picture's description, every character of Markdown and HTML escaped."""
    line = one_line(text, limit).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]#|~!$^@:])", r"\\\1", line)


def repository(name: Any) -> str | None:
    """A name on the Hub, or None for a path and anything else."""
    given = text(name)
    if given is None or not _REPOSITORY.fullmatch(given) or ".." in given or Path(given).is_dir():
        return None
    return given


# -- the record, which anybody may have written ----------------------------------------------------------------------


def text(value: Any) -> str | None:
    """The value if it is a text with something in it."""
    return value if isinstance(value, str) and value.strip() else None


def _texts(value: Any) -> list[str]:
    listed = value if isinstance(value, list | tuple) else [value]
    return list(dict.fromkeys(one for one in listed if text(one)))


def _number(value: Any) -> float | None:
    return value if fault(value, float, "it") is None else None


def _count(value: Any) -> int | None:
    return value if type(value) is int else None


def _grid(value: Any) -> tuple[int, int] | None:
    right = isinstance(value, list | tuple) and len(value) == 2 and all(type(side) is int for side in value)
    return (value[0], value[1]) if right else None


def _interval(value: Any) -> tuple[float, float | None, float | None, int | None] | None:
    """Mean, ends and number of images, as `compact` keeps them."""
    mean, low, high, images = (*value, None, None, None, None)[:4] if isinstance(value, list) else (None,) * 4
    return None if _number(mean) is None else (float(mean), _number(low), _number(high), _count(images))


def _pictures(value: Any) -> list[tuple[str, Any, str]]:
    listed = [one for one in value if isinstance(one, Mapping)] if isinstance(value, list) else []
    return [
        # Those of earlier records were all made in one forward pass.
        (one["file"], one.get("alt", ""), text(one.get("level")) or "one forward pass")
        for one in listed
        if OWN_PICTURE.fullmatch(str(one.get("file")))
    ]


# What is read of each value; `...` stands for any name.
_RECORD: dict[Any, Any] = {
    "kind": text,
    "quantised": text,
    "players": _grid,
    "changed": bool,
    "about": {
        **dict.fromkeys(("finetuned_from", "model_name", "license"), text),
        **dict.fromkeys(("tags", "dataset", "dataset_args", "dataset_tags"), _texts),
        "language": lambda value: value,
    },
    "data": {"name": text, "id": text, "train_images": _count, "eval_images": _count},
    "training": {"epochs": _number, "steps": _number, "minutes": _number, "hardware": text, "settings": {...: str}},
    "metrics": {"step": _count, "evaluator_images": _count, "values": {...: _number}},
    "versions": {...: text},
    "pictures": _pictures,
    "evaluation": {
        **dict.fromkeys(("data_name", "removal", "truth", "curves_read"), text),
        **dict.fromkeys(("groups", "truth_evaluations", "truth_error"), _number),
        "players": _grid,
        "task": {...: _interval},
        "methods": {...: {...: _interval}},
        "equivalent": {"evaluations": _number, "bound": text, "low": _number, "high": _number},
    },
}


def _read(value: Any, kind: Any) -> Any:
    """The parts of a value that are of their kind, and no empty ones."""
    if not isinstance(kind, dict):
        return kind(value)
    given = value if isinstance(value, Mapping) else {}
    found = {name: _read(given.get(name), kind.get(name, kind.get(...))) for name in (given if ... in kind else kind)}
    return {name: one for name, one in found.items() if one not in (None, [], {})}


@dataclass(frozen=True)
class Facts:
    """What is known of an adapter."""

    config: Mapping[str, Any]  # the content of `adapter_config.json`
    name: str  # by which the adapter is loaded, a folder's name or one on the Hub
    revision: str | None = None  # the branch on the Hub, None for the main one
    pictures: Sequence[str] = ()  # names of the pictures that are there to be shown
    subfolder: str | None = None  # where the adapter is in the repository; None for the top

    @cached_property
    def record(self) -> dict[str, Any]:
        """What is known of data, training and results."""
        found: dict[str, Any] = _read(self.config.get("record"), _RECORD)
        return found

    def of(self, key: str) -> Mapping[str, Any]:
        """A part of the record; empty where it is not known."""
        found: Mapping[str, Any] = self.record.get(key, {})
        return found

    @property
    def base(self) -> str | None:
        """The base model's name on the Hub; None for one in a folder."""
        own = self.config.get("base_model_name_or_path")
        return repository(self.of("about").get("finetuned_from")) or repository(own)

    @property
    def base_name(self) -> str:
        """The last part of the base model's name, which says nothing about where folders are."""
        given = text(self.config.get("base_model_name_or_path")) or self.family or "base model"
        return re.split(r"[\\/]", given.rstrip("\\/"))[-1] or "base model"

    @property
    def family(self) -> str | None:
        """The base model's class."""
        found = self.config.get("auto_mapping")
        return text(found.get("base_model_class")) if isinstance(found, Mapping) else None

    @property
    def classes(self) -> list[str]:
        """Names of the classes, in their order; empty where they have none."""
        names = self.config.get("id2label")
        try:
            return [str(names[index]) for index in sorted(names, key=int)] if isinstance(names, Mapping) else []
        except (TypeError, ValueError):
            return []

    @property
    def task(self) -> str:
        """As the Hub calls it."""
        kind, family = self.record.get("kind"), self.family or ""
        matching = kind == "matching" or (kind is None and not self.classes and not family.endswith("Classification"))
        return MATCHING if matching else "image-classification"

    @property
    def quantity(self) -> bool:
        """Whether the model predicts a number instead of classes."""
        problem = self.config.get("problem_type")
        return problem == "regression" or (problem is None and self.config.get("num_classes") == 1)

    @property
    def players(self) -> tuple[int, int] | None:
        """(rows, cols) of the players."""
        found = _grid(self.config.get("grid")) or self.record.get("players") or self.of("evaluation").get("players")
        return found or None

    @property
    def title(self) -> str:
        """The name that a person gave: the model's, or that of its repository."""
        own = self.name.split("/")[-1] if "/" in self.name else f"{self.base_name} with Shapley attributions"
        return str(self.of("about").get("model_name") or own)

    @property
    def shown_pictures(self) -> list[tuple[str, Any]]:
        """File and description of the pictures that the record lists and that are there."""
        return [(file, alt) for file, alt, _ in self.record.get("pictures", []) if file in self.pictures]

    @property
    def levels(self) -> list[str]:
        """How the maps of the shown pictures were made."""
        shown = [made for file, _, made in self.record.get("pictures", []) if file in self.pictures]
        return list(dict.fromkeys(shown))


# -- results ----------------------------------------------------------------------------------------------------------

# Of each measure: what a reader sees, and its name in metadata.
_TASK = {
    "accuracy": ("Accuracy ↑", "accuracy"),
    "cross_entropy": ("Cross-entropy ↓", "cross_entropy"),
    "absolute_error": ("Absolute error ↓", "mae"),
    "squared_error": ("Squared error ↓", "mse"),
}
_EXPLAINING = {
    "error": ("Relative L2 error to the true Shapley values ↓", "shapley_relative_error"),
    "spearman": ("Spearman correlation with them ↑", "shapley_spearman"),
    "insertion": ("Insertion ↑", "insertion_auc"),
    "deletion": ("Deletion ↓", "deletion_auc"),
    "coalition_fit": ("Share of the differences between coalitions explained ↑", "coalition_fit"),
    "time": ("Time, over the plain forward pass ↓", "time_ratio"),
    "memory": ("Memory, over the plain forward pass ↓", "memory_ratio"),
}
_EQUIVALENT = ("KernelSHAP needs for the same error ↑", "kernel_shap_equivalent_evaluations")
_KEPT = ("error", "spearman", "insertion", "deletion", "evaluations", "time", "memory")
_ABOUT = ("data", "images", "groups", "truth", "truth_evaluations", "truth_error", "removal", "players", "curves_read")
_NOT_SHOWN = ("runtime", "per_second", "loss", "model_preparation_time", "is_bound", "skipped_images", "epoch")
"""Ends of names of what a trainer logs beside results."""


class Row(NamedTuple):
    """One result: Markdown for people; its name in metadata, if it has one; the number, bare and as it is shown."""

    label: str
    kind: str | None
    value: float
    shown: str
    images: int | None  # that it is a mean of
    of_task: bool = False


def compact(found: Mapping[str, Any]) -> dict[str, Any]:
    """What a card needs of `Evaluation.to_dict()`; no paths, of the data's folder only its name."""

    def intervals(values: Mapping[str, Any], names: Any) -> dict[str, list[Any]]:
        parts = ("mean", "low", "high", "count")
        return {name: [value[part] for part in parts] for name, value in values.items() if name in names}

    about = found["about"]
    return {
        **{name: about[name] for name in _ABOUT if name in about},
        **({"data_name": PurePath(about["folder"]).name} if about.get("folder") else {}),
        "task": intervals(found["task"], _TASK),
        "methods": {one_line(name, LONG): intervals(values, _KEPT) for name, values in found["methods"].items()},
        "equivalent": found["equivalents"].get(_OWN),
    }


def rows(facts: Facts) -> list[Row]:
    """The results of an evaluation or, without one, those of the trainer."""
    return list(_evaluated(facts.of("evaluation")) if facts.of("evaluation") else _logged(facts))


def _evaluated(found: Mapping[str, Any]) -> Iterator[Row]:
    methods = found.get("methods", {})
    own, chance = methods.get(_OWN, {}), methods.get("random", {})
    for name, (label, kind) in {**_TASK, **_EXPLAINING}.items():
        of_task = name in _TASK
        mean, low, high, images = (found.get("task", {}) if of_task else own).get(name, (None,) * 4)
        if mean is None:
            continue
        ratio = name in ("time", "memory")
        shown = _with_interval(mean, low, high, " times" if ratio else "")
        if name in ("insertion", "deletion") and name in chance:
            shown += f" · random order {_short(chance[name][0])}"
        yield Row(label, kind, mean, shown, None if ratio else images, of_task)  # a ratio is one, of a batch
        if name == "error" and name in methods.get(_GRADIENT, {}):
            mean, low, high, images = methods[_GRADIENT][name]
            yield Row("... with a backward pass, too ↓", None, mean, _with_interval(mean, low, high), images)
        if name == "error":
            yield from _equivalent(found.get("equivalent", {}), images)


def _with_interval(mean: float, low: float | None, high: float | None, unit: str = "") -> str:
    """A mean, and its interval where there is one."""
    interval = low is not None and high is not None and low != high
    return _short(mean) + unit + (f" ({_short(low)} to {_short(high)})" if interval else "")  # type: ignore[arg-type]


def _equivalent(found: Mapping[str, Any], images: int | None) -> Iterator[Row]:
    value, low, high = (found.get(name) for name in ("evaluations", "low", "high"))
    if value is None:
        return
    bound = {"<": "fewer than ", ">": "more than "}.get(found.get("bound", ""), "")
    spread = "" if bound or low is None or high is None or low == high else f" ({low:,.0f} to {high:,.0f})"
    label, kind = _EQUIVALENT
    yield Row(label, None if bound else kind, float(value), f"{bound}{value:,.0f} evaluations{spread}", images)


def _logged(facts: Facts) -> Iterator[Row]:
    """What the trainer's evaluations found: means without intervals."""
    metrics = facts.of("metrics")
    values, explained = metrics.get("values", {}), metrics.get("evaluator_images")
    for name, value in values.items():
        short = re.sub(r"^(eval|test)_", "", name)
        if short.endswith(_NOT_SHOWN):
            continue
        if short == "equivalent_evaluations":
            bounded = values.get(f"{name}_is_bound") == 1
            shown = f"{'at the end of the budgets: ' if bounded else ''}{value:,.0f} evaluations"
            yield Row(_EQUIVALENT[0], None if bounded else _EQUIVALENT[1], float(value), shown, explained)
            continue
        of_few = short in _EXPLAINING and short != "coalition_fit"
        images = explained if of_few else facts.of("data").get("eval_images")
        label, kind = {**_TASK, **_EXPLAINING}.get(short, (code(short), None))
        yield Row(label, kind, float(value), _short(value), images, short in _TASK)


def _short(value: float) -> str:
    size = abs(value)
    style = ".0f" if size >= 1000 else ".1f" if size >= 10 else ".3f" if size >= 1e-3 or not size else ".1e"
    return f"{value:,{style}}"
