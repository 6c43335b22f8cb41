"""Predicted against true Shapley values, patch by patch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from shapadapter.metrics import pearson, relative_l2

from .canvas import new_figure
from .maps import Floats
from .styles import FIRST

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
