"""What an evaluation found: plain numbers with their intervals, to print, save and draw."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NotRequired, TypedDict

from shapadapter.core.documents import Between, FileName, checked, fault, read_json, reading, shown
from shapadapter.core.errors import CheckpointError, FieldError
from shapadapter.core.files import write_together
from shapadapter.core.statistics import Interval
from shapadapter.evaluation.equal_cost import CostPoint
from shapadapter.evaluation.records import Equivalent, plain
from shapadapter.evaluation.tables import as_markdown, as_text, blocks, summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMAT = "shapadapter.evaluation"
FORMAT_VERSION = 1


class SavedInterval(TypedDict):
    """An `Interval` in json, which knows no nan."""

    mean: float | None
    low: float | None
    high: float | None
    count: Annotated[int, Between(0)]


class SavedEquivalent(TypedDict):
    """An `Equivalent` in json."""

    evaluations: float | None
    bound: Literal["<", "=", ">"]
    low: float | None
    high: float | None


class Named(TypedDict):
    """What is read of an evaluation that need not be whole."""

    checkpoint: NotRequired[Annotated[str, FileName]]
    folder: NotRequired[Annotated[str, FileName]]
    weights: NotRequired[str | None]


class About(Named):
    """What is known of every evaluation."""

    model: str
    prediction: str
    removal: str
    players: tuple[Annotated[int, Between(1)], Annotated[int, Between(1)]]
    explained: str
    value: str
    curves_read: str
    truth: str
    truth_evaluations: int
    truth_error: float | None
    top_k: int
    removed_counts: list[int]
    removal_draws: int
    seed: int
    data: int
    images: int
    groups: int | None
    area: float | None
    methods: NotRequired[list[str]]


class SavedPoint(TypedDict):
    """A `CostPoint` in json."""

    method: str
    budget: Annotated[int, Between(0)]
    passes: float
    errors: list[float | None]
    error: SavedInterval


class Saved(TypedDict):
    """What a file with an evaluation holds."""

    format: Literal["shapadapter.evaluation"]
    format_version: Literal[1]
    about: Named
    task: dict[str, SavedInterval]
    methods: dict[str, dict[str, SavedInterval]]
    kernel_shap: dict[str, SavedInterval]
    equivalents: dict[str, SavedEquivalent]
    curves: dict[str, dict[str, list[SavedInterval]]]
    notes: list[str]
    cost_curve: NotRequired[list[SavedPoint]]
    smoothness: NotRequired[SavedInterval | None]


@dataclass(frozen=True)
class Evaluation:
    """Everything `evaluate` found. Means are over images, with 95 % bootstrap intervals over images or groups.

    Attributes:
        about: model, removal, numbers of images and evaluations, seed, versions: what a reader must know.
        task: measures on all the data: `accuracy`, `cross_entropy`, `efficiency_gap`, ...
        methods: of each method, the mean of each measure.
        kernel_shap: KernelSHAP's relative L2 error with each budget, in evaluations.
        equivalents: of each method with a unit, the KernelSHAP budget that has its error.
        curves: of each method `insertion`, `deletion` (N + 1 points), `road_morf`, `road_lerf` (10 % to 90 % removed).
        notes: what could not be measured, and what to be careful with.
        cost_curve: of each method and budget the error and the cost, if they were asked for.
        smoothness: relative L2 error of the untrained gradient, `attribute(method="presence_gradient")`: a property of the
            model. 0 is a perfectly smooth game, in which the gradient is exact; None where it was not measured.
    """

    about: Mapping[str, Any]
    task: Mapping[str, Interval]
    methods: Mapping[str, Mapping[str, Interval]]
    kernel_shap: Mapping[int, Interval]
    equivalents: Mapping[str, Equivalent]
    curves: Mapping[str, Mapping[str, tuple[Interval, ...]]]
    notes: tuple[str, ...] = ()
    cost_curve: tuple[CostPoint, ...] = ()
    smoothness: Interval | None = None

    def check_whole(self) -> None:
        """Refuse what lacks a part that every evaluation has, or holds another thing in its place.

        Raises:
            FieldError: naming it.
        """
        trouble = fault(self.about, About, "about")
        trouble = trouble or (None if "shapadapter" in self.methods else "methods lacks 'shapadapter'")
        if trouble is not None:
            raise FieldError(f"This evaluation is incomplete: {trouble}. Run `shapadapter evaluate` again.")

    def table(self) -> str:
        """The results as text, 120 columns wide at most: blocks with a row for each method."""
        self.check_whole()
        return as_text(blocks(self), [self._headline(), summary(self.about)], self.notes)

    def markdown(self) -> str:
        """The same as Markdown tables."""
        self.check_whole()
        return as_markdown(blocks(self), [self._headline(), summary(self.about)], self.notes)

    def metrics(self) -> dict[str, float]:
        """What was measured of the one-pass attributions, as plain numbers by stable names.

        The task's measures, those of the methods (`error`, `spearman`, `insertion`, `deletion`, ...), `truth_error` and
        `equivalent_evaluations`, which ends at the smallest and the largest of the budgets: beyond them
        `equivalent_evaluations_is_bound` is 1, else 0. A measure that could not be taken is left out.
        """
        self.check_whole()
        means = {**self.task, **self.methods["shapadapter"]}
        found = {name: interval.mean for name, interval in means.items()}
        found["truth_error"] = float(self.about["truth_error"])
        if "shapadapter" in self.equivalents:
            found["equivalent_evaluations"] = float(self.equivalents["shapadapter"].evaluations)
            found["equivalent_evaluations_is_bound"] = float(self.equivalents["shapadapter"].bound != "=")
        return {name: value for name, value in found.items() if plain(value) is not None}

    def figure(self) -> Figure:
        """The curves with their bands as a matplotlib figure; see `shapadapter.visual.draw_curves`."""
        from shapadapter.visual import draw_curves

        return draw_curves(self.curves, value=str(self.about.get("curves_read")))

    def cost_figure(self) -> Figure:
        """Error against cost as a matplotlib figure; see `shapadapter.visual.draw_cost_curve`."""
        from shapadapter.visual import draw_cost_curve

        return draw_cost_curve(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and dicts, with None for what is not finite."""
        return {"format": FORMAT, "format_version": FORMAT_VERSION, **plain(asdict(self))}

    def save(self, path: str | Path) -> Path:
        """Write the result as one json file, which is never seen half-written; returns its path."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_together({path: json.dumps(self.to_dict(), indent=1).encode()})
        return path

    @classmethod
    def load(cls, path: str | Path) -> Evaluation:
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file is missing, damaged or of a newer version.
        """
        path = Path(path)
        found = read_json(path)
        if found.get("format") != FORMAT or found.get("format_version") != FORMAT_VERSION:
            written = f"format {shown(found.get('format'))} {shown(found.get('format_version'))}"
            raise CheckpointError(f"{path} is no evaluation that this version of shapadapter wrote: {written}.")
        checked(found, Saved, path)
        with reading(path):
            return cls(
                about=found["about"],
                task=_read(found["task"]),
                methods={name: _read(values) for name, values in found["methods"].items()},
                kernel_shap={int(budget): mean for budget, mean in _read(found["kernel_shap"]).items()},
                equivalents=_read(found["equivalents"], Equivalent),
                curves={
                    method: {name: tuple(_read(dict(enumerate(points))).values()) for name, points in lines.items()}
                    for method, lines in found["curves"].items()
                },
                notes=tuple(found["notes"]),
                cost_curve=tuple(_point(**point) for point in found.get("cost_curve", ())),
                smoothness=None if found.get("smoothness") is None else _interval(found["smoothness"]),
            )

    def _headline(self) -> str:
        """The most important numbers in a sentence."""
        own, found = self.methods["shapadapter"], self.equivalents.get("shapadapter")
        words = {"<": "fewer than ", "=": "", ">": "more than "}
        like = f", as KernelSHAP with {words[found.bound]}{round(found.evaluations)} evaluations" if found else ""
        parts = [f"relative L2 error {own['error'].mean:.2f}{like}"] if "error" in own else []
        parts += [f"{own['time'].mean:.1f} times the plain pass's time"] if "time" in own else []
        parts += [f"accuracy {self.task['accuracy'].mean:.3f}"] if "accuracy" in self.task else []
        return f"One pass: {'; '.join(parts)}." if parts else ""


def _point(error: Mapping[str, Any], errors: list[float | None], **others: Any) -> CostPoint:
    """A saved point of the cost curve."""
    return CostPoint(**others, errors=tuple(errors), error=_interval(error))


def _interval(saved: Mapping[str, Any]) -> Interval:
    return _read({"": saved})[""]


def _read(values: Mapping[Any, Mapping[str, Any]], kind: Any = Interval) -> dict[Any, Any]:
    """Saved intervals or equivalents by name; json has None for nan."""
    return {
        name: kind(**{key: math.nan if number is None else number for key, number in value.items()})
        for name, value in values.items()
    }
