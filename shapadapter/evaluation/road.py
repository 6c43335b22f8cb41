"""ROAD (remove and debias): removed pixels are imputed so that the mask itself tells nothing (Rong et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from shapadapter.core.statistics import generator_of
from shapadapter.evaluation.compared import image_of
from shapadapter.evaluation.games import Games

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


SHARES = tuple(percent / 100 for percent in range(10, 100, 10))
"""Of the players, removed."""

_BYTES = 512 * 2**20
"""What imputation may use of memory at a time."""


def road(games: Games, order: Tensor, indices: Sequence[int], seed: int) -> Tensor | None:
    """Whether the model still predicts the explained class, 1 or 0, while players are imputed.

    Args:
        games: of B images.
        order: (B, methods, N), the players from the most relevant down.
        indices: (B,) the images' places in the data set.
        seed: of the noise in imputed pixels.

    Returns:
        (B, methods, 2, shares) float64, most and least relevant first; None where there are no pixels to impute, or no
        classes to confuse.
    """
    pixels = games.batch.inputs["pixel_values"]
    if pixels.ndim != 4 or games.batch.likelihood == "none" or games.batch.output.logits.shape[1] < 2:
        return None
    kept = [
        _still_predicted(games, place, _removed(order[place]), generator_of(seed, index, "road"))
        for place, index in enumerate(indices)
    ]
    return torch.stack(kept)


def road_lines(kept: Tensor | None) -> dict[str, Tensor]:
    """The curves of `road`'s answer (B, methods, 2, shares): (B, methods, shares) each."""
    return {} if kept is None else {"road_morf": kept[:, :, 0], "road_lerf": kept[:, :, 1]}


def road_measures(kept: Tensor | None) -> dict[str, Tensor]:
    """The areas of `road`'s answer (B, methods, 2, shares): (B, methods) each."""
    if kept is None:
        return {}
    morf, lerf = kept.mean(dim=-1).unbind(dim=2)  # (B, methods) each
    return {"road_morf": morf, "road_lerf": lerf, "road_gap": lerf - morf}


def _removed(order: Tensor) -> Tensor:
    """The players that are absent with each share, (methods, 2, shares, N) bool, for orders (methods, N)."""
    players = order.shape[-1]
    place = order.argsort(dim=-1)[:, None]  # (methods, 1, N)
    counts = torch.tensor([min(max(round(share * players), 1), players - 1) for share in SHARES], device="cpu")[
        :, None
    ]  # (shares, 1)
    return torch.stack([place < counts, place >= players - counts], dim=1)  # (methods, 2, shares, N)


def _still_predicted(games: Games, place: int, absent: Tensor, generator: torch.Generator) -> Tensor:
    """Of one image, for absent players (methods, 2, shares, N): (methods, 2, shares)."""
    image = image_of(games.batch.inputs, place)["pixel_values"]  # (1, C, H, W)
    height, width = image.shape[-2:]
    seen, tiling = games.batch.tiling.seen, games.batch.tiling.players
    masks = absent.flatten(0, 2).unflatten(1, tiling)[:, None].float()  # (R, 1, rows, cols)
    tiles = interpolate(masks, size=seen, mode="nearest-exact")[:, 0] > 0.5  # (R, h, w)
    gone = torch.zeros(len(tiles), height, width, dtype=torch.bool, device="cpu")  # (R, H, W)
    gone[:, : seen[0], : seen[1]] = tiles
    guesses = []
    for part in gone.to(image.device).split(max(1, _BYTES // (8 * height * width**2))):
        imputed = noisy_linear_imputation(image.expand(len(part), -1, -1, -1).float(), part, generator)
        guesses.append(games.passes(imputed.to(image.dtype)))
    return (torch.cat(guesses) == games.classes[place].cpu()).double().unflatten(0, absent.shape[:3])
