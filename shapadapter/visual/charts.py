"""Measured numbers as curves and points: deletion and insertion, a training, predicted against true values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from shapadapter.core.statistics import Interval, pearson, relative_l2
from shapadapter.visual.canvas import DescribedFigure, new_figure
from shapadapter.visual.maps import RED, Floats

Curves = Mapping[str, Mapping[str, Sequence[Interval]]]
"""By method and kind, as `Evaluation.curves`."""

_PANELS = {
    "insertion": ("Insertion: most relevant first", "share of players present"),
    "deletion": ("Deletion: most relevant first", "share of players removed"),
    "road_morf": ("ROAD: most relevant imputed", "share of players imputed"),
    "road_lerf": ("ROAD: least relevant imputed", "share of players imputed"),
}
_ENOUGH = 8  # images; the interval of fewer is not worth a band

Dashes = tuple[float, ...]


@dataclass(frozen=True)
class Style:
    """A color such as `#ff0d57`, and lengths of dashes and gaps in widths of the line, none for a solid one."""

    color: str
    dashes: Dashes


_FIRST, _HELD_OUT = "#{:02x}{:02x}{:02x}".format(*RED), "#0b2e57"
_KNOWN = {
    "shapadapter": Style(_FIRST, ()),
    "random": Style("#737373", (3.7, 1.6)),
    "centre": Style("#b3b3b3", (2, 3)),
}
# Okabe and Ito's colors for readers who see few, without those near the red, and without yellow and black: the one
# cannot be seen on a white page, the other not on a dark one.
_COLORS = ("#0072b2", "#e69f00", "#009e73", "#56b4e9", "#cc79a7")
_DASHES: tuple[Dashes, ...] = ((6.4, 1.6, 1, 1.6), (1, 1.65), (7, 1.5), (4, 1, 1, 1, 1, 1))


def _styles(methods: Sequence[str]) -> dict[str, Style]:
    """A style for each method; dashes differ, too, for prints in gray. Methods that know nothing of the model are gray."""
    # Of 5 colors and 4 dashes, each with its neighbor, 20 methods differ.
    others = map(Style, cycle(_COLORS), cycle(_DASHES))
    return {name: _KNOWN.get(name) or next(others) for name in methods}


# -- curves of an evaluation, on a page and as a figure ----------------------------------------------------------------


_WIDTH, _HEIGHT = 300, 160


def page_charts(curves: Curves) -> list[dict[str, Any]]:
    """The insertion and the deletion curves of an evaluation, of N + 1 points each, those that there are.

    Of each the heading, what is below, the lowest and highest number, and its lines: the area below a curve as text, its
    path, that of its band, and how it is drawn.
    """
    kinds = ("insertion", "deletion")
    return [_page_chart(kind, curves) for kind in kinds if any(kind in lines for lines in curves.values())]


def _page_chart(kind: str, curves: Curves) -> dict[str, Any]:
    found = {method: lines[kind] for method, lines in curves.items() if kind in lines}
    ends = [end for points in found.values() for point in points for end in _ends(point)]
    low, high = min(*ends, 0.0), max(ends)
    spread = (high - low) or 1.0
    looks, lines = _styles(list(curves)), list[dict[str, Any]]()
    for method, points in found.items():
        lows, means, highs = (
            [1 - (value - low) / spread for value in side] for side in zip(*map(_ends, points), strict=True)
        )
        width = 1.6 if lines else 2.4  # the first one is the one that the page is about
        area = (sum(point.mean for point in points) - (points[0].mean + points[-1].mean) / 2) / (len(points) - 1)
        enough = all(point.count >= _ENOUGH for point in points)
        lines.append(
            {
                "method": method,
                "area": f"{area:.2f}",
                "path": f"M{_path(means)}",
                "band": f"M{_path(lows)}L{_path(highs, back=True)}Z" if enough else "",
                "color": looks[method].color,
                "width": width,
                "dashes": " ".join(f"{width * length:.1f}" for length in looks[method].dashes) or "none",
            }
        )
    title, below = _PANELS[kind]
    size, numbers = {"width": _WIDTH, "height": _HEIGHT}, {"low": f"{low:.2g}", "high": f"{high:.2g}"}
    return {"title": title, "below": below, "lines": lines, **numbers, **size}


def _ends(point: Interval) -> tuple[float, float, float]:
    """Low, mean and high; the mean where no interval is known."""
    known = math.isfinite(point.low) and math.isfinite(point.high)
    return (point.low, point.mean, point.high) if known else (point.mean,) * 3


def _path(heights: Sequence[float], back: bool = False) -> str:
    """Points through heights from 0, the top, to 1; the second half of a band goes back."""
    last = max(len(heights) - 1, 1)
    points = [f"{place / last * _WIDTH:.1f} {height * _HEIGHT:.1f}" for place, height in enumerate(heights)]
    return "L".join(reversed(points) if back else points)


def draw_curves(curves: Curves, *, value: str = "probability") -> Figure:
    """Draw mean curves with their bands, a panel for each kind and a line for each method.

    Args:
        curves: By method and kind, `Evaluation.curves`; of insertion and deletion N + 1 points, of ROAD those from 10 % to
            90 %.
        value: What insertion and deletion follow, for the axis.

    Returns:
        The figure; nothing is shown.

    Raises:
        ValueError: If there is no curve to draw.
    """
    kinds = [kind for kind in _PANELS if any(kind in lines for lines in curves.values())]
    if not kinds:
        raise ValueError(f"Expected curves of at least one of {', '.join(_PANELS)}, but found none.")
    across = 2 if len(kinds) == 4 else len(kinds)
    down = -(-len(kinds) // across)
    figure = new_figure(figsize=(4.2 * across, 0.4 + 3.4 * down), layout="constrained")
    said = []
    for axes, kind in zip(figure.subplots(down, across, squeeze=False).flat, kinds, strict=True):
        imputed, (title, below) = kind.startswith("road"), _PANELS[kind]
        for method, style in _styles(list(curves)).items():
            if kind in curves[method]:
                _draw_line(axes, method, curves[method][kind], style, imputed)
        axes.set(title=title, xlabel=below, xlim=(0, 1))
        axes.set_ylim(bottom=min(axes.get_ylim()[0], 0.0))  # curves are compared by the area below them
        axes.set_ylabel("share still predicted alike" if imputed else f"{value} of the explained class")
        axes.spines[["top", "right"]].set_visible(False)
        found = {method: lines[kind] for method, lines in curves.items() if kind in lines}
        heights = [f"{name} {sum(p.mean for p in points) / len(points):.2f}" for name, points in found.items()]
        said.append(f"{title}, mean height of the curve: {', '.join(heights)}.")
    _draw_legend(figure, 6)
    figure.alt_text = " ".join(said)
    return figure


def _draw_line(axes: Axes, method: str, points: Sequence[Interval], style: Style, imputed: bool) -> None:
    """One mean curve, with its band where that is of images enough."""
    count = len(points)
    place = np.arange(1, count + 1) / (count + 1) if imputed else np.linspace(0, 1, count)  # (points,)
    mean, low, high = (np.array([getattr(point, end) for point in points]) for end in ("mean", "low", "high"))
    dashes: Any = (0, style.dashes) if style.dashes else "-"
    axes.plot(place, mean, color=style.color, linestyle=dashes, linewidth=1.6, label=method)
    enough = all(point.count >= _ENOUGH for point in points)
    if enough and np.isfinite(low).all() and np.isfinite(high).all():
        axes.fill_between(place, low, high, color=style.color, alpha=0.15, linewidth=0)


def _draw_legend(figure: DescribedFigure, columns: int) -> None:
    """One for all panels."""
    drawn = {str(line.get_label()): line for axes in figure.axes for line in axes.lines}
    figure.legend(
        list(drawn.values()), list(drawn), loc="outside lower center", ncols=columns, fontsize=8, frameon=False
    )


# -- a training ------------------------------------------------------------------------------------------------------

_LOGGED = {
    "task_loss": "Task loss",
    "shapley_loss": "Shapley loss",
    "coalition_fit": "Coalition fit",
    "accuracy": "Accuracy",
}


def draw_history(log_history: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw what a training logged, a panel each for task loss, Shapley loss, coalition fit and accuracy.

    A line is what was logged on the way, the mean since the last log; circles are evaluations on held-out data. What was
    not logged has no panel. A loss that falls more than tenfold has a logarithmic axis.

    Args:
        log_history: `trainer.state.log_history`, or the list of that name in a checkpoint's `trainer_state.json`.

    Returns:
        A figure that belongs to no window.

    Raises:
        ValueError: If nothing of this was logged.
    """
    found = {name: (_points(log_history, name), _points(log_history, f"eval_{name}")) for name in _LOGGED}
    shown = {name: lines for name, lines in found.items() if any(lines)}
    if not shown:
        raise ValueError(
            f"Expected log_history of a ShapleyTrainer with at least one of {', '.join(_LOGGED)}, but found none: train "
            "with logging_steps=10, say."
        )
    figure = new_figure(figsize=(3.1 * len(shown), 3.1), layout="constrained")
    panels = figure.subplots(1, len(shown), squeeze=False, sharex=True)[0]
    said = []
    for axes, (name, (way, held_out)) in zip(panels, shown.items(), strict=True):
        style: dict[str, Any] = {"marker": "o", "markersize": 4, "linestyle": "--", "linewidth": 1.0}
        if way:
            axes.plot(*zip(*way, strict=True), color=_FIRST, linewidth=1.4, label="training")
        if held_out:
            axes.plot(*zip(*held_out, strict=True), color=_HELD_OUT, label="held-out", **style)
        axes.set(title=_LOGGED[name], xlabel="step")
        axes.spines[["top", "right"]].set_visible(False)
        _scale(axes, name, [value for _, value in (*way, *held_out)])
        parts = [
            f"{where} from {points[0][1]:.3g} to {points[-1][1]:.3g}"
            for where, points in (("in training", way), ("held-out", held_out))
            if points
        ]
        said.append(f"{_LOGGED[name]}: {', '.join(parts)}.")
    _draw_legend(figure, 2)
    figure.alt_text = f"Training history. {' '.join(said)}"
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
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())


