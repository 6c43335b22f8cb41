"""How near maps are to the true Shapley values."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from shapadapter.core.statistics import pearson, relative_l2, spearman, top_k_overlap


def agreement(maps: Tensor, truth: Tensor, units: Sequence[bool]) -> dict[str, Tensor]:
    """Distance and likeness of maps (B, methods, N) to the truth (B, N), (B, methods) each.

    Args:
        maps: of every method.
        truth: Shapley values.
        units: whether each method speaks of the value; an error in the value's unit means nothing for the others.
    """
    true = truth[:, None]  # (B, 1, N)
    error = relative_l2(maps, true).masked_fill(~torch.tensor(units, device="cpu"), torch.nan)  # (B, methods)
    return {
        "error": error,
        "pearson": informed(pearson(maps, true), maps),
        "spearman": informed(spearman(maps, true), maps),
        "top_k_overlap": top_k_overlap(maps, true, top_count(truth.shape[-1])),
    }


def informed(correlation: Tensor, maps: Tensor) -> Tensor:
    """Correlations (B, methods), 0 where the map (B, methods, N) is constant.

    A map that is the same everywhere has said nothing. Left out of the mean, the images on which a method fails would
    raise its score.
    """
    constant = maps.amax(dim=-1) == maps.amin(dim=-1)  # (B, methods)
    return correlation.masked_fill(constant & correlation.isnan(), 0.0)


def top_count(players: int) -> int:
    """How many players are the top: a tenth, rounded up."""
    return math.ceil(players / 10)
