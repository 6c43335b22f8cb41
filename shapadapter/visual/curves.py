"""Curves of an evaluation: what happens to the model's answer while players come or go, in the order of each method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from shapadapter.metrics import Interval

from .canvas import new_figure
from .styles import Style, styles

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PANELS = {
    "insertion": ("Insertion: most relevant first", "share of players present"),
    "deletion": ("Deletion: most relevant first", "share of players removed"),
    "road_morf": ("ROAD: most relevant imputed", "share of players imputed"),
    "road_lerf": ("ROAD: least relevant imputed", "share of players imputed"),
}
_FEW = 8  # images, whose interval is not worth a band


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
    kinds = [kind for kind in _PANELS if any(kind in lines for lines in curves.values())]
    if not kinds:
        raise ValueError(f"Expected curves of at least one of {', '.join(_PANELS)}, but found none.")
    across = 2 if len(kinds) == 4 else len(kinds)
    down = -(-len(kinds) // across)
    figure = new_figure(figsize=(4.2 * across, 0.4 + 3.4 * down), layout="constrained")
    for axes, kind in zip(figure.subplots(down, across, squeeze=False).flat, kinds, strict=True):
        for method, style in styles(list(curves)).items():
            if kind in curves[method]:
                _draw_line(axes, method, curves[method][kind], style, imputed=kind.startswith("road"))
        title, below = _PANELS[kind]
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
        parts.append(f"{_PANELS[kind][0]}, mean height of the curve: {', '.join(heights)}.")
    return " ".join(parts)


def _draw_line(axes: Any, method: str, points: Sequence[Interval], style: Style, imputed: bool) -> None:
    """One mean curve, with its band where that is of images enough."""
    count = len(points)
    place = np.arange(1, count + 1) / (count + 1) if imputed else np.linspace(0, 1, count)  # (points,)
    mean, low, high = (np.array([getattr(point, end) for point in points]) for end in ("mean", "low", "high"))
    dashes = (0, style.dashes) if style.dashes else "-"
    axes.plot(place, mean, color=style.colour, linestyle=dashes, linewidth=1.6, label=method)
    enough = all(point.count >= _FEW for point in points)
    if enough and np.isfinite(low).all() and np.isfinite(high).all():
        axes.fill_between(place, low, high, color=style.colour, alpha=0.15, linewidth=0)