# -- predicted against true values ------------------------------------------------------------------------------------

_MANY = 3000  # points hide each other; more are counted in hexagons


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
        grid = axes.hexbin(along, up, gridsize=45, extent=(*ends, *ends), bins="log", cmap="Greys", mincnt=1)
        axes.get_figure().colorbar(grid, ax=axes, shrink=0.7, label="patches")  # type: ignore[union-attr]
    else:
        axes.scatter(along, up, s=14 if along.size < 600 else 7, color=_FIRST, alpha=0.45, linewidths=0, zorder=2)


def _agreement(predicted: torch.Tensor, true: torch.Tensor) -> list[str]:
    """How well they agree, in lines."""

    def written(value: torch.Tensor) -> str:
        return "undefined" if value.isnan() else f"{value:.2f}"

    lines = [f"{true.numel()} patches, Pearson r = {written(pearson(predicted.flatten(), true.flatten()))}"]
    if true.ndim > 1:
        left, right = predicted.flatten(1), true.flatten(1)  # (B, ...) -> (B, N)
        within, errors = pearson(left, right), relative_l2(left, right)  # (B,) each
        error = errors[errors.isfinite()].mean()
        lines[0] = f"{len(true)} {'image' if len(true) == 1 else 'images'}, {lines[0]}"
        lines.append(f"within an image r = {written(within.nanmean())}, relative error {written(error)} (means)")
    return lines
