"""Measures of attributions as pure arithmetic: tensors in, one number per image or per vector out."""

import torch
from torch import Tensor


def efficiency_gap(attributions: Tensor, null_values: Tensor, logits: Tensor) -> Tensor:
    """How far null value and attributions are from summing to the logits: the largest gap over the classes.

    Args:
        attributions: (B, N, K) attribution of each of N players to each of K classes.
        null_values: (B, K) score with no player present.
        logits: (B, K) score with all players present.

    Returns:
        (B,) largest `|v(empty) + sum_n phi_n - v(all)|`, in the unit of the logits.
    """
    return (null_values + attributions.sum(dim=1) - logits).abs().amax(dim=-1)  # (B, K) -> (B,)


def relative_l2(estimate: Tensor, truth: Tensor) -> Tensor:
    """The relative error `|estimate - truth| / |truth|` of vectors along the last dimension.

    Args:
        estimate: (..., N) vectors.
        truth: (..., N) vectors.

    Returns:
        (...) without a unit: 0 is perfect, 1 as bad as all zeros; not finite where the truth is all zero.
    """
    return torch.linalg.vector_norm(estimate - truth, dim=-1) / torch.linalg.vector_norm(truth, dim=-1)


def pearson(estimate: Tensor, truth: Tensor) -> Tensor:
    """The correlation (Pearson) of vectors along the last dimension.

    Args:
        estimate: (..., N) vectors.
        truth: (..., N) vectors.

    Returns:
        (...) in -1 .. 1; nan where one of the vectors is constant.
    """
    estimate, truth = _centred(estimate), _centred(truth)
    lengths = torch.linalg.vector_norm(estimate, dim=-1) * torch.linalg.vector_norm(truth, dim=-1)  # (...)
    return ((estimate * truth).sum(dim=-1) / lengths).clamp(-1, 1)  # (..., N) -> (...)


def _centred(vectors: Tensor) -> Tensor:
    """Deviations from the mean along the last dimension, exactly zero for constant vectors."""
    vectors = vectors - vectors[..., :1]  # the mean of equal numbers may miss them by a rounding error
    return vectors - vectors.mean(dim=-1, keepdim=True)


def energy_inside(attributions: Tensor, inside: Tensor) -> Tensor:
    """The share of the positive attribution that lies inside a region: `sum phi+ * inside / sum phi+`.

    The energy-based pointing game (Wang et al. 2020) on players. Negative attributions are set aside first: in a
    signed sum they would cancel, and the share would have no bound. A map that knows nothing gets the share of the
    image that the region covers.

    Args:
        attributions: (..., rows, cols) attribution of each player to one class.
        inside: (..., rows, cols) share of each player's tile inside the region, 0 to 1
            (`grid.pixels_to_players` makes it from a pixel mask).

    Returns:
        (...) share in 0 .. 1; nan where no attribution is positive.

    Raises:
        ValueError: If the two are not on the same grid.
    """
    if attributions.shape[-2:] != inside.shape[-2:]:
        raise ValueError(
            f"attributions are on a grid of {tuple(attributions.shape[-2:])}, the region on one of "
            f"{tuple(inside.shape[-2:])}. Take a pixel mask through `grid.pixels_to_players` first."
        )
    positive = attributions.clamp(min=0)  # (..., rows, cols)
    return (positive * inside).sum(dim=(-2, -1)) / positive.sum(dim=(-2, -1))  # (..., rows, cols) -> (...)
