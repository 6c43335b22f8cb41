"""Measured numbers as curves and points: deletion and insertion, a training, predicted against true values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from shapadapter.core.statistics import Interval, pearson, relative_l2
from shapadapter.visual.canvas import new_figure
from shapadapter.visual.colors import FIRST, Floats, Style, styles

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


WIDTH, HEIGHT = 300, 160
_PANELS = {
    "insertion": ("Insertion, most relevant first", "share of patches present"),
    "deletion": ("Deletion, most relevant first", "share of patches removed"),
}
_FEW = 8  # images, whose interval is not worth a band


@dataclass(frozen=True)
class Line:
    """One curve: the method, the area below it as text, the path of the curve and that of its band, and how it is drawn."""

    method: str
    area: str
    path: str
    band: str
    colour: str
    width: float
    dashes: str


@dataclass(frozen=True)
class Chart:
    """One drawing, `WIDTH` x `HEIGHT`: heading, what is below, its curves, and what its lowest and highest number are."""

    title: str
    below: str
    lines: Sequence[Line]
    low: str
    high: str
    width: int = WIDTH
    height: int = HEIGHT


def charts(curves: Mapping[str, Mapping[str, Sequence[Interval]]]) -> list[Chart]:
    """The insertion and the deletion curves of an evaluation.

    Args:
        curves: By method and kind, `Evaluation.curves`, N + 1 points each.

    Returns:
        A chart for each kind that there is.
    """
    return [_chart(kind, curves) for kind in _PANELS if any(kind in lines for lines in curves.values())]


def _chart(kind: str, curves: Mapping[str, Mapping[str, Sequence[Interval]]]) -> Chart:
    found = {method: lines[kind] for method, lines in curves.items() if kind in lines}
    ends = [end for points in found.values() for point in points for end in _ends(point)]
    low, high = min(*ends, 0.0), max(ends)
    spread = (high - low) or 1.0
    looks = styles(list(curves))
    lines: list[Line] = []
    for method, points in found.items():
        lows, means, highs = (
            [1 - (value - low) / spread for value in side] for side in zip(*map(_ends, points), strict=True)
        )
        enough = all(point.count >= _FEW for point in points)
        width = 1.6 if lines else 2.4  # the first one is the one that the page is about
        dashes = " ".join(f"{width * length:.1f}" for length in looks[method].dashes) or "none"
        area = (sum(point.mean for point in points) - (points[0].mean + points[-1].mean) / 2) / (len(points) - 1)
        band = _path(lows) + _path(highs, back=True) + "Z" if enough else ""
        lines.append(Line(method, f"{area:.2f}", _path(means), band, looks[method].colour, width, dashes))
    return Chart(*_PANELS[kind], lines=lines, low=f"{low:.2g}", high=f"{high:.2g}")


def _ends(point: Interval) -> tuple[float, float, float]:
    """Low, mean and high; the mean where no interval is known."""
    known = point.low == point.low and point.high == point.high
    return (point.low, point.mean, point.high) if known else (point.mean,) * 3


def _path(heights: Sequence[float], back: bool = False) -> str:
    """A path through heights from 0, the top, to 1; the second half of a band goes back."""
    last = max(len(heights) - 1, 1)
    points = [f"{place / last * WIDTH:.1f} {height * HEIGHT:.1f}" for place, height in enumerate(heights)]
    return f"{'L' if back else 'M'}{'L'.join(reversed(points) if back else points)}"


_PANELS_OF_CURVES = {
    "insertion": ("Insertion: most relevant first", "share of players present"),
    "deletion": ("Deletion: most relevant first", "share of players removed"),
    "road_morf": ("ROAD: most relevant imputed", "share of players imputed"),
    "road_lerf": ("ROAD: least relevant imputed", "share of players imputed"),
}
_FEW_OF_CURVES = 8  # images, whose interval is not worth a band


def draw_curves(curves: Mapping[str, Mapping[str, Sequence[Interval]]], *, value: str = "probability") -> Figure:
    """Draw mean curves with their bands, a panel for each kind and a line for each method.

    Args:
        curves: by method and kind, `Evaluation.curves`; of insertion and deletion N + 1 points, of ROAD those from 10 % to
            90 %.
        value: what insertion and deletion follow, for the axis.

    Returns:
        The figure; nothing is shown.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is no curve to draw.
    """
    kinds = [kind for kind in _PANELS_OF_CURVES if any(kind in lines for lines in curves.values())]
    if not kinds:
        raise ValueError(f"Expected curves of at least one of {', '.join(_PANELS_OF_CURVES)}, but found none.")
    across = 2 if len(kinds) == 4 else len(kinds)
    down = -(-len(kinds) // across)
    figure = new_figure(figsize=(4.2 * across, 0.4 + 3.4 * down), layout="constrained")
    for axes, kind in zip(figure.subplots(down, across, squeeze=False).flat, kinds, strict=True):
        for method, style in styles(list(curves)).items():
            if kind in curves[method]:
                _draw_line(axes, method, curves[method][kind], style, imputed=kind.startswith("road"))
        title, below = _PANELS_OF_CURVES[kind]
        axes.set(title=title, xlabel=below, xlim=(0, 1))
        axes.set_ylim(bottom=min(axes.get_ylim()[0], 0.0))  # curves are compared by the area below them
        axes.set_ylabel(
            "share still predicted alike" if kind.startswith("road") else f"{value} of the explained class"
        )
        axes.spines[["top", "right"]].set_visible(False)
    drawn = {str(line.get_label()): line for axes in figure.axes for line in axes.lines}
    figure.legend(list(drawn.values()), list(drawn), loc="outside lower center", ncols=6, fontsize=8, frameon=False)
    figure.alt_text = _in_words(curves, kinds)
    return figure


def _in_words(curves: Mapping[str, Mapping[str, Sequence[Interval]]], kinds: Sequence[str]) -> str:
    """The mean height of each curve."""
    parts = []
    for kind in kinds:
        heights = [
            f"{method} {sum(point.mean for point in lines[kind]) / len(lines[kind]):.2f}"
            for method, lines in curves.items()
            if kind in lines
        ]
        parts.append(f"{_PANELS_OF_CURVES[kind][0]}, mean height of the curve: {', '.join(heights)}.")
    return " ".join(parts)


def _draw_line(axes: Any, method: str, points: Sequence[Interval], style: Style, imputed: bool) -> None:
    """One mean curve, with its band where that is of images enough."""
    count = len(points)
    place = np.arange(1, count + 1) / (count + 1) if imputed else np.linspace(0, 1, count)  # (points,)
    mean, low, high = (np.array([getattr(point, end) for point in points]) for end in ("mean", "low", "high"))
    dashes = (0, style.dashes) if style.dashes else "-"
    axes.plot(place, mean, color=style.colour, linestyle=dashes, linewidth=1.6, label=method)
    enough = all(point.count >= _FEW_OF_CURVES for point in points)
    if enough and np.isfinite(low).all() and np.isfinite(high).all():
        axes.fill_between(place, low, high, color=style.colour, alpha=0.15, linewidth=0)


_PANELS_OF_HISTORY = {
    "task_loss": "Task loss",
    "shapley_loss": "Shapley loss",
    "coalition_fit": "Coalition fit",
    "accuracy": "Accuracy",
}
_HELD_OUT = "#0b2e57"


def draw_history(log_history: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw what a training logged, a panel each for task loss, Shapley loss, coalition fit and accuracy.

    A line is what was logged on the way, the mean since the last log; circles are evaluations on held-out data. What was
    not logged has no panel. A loss that falls more than tenfold has a logarithmic axis.

    Args:
        log_history: `trainer.state.log_history`, or the list of that name in a checkpoint's `trainer_state.json`.

    Returns:
        A figure that belongs to no window.

    Raises:
        ImportError: If matplotlib is missing.
        ValueError: If nothing of this was logged.
    """
    found = {name: (_points(log_history, name), _points(log_history, f"eval_{name}")) for name in _PANELS_OF_HISTORY}
    shown = {name: lines for name, lines in found.items() if any(lines)}
    if not shown:
        raise ValueError(
            f"Expected log_history of a ShapleyTrainer with at least one of {', '.join(_PANELS_OF_HISTORY)}, but found none: "
            "train with logging_steps=10, say."
        )
    figure = new_figure(figsize=(3.1 * len(shown), 3.1), layout="constrained")
    for axes, (name, (way, held_out)) in zip(
        figure.subplots(1, len(shown), squeeze=False, sharex=True)[0], shown.items(), strict=True
    ):
        if way:
            axes.plot(*zip(*way, strict=True), color=FIRST, linewidth=1.4, label="training")
        if held_out:
            style = {"marker": "o", "markersize": 4, "linestyle": "--", "linewidth": 1.0, "color": _HELD_OUT}
            axes.plot(*zip(*held_out, strict=True), label="held-out", **style)
        axes.set(title=_PANELS_OF_HISTORY[name], xlabel="step")
        axes.spines[["top", "right"]].set_visible(False)
        _scale(axes, name, [value for _, value in (*way, *held_out)])
    drawn = {str(line.get_label()): line for axes in figure.axes for line in axes.lines}
    figure.legend(list(drawn.values()), list(drawn), loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    figure.alt_text = (
        f"Training history. {' '.join(_in_words_of_history(name, *lines) for name, lines in shown.items())}"
    )
    return figure


def _points(log_history: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    """Step and value of each log that has one, finite ones only."""
    pairs = [(float(row["step"]), float(row[name])) for row in log_history if "step" in row and name in row]
    return [pair for pair in pairs if math.isfinite(pair[1])]


def _scale(axes: Axes, name: str, values: Sequence[float]) -> None:
    if name == "accuracy":
        axes.set_ylim(min(0.0, *values), 1.02)
    elif name == "coalition_fit":
        # 1 is perfect; the first steps may be far below 0, and must not flatten all others.
        axes.set_ylim(max(min(0.0, *values), -1.0) - 0.03, 1.02)
    elif min(values) > 0 and max(values) > 10 * min(values):
        # Here, not above: matplotlib is an extra.
        from matplotlib.ticker import LogLocator, NullFormatter

        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())


def _in_words_of_history(
    name: str, way: Sequence[tuple[float, float]], held_out: Sequence[tuple[float, float]]
) -> str:
    parts = [
        f"{where} from {points[0][1]:.3g} to {points[-1][1]:.3g}"
        for where, points in (("in training", way), ("held-out", held_out))
        if points
    ]
    return f"{_PANELS_OF_HISTORY[name]}: {', '.join(parts)}."


_MANY = 3000
"""Points that hide each other; more are counted in hexagons."""


def draw_scatter(predicted: npt.ArrayLike, true: npt.ArrayLike) -> Figure:
    """Draw predicted against true Shapley values, a point for each patch of each image.

    The diagonal is where they agree. The correlation of all points together also rewards knowing which images have large
    values; so the mean of the correlations within the images stands beside it, with the relative L2 error.

    Args:
        predicted: (B, ...) numbers, the first dimension the images, such as `Explanation.for_label` gives.
        true: Numbers of the same shape, such as those of `PatchGame`, or of `explain` with a large `refine`.

    Returns:
        A figure that belongs to no window.

    Raises:
        ImportError: If matplotlib is missing.
        ValueError: If the shapes differ, there are fewer than two numbers, or one is NaN or infinite.
    """
    along, up = (np.asarray(values, dtype=np.float64) for values in (true, predicted))
    if along.shape != up.shape or along.ndim < 1 or along.size < 2:
        raise ValueError(
            "Expected predicted and true values (B, ...) of one shape, at least two of them, but got shapes "
            f"{up.shape} and {along.shape}."
        )
    if not (np.isfinite(along).all() and np.isfinite(up).all()):
        raise ValueError("Expected finite numbers to draw, but some are NaN or infinite.")
    figure = new_figure(figsize=(4.4, 4.6), layout="constrained")
    axes = figure.add_subplot(aspect="equal", xlabel="true Shapley value", ylabel="predicted Shapley value")
    _draw_points(axes, along.ravel(), up.ravel())
    said = _agreement(torch.from_numpy(up), torch.from_numpy(along))
    axes.set_title("\n".join(said), fontsize=9)
    figure.alt_text = f"Scatter of predicted against true Shapley values: {'; '.join(said)}."
    return figure


def _draw_points(axes: Axes, along: Floats, up: Floats) -> None:
    """Draw the points (P,), zero and the diagonal, on axes of one scale."""
    low, high = min(along.min(), up.min()), max(along.max(), up.max())
    room = 0.05 * (high - low) or 1.0
    ends = (low - room, high + room)
    axes.set(xlim=ends, ylim=ends)
    axes.spines[["top", "right"]].set_visible(False)
    for line in (axes.axhline, axes.axvline):
        line(0, color="0.85", linewidth=0.8, zorder=0)
    axes.plot(ends, ends, color="0.35", linewidth=0.9, linestyle="--", zorder=3)
    if along.size > _MANY:
        box = (low - room, high + room, low - room, high + room)
        grid = axes.hexbin(along, up, gridsize=45, extent=box, bins="log", cmap="Greys", mincnt=1)
        axes.get_figure().colorbar(grid, ax=axes, shrink=0.7, label="patches")  # type: ignore[union-attr]
    else:
        axes.scatter(along, up, s=14 if along.size < 600 else 7, color=FIRST, alpha=0.45, linewidths=0, zorder=2)


def _agreement(predicted: torch.Tensor, true: torch.Tensor) -> list[str]:
    every = float(pearson(predicted.flatten(), true.flatten()))
    lines = [f"{true.numel()} patches, Pearson r = {_written(every)}"]
    if true.ndim > 1:
        left, right = predicted.flatten(1), true.flatten(1)  # (B, ...) -> (B, N)
        within, errors = pearson(left, right), relative_l2(left, right)  # (B,) each
        known = errors[errors.isfinite()]
        lines[0] = f"{len(true)} {'image' if len(true) == 1 else 'images'}, {lines[0]}"
        lines.append(
            f"within an image r = {_written(float(within.nanmean()))}, "
            f"relative error {_written(float(known.mean()))} (means)"
        )
    return lines


def _written(value: float) -> str:
    return "undefined" if np.isnan(value) else f"{value:.2f}"
