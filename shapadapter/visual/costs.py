"""Error against cost, on logarithmic axes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from shapadapter.visual.canvas import new_figure
from shapadapter.visual.charts import Style
from shapadapter.visual.maps import RED

if TYPE_CHECKING:
    from shapadapter.evaluation import CostPoint, Evaluation

_OURS = "#{:02x}{:02x}{:02x}".format(*RED)
_STYLES = {
    "shapadapter": Style(_OURS, ()),
    "gradient": Style(_OURS, ()),
    "refined": Style(_OURS, ()),
    "presence_gradient": Style("#737373", ()),
    "kernel_shap": Style("#0072b2", (6.4, 1.6, 1, 1.6)),
    "permutation": Style("#009e73", (7, 1.5)),
}
_OTHER = Style("#cc79a7", (1, 1.65))
_EXACT = 1e-5  # relative error; what is left is rounding, and would stretch a logarithmic axis
_WORST = 2.0  # all zeros have an error of 1; near as many pairs as players that of KernelSHAP goes far beyond
_APART = 0.055  # share of the height that two labels at one place keep between them


def draw_cost_curve(evaluation: Evaluation) -> Figure:
    """Draw the error of the attributions against what they cost, a line or a point for each method.

    Both axes are logarithmic: the error of sampling falls in a straight line, four times the cost for half the error. Bars are
    95 % intervals over the images. What is exact has no place on such an axis, and is left out.

    Args:
        evaluation: Of `evaluate(..., cost_curve=True)`; its `cost_curve` is drawn, and the error of its truth, below which
            nothing can be measured.

    Returns:
        The figure; nothing is shown.

    Raises:
        ValueError: If the evaluation has no cost curve, or all of it is exact.
    """
    points = [point for point in evaluation.cost_curve if point.error.mean > _EXACT]
    if not points:
        raise ValueError(
            "Expected an evaluation with a cost curve, but it has none, or only exact values: evaluate(..., cost_curve=True)."
        )
    lines: dict[str, list[CostPoint]] = {}
    for point in points:
        lines.setdefault(point.method, []).append(point)
    figure = new_figure(figsize=(6.6, 4.4), layout="constrained")
    axes = figure.add_subplot(xscale="log", yscale="log")
    for method, line in lines.items():
        _draw_way(axes, _STYLES.get(method, _OTHER), line)
    _frame(axes, points, evaluation.about)
    _label_ends(axes, [(line[-1], _STYLES.get(method, _OTHER).color) for method, line in lines.items()])
    figure.alt_text = " ".join(["Relative L2 error against forward passes.", *map(_said, lines.values())])
    return figure


def _draw_way(axes: Axes, style: Style, line: Sequence[CostPoint]) -> None:
    """Points with their bars, joined where there are several."""
    costs, errors = [point.passes for point in line], [point.error.mean for point in line]
    dashes: Any = (0, style.dashes) if style.dashes else "-"
    axes.plot(costs, errors, color=style.color, linestyle=dashes, linewidth=1.6, marker="o", markersize=5)
    for point in line:
        low, high = point.error.low, point.error.high
        if math.isfinite(low) and math.isfinite(high):
            axes.plot([point.passes] * 2, [max(low, _EXACT), high], color=style.color, linewidth=1.2, alpha=0.6)


def _frame(axes: Axes, points: Sequence[CostPoint], about: Mapping[str, Any]) -> None:
    """Axes, with room for labels on the right, and the truth's own error."""
    axes.set(xlabel="cost, in forward passes of the image (measured time)", ylabel="relative L2 error")
    axes.set_ylim(top=min(axes.get_ylim()[1], _WORST))
    costs = [point.passes for point in points]
    axes.set_xlim(min(costs) / 1.5, max(costs) * (max(costs) / min(costs)) ** 0.35 * 1.5)
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.spines[["top", "right"]].set_visible(False)
    truth = about.get("truth_error") or 0.0
    if truth > _EXACT:
        axes.axhline(truth, color="0.6", linewidth=0.8, linestyle=":", zorder=0)
        place: dict[str, Any] = {
            "transform": axes.get_yaxis_transform(),
            "fontsize": 7,
            "color": "0.4",
            "va": "bottom",
        }
        axes.text(0.01, truth, "error of the truth itself", **place)


def _label_ends(axes: Axes, ends: Sequence[tuple[CostPoint, str]]) -> None:
    """The name of each method, to the right of its last point; labels at one place are moved apart."""
    to_share = axes.transAxes.inverted()
    places = [(*to_share.transform(axes.transData.transform((p.passes, p.error.mean))), p, color) for p, color in ends]
    taken: list[tuple[float, float]] = []
    for x, y, point, color in sorted(places, key=lambda place: place[1]):
        while near := [other for at, other in taken if abs(at - x) < 0.25 and abs(other - y) < _APART * 0.999]:
            y = max(near) + _APART
        taken.append((x, y))
        right = max(other for other, *_ in places if abs(other - x) < 0.06)  # ends that nearly meet, in one column
        style: dict[str, Any] = {"transform": axes.transAxes, "color": color, "fontsize": 9, "va": "center"}
        box = {"facecolor": axes.get_facecolor(), "alpha": 0.8, "linewidth": 0, "pad": 1.0}
        axes.text(right + 0.018, y, point.label, bbox=box, zorder=5, **style)


def _said(line: Sequence[CostPoint]) -> str:
    steps = ", ".join(f"{point.error.mean:.2g} at {point.passes:.3g}" for point in line)
    return f"{line[0].label}: {steps}."
