"""Measures of attributions as pure arithmetic: tensors in, one number per image or per vector out."""

import torch
from torch import Tensor


def relative_l2(estimate: Tensor, truth: Tensor) -> Tensor:
    """The relative error `|estimate - truth| / |truth|` of vectors along the last dimension.

    Args:
        estimate: (..., N) vectors.
        truth: (..., N) vectors.

    Returns:
        (...) without a unit: 0 is perfect, 1 as bad as all zeros; not finite where the truth is all zero.
    """
    return torch.linalg.vector_norm(estimate - truth, dim=-1) / torch.linalg.vector_norm(truth, dim=-1)


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
