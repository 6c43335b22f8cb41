"""How a training went: its losses, the fit of the coalitions, the accuracy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .canvas import new_figure
from .styles import FIRST

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PANELS = {
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
    found = {name: (_points(log_history, name), _points(log_history, f"eval_{name}")) for name in _PANELS}
    shown = {name: lines for name, lines in found.items() if any(lines)}
    if not shown:
        raise ValueError(
            f"Expected log_history of a ShapleyTrainer with at least one of {', '.join(_PANELS)}, but found none: "
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
        axes.set(title=_PANELS[name], xlabel="step")
        axes.spines[["top", "right"]].set_visible(False)
        _scale(axes, name, [value for _, value in (*way, *held_out)])
    drawn = {str(line.get_label()): line for axes in figure.axes for line in axes.lines}
    figure.legend(list(drawn.values()), list(drawn), loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    figure.alt_text = f"Training history. {' '.join(_in_words(name, *lines) for name, lines in shown.items())}"
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


def _in_words(name: str, way: Sequence[tuple[float, float]], held_out: Sequence[tuple[float, float]]) -> str:
    parts = [
        f"{where} from {points[0][1]:.3g} to {points[-1][1]:.3g}"
        for where, points in (("in training", way), ("held-out", held_out))
        if points
    ]
    return f"{_PANELS[name]}: {', '.join(parts)}."
