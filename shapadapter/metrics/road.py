"""ROAD's imputation: removed pixels are filled in so that the mask itself tells nothing (Rong et al. 2022)."""

import torch
from torch import Tensor

DIRECT, DIAGONAL = 1 / 6, 1 / 12
"""The weights of a pixel's four direct and four diagonal neighbours; together they are 1."""


def noisy_linear_imputation(images: Tensor, absent: Tensor, generator: torch.Generator, noise: float = 0.01) -> Tensor:
    """Replace absent pixels by the weighted mean of their neighbours, all at once, and add a little noise.

    Each absent pixel is 1/6 of its direct plus 1/12 of its diagonal neighbours, absent ones included: one linear
    system per image, solved exactly. At the border the weights of the neighbours that exist are scaled up to 1.
    The system is solved row by row of pixels: memory `8 H W^2` bytes per image, 90 MB at 224 x 224.

    Args:
        images: (B, C, H, W) pixels, of any floating type.
        absent: (B, H, W) bool, True = to be replaced.
        generator: Source of the noise.
        noise: Standard deviation of the noise, in the unit of the pixels as they are given.

    Returns:
        (B, C, H, W) of the type of the images: present pixels unchanged, absent ones imputed.

    Raises:
        ValueError: If the shapes do not fit, or an image has no present pixel to start from.
    """
    if images.ndim != 4 or absent.shape != images.shape[:1] + images.shape[2:]:
        raise ValueError(
            f"expected images (B, C, H, W) and absent (B, H, W), got {tuple(images.shape)} and {tuple(absent.shape)}."
        )
    if bool(absent.flatten(1).all(dim=1).any()):
        raise ValueError("an image without a present pixel cannot be imputed: leave at least one in `absent`.")
    imputed = _solve(images.double(), absent)  # (B, C, H, W)
    disturbance = torch.randn(images.shape, generator=generator, device=generator.device)  # (B, C, H, W)
    imputed = (imputed + noise * disturbance.to(images.device)).to(images.dtype)
    return torch.where(absent[:, None], imputed, images)  # (B, 1, H, W), (B, C, H, W) -> (B, C, H, W)


def _solve(images: Tensor, absent: Tensor) -> Tensor:
    """Solve for all pixels: (B, C, H, W) float64, (B, H, W) -> (B, C, H, W).

    The unknowns are the pixels; the equation of a present one is `x = its value`. Only neighbouring rows share
    equations, so the matrix is block tridiagonal, and it is symmetric positive definite: rows of pixels are
    eliminated from the first to the last by a Cholesky factor each, then solved from the last to the first.
    """
    known = torch.where(absent[:, None], 0, images)  # (B, C, H, W)
    present_sums, weight_sums = _weighted_neighbours(known), _weighted_neighbours(torch.ones_like(known[:1, :1]))
    rights = torch.where(absent[:, None], present_sums, known).permute(2, 0, 3, 1)  # (B, C, H, W) -> (H, B, W, C)
    diagonals = torch.where(absent, weight_sums[0], 1).transpose(0, 1)  # (1, H, W), (B, H, W) -> (H, B, W)
    rows = absent.double().transpose(0, 1)  # (B, H, W) -> (H, B, W), 1 = absent
    within, between = _row_weights(known)  # (W, W)

    links: list[Tensor] = []  # (B, W, W): how a row depends on the next one
    parts: list[Tensor] = []  # (B, W, C): what a row is where the next one is zero
    for place, (row, diagonal, right) in enumerate(zip(rows, diagonals, rights, strict=True)):
        block = torch.diag_embed(diagonal) - within * row[:, :, None] * row[:, None, :]  # (B, W) -> (B, W, W)
        if place:
            above = between * row[:, :, None] * rows[place - 1][:, None, :]  # (B, W, W)
            block, right = block - above @ links[-1], right + above @ parts[-1]  # (B, W, W), (B, W, C)
        factor = torch.linalg.cholesky(block)  # (B, W, W)
        parts.append(torch.cholesky_solve(right, factor))  # (B, W, C)
        if place + 1 < len(rows):
            below = between * row[:, :, None] * rows[place + 1][:, None, :]  # (B, W, W)
            links.append(torch.cholesky_solve(below, factor))  # (B, W, W)

    solved = [parts.pop()]  # (B, W, C), the last row
    while parts:
        solved.append(parts.pop() + links.pop() @ solved[-1])  # (B, W, C) + (B, W, W) @ (B, W, C)
    return torch.stack(solved[::-1], dim=1).permute(0, 3, 1, 2)  # (B, H, W, C) -> (B, C, H, W)


def _row_weights(like: Tensor) -> tuple[Tensor, Tensor]:
    """The weights between the pixels of one row, and between those of two neighbouring rows: (W, W) each."""
    width = like.shape[-1]
    same = torch.eye(width, dtype=like.dtype, device=like.device)  # (W, W)
    beside = torch.ones_like(same).tril(1).triu(-1) - same  # (W, W)
    return DIRECT * beside, DIRECT * same + DIAGONAL * beside


def _weighted_neighbours(images: Tensor) -> Tensor:
    """The weighted sum of each pixel's neighbours, zero outside the image: (B, C, H, W) -> (B, C, H, W)."""
    kernel = torch.tensor(
        [[DIAGONAL, DIRECT, DIAGONAL], [DIRECT, 0, DIRECT], [DIAGONAL, DIRECT, DIAGONAL]],
        dtype=images.dtype,
        device=images.device,
    )  # (3, 3)
    single = images.flatten(0, 1)[:, None]  # (B, C, H, W) -> (B C, 1, H, W)
    return torch.nn.functional.conv2d(single, kernel[None, None], padding=1).view_as(images)
