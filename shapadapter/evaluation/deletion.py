"""Players added or removed in the order of a map: insertion, deletion and AOPC, and ROAD, which imputes what is removed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import conv2d, interpolate

from shapadapter.core.shapley import generator_of
from shapadapter.evaluation.faithfulness import Games


def order_of(attributions: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """The players from the largest attribution to the smallest.

    Some methods give many players the same attribution. In raster order the curve of such a tie would measure where
    objects lie in photographs, not the method: pass a generator to break ties at random.

    Args:
        attributions: (..., N) attribution of each player to one class.
        generator: source of randomness for ties, on any device; without it, tied players keep raster order.

    Returns:
        (..., N) int64: the number of the player at each place.

    Raises:
        ValueError: an attribution is nan.
    """
    if bool(attributions.isnan().any()):
        raise ValueError("attributions hold nan, which has no place in an order: expected a number for each player.")
    if generator is None:
        return attributions.argsort(dim=-1, descending=True, stable=True)  # (..., N)
    noise = torch.rand(attributions.shape, generator=generator, device=generator.device)  # (..., N)
    shuffle = noise.argsort(dim=-1).to(attributions.device)  # (..., N): a uniform permutation in each row
    places = attributions.gather(-1, shuffle).argsort(dim=-1, descending=True, stable=True)  # (..., N)
    return shuffle.gather(-1, places)  # (..., N)


def prefix_coalitions(order: Tensor, insertion: bool) -> Tensor:
    """The coalitions along a curve: the first k players of an order present, or absent, for k = 0 .. N.

    Args:
        order: (..., N) int, a permutation of the players in each row (`order_of`).
        insertion: True: the first k are present, all others absent. False (deletion): the first k are absent.

    Returns:
        (..., N + 1, N) bool, True = present; row k belongs to the point k of the curve.
    """
    players = order.shape[-1]
    place = order.argsort(dim=-1)[..., None, :]  # (..., N) -> (..., 1, N): the place of each player in the order
    steps = torch.arange(players + 1, device=order.device)[:, None]  # (N + 1, 1)
    return place < steps if insertion else place >= steps  # (..., N + 1, N)


def curve_area(curve: Tensor) -> Tensor:
    """The area under a curve over `k / N` from 0 to 1, by trapezia (Petsiuk et al. 2018).

    Args:
        curve: (..., N + 1) value of the coalition at each point k = 0 .. N.

    Returns:
        (...) in the unit of the values: their mean along the curve. High is good for insertion, low for deletion.

    Raises:
        ValueError: the curve has fewer than two points.
    """
    if curve.shape[-1] < 2:
        raise ValueError(f"a curve has two points or more, one for each k = 0 .. N, but got {curve.shape[-1]}.")
    return torch.trapezoid(curve, dim=-1) / (curve.shape[-1] - 1)  # (..., N + 1) -> (...)


def aopc(curve: Tensor) -> Tensor:
    """The area over the perturbation curve: `1 / (L + 1) sum_{k = 0 .. L} (v(all) - c_k)` (Samek et al. 2017).

    Args:
        curve: (..., L + 1) values along a deletion: `c_0 = v(all)`, then with the first 1 .. L players removed,
            the most relevant first (MoRF) or the least relevant first (LeRF).

    Returns:
        (...) in the unit of the values: the mean drop. High is good for MoRF, low for LeRF.
    """
    return (curve[..., :1] - curve).mean(dim=-1)  # (..., L + 1) -> (...)


def orders(maps: Tensor, indices: Sequence[int], seed: int) -> Tensor:
    """The players of maps (B, methods, N) from the most relevant down; ties are broken alike for every method."""
    ranked = [
        torch.stack([order_of(one, generator_of(seed, index, "ties")) for one in several])
        for several, index in zip(maps, indices, strict=True)
    ]
    return torch.stack(ranked)  # (B, methods, N)


def follow(games: Games, order: Tensor) -> dict[str, Tensor]:
    """The likelihood along the curves `insertion` and `deletion` of orders (B, methods, N), (B, methods, N + 1) each."""
    inner = [prefix_coalitions(order, insertion)[..., 1:-1, :] for insertion in (True, False)]
    coalitions = torch.stack(inner, dim=1)  # (B, 2, methods, N - 1, N)
    likelihoods = games.play(coalitions.flatten(1, 3)).likelihoods  # (B, 2 * methods * (N - 1))
    added, removed = likelihoods.unflatten(1, coalitions.shape[1:4]).unbind(1)  # (B, methods, N - 1) each
    ends = (one.likelihoods[:, None].expand(-1, order.shape[1], -1) for one in (games.null, games.full))
    null, full = ends  # (B, methods, 1) each
    return {
        "insertion": torch.cat([null, added, full], dim=-1),
        "deletion": torch.cat([full, removed, null], dim=-1),
    }


def areas(curves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Areas and AOPC of what `follow` and `road` found, (B, methods) each."""
    # Removing the least relevant first (LeRF) is inserting the most relevant first, read backwards.
    morf, lerf = aopc(curves["deletion"]), aopc(curves["insertion"].flip(-1))  # (B, methods)
    found = {
        "insertion": curve_area(curves["insertion"]),
        "deletion": curve_area(curves["deletion"]),
        "aopc_morf": morf,
        "aopc_lerf": lerf,
        "aopc_gap": morf - lerf,
    }
    if "road_morf" in curves:
        morf, lerf = curves["road_morf"].mean(dim=-1), curves["road_lerf"].mean(dim=-1)  # (B, methods)
        found |= {"road_morf": morf, "road_lerf": lerf, "road_gap": lerf - morf}
    return found


# -- ROAD: removed pixels are imputed so that the mask itself tells nothing (Rong et al. 2022) ------------------------

DIRECT, DIAGONAL = 1 / 6, 1 / 12
"""The weights of a pixel's four direct and four diagonal neighbours; together they are 1."""

SHARES = tuple(percent / 100 for percent in range(10, 100, 10))
"""Of the players, removed."""

_BYTES = 512 * 2**20
"""What imputation may use of memory at a time."""


def road(games: Games, order: Tensor, indices: Sequence[int], seed: int) -> dict[str, Tensor]:
    """Whether the model still predicts the explained class, 1 or 0, while players are imputed in orders (B, methods, N).

    The curves `road_morf` (most relevant first) and `road_lerf` (least relevant first), (B, methods, shares) float64;
    none where there are no pixels to impute, or no classes to confuse.
    """
    batch, players = games.batch, games.players
    pixels = batch.inputs["pixel_values"]  # (B, C, H, W)
    if pixels.ndim != 4 or batch.likelihood == "none" or batch.output.logits.shape[1] < 2:
        return {}
    place = order.argsort(dim=-1)[..., None, :]  # (B, methods, 1, N)
    counts = torch.tensor([[min(max(round(share * players), 1), players - 1)] for share in SHARES], device="cpu")
    absent = torch.stack([place < counts, place >= players - counts], dim=2)  # (B, methods, 2, shares, N)
    kept = []
    for image, index, removed in zip(pixels.split(1), indices, absent, strict=True):
        masks = removed.flatten(0, 2).unflatten(1, batch.tiling.players)[:, None].float()  # (R, 1, rows, cols)
        height, width = batch.tiling.seen
        gone = torch.zeros(len(masks), *image.shape[-2:], dtype=torch.bool, device="cpu")  # (R, H, W)
        gone[:, :height, :width] = interpolate(masks, size=(height, width), mode="nearest-exact")[:, 0] > 0.5
        generator = generator_of(seed, index, "road")
        for part in gone.to(image.device).split(max(1, _BYTES // (8 * image.shape[-2] * image.shape[-1] ** 2))):
            imputed = noisy_linear_imputation(image.expand(len(part), -1, -1, -1).float(), part, generator)
            kept.append(
                games.model(**{**batch.inputs, "pixel_values": imputed.to(image.dtype)}).logits.argmax(1).cpu()
            )
    guesses = torch.cat(kept).view(absent.shape[:4])  # (B, methods, 2, shares)
    morf, lerf = (guesses == games.classes.cpu()[:, None, None, None]).double().unbind(2)
    return {"road_morf": morf, "road_lerf": lerf}


def noisy_linear_imputation(images: Tensor, absent: Tensor, generator: torch.Generator, noise: float = 0.01) -> Tensor:
    """Replace absent pixels by the weighted mean of their neighbours, all at once, and add a little noise.

    Each absent pixel is 1/6 of its direct plus 1/12 of its diagonal neighbours, absent ones included: one linear
    system per image, solved exactly. At the border the weights of the neighbours that exist are scaled up to 1.
    The system is solved row by row of pixels: memory `8 H W^2` bytes per image, 90 MB at 224 x 224.

    Args:
        images: (B, C, H, W) pixels, of any floating type.
        absent: (B, H, W) bool, True = to be replaced.
        generator: source of the noise.
        noise: standard deviation of the noise, in the unit of the pixels as they are given.

    Returns:
        (B, C, H, W) of the type of the images: present pixels unchanged, absent ones imputed.

    Raises:
        ValueError: the shapes do not fit, or an image has no present pixel to start from.
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
    """Solve for all pixels: (B, C, H, W) float64, (B, H, W) -> (B, C, H, W)."""
    # The unknowns are the pixels; the equation of a present one is `x = its value`. Only neighboring rows share
    # equations, so the matrix is block tridiagonal, and it is symmetric positive definite: rows of pixels are
    # eliminated from the first to the last by a Cholesky factor each, then solved from the last to the first.
    known = torch.where(absent[:, None], 0, images)  # (B, C, H, W)
    present_sums, weight_sums = _weighted_neighbors(known), _weighted_neighbors(torch.ones_like(known[:1, :1]))
    rights = torch.where(absent[:, None], present_sums, known).permute(2, 0, 3, 1)  # (B, C, H, W) -> (H, B, W, C)
    diagonals = torch.where(absent, weight_sums[0], 1).transpose(0, 1)  # (1, H, W), (B, H, W) -> (H, B, W)
    rows = absent.double().transpose(0, 1)  # (B, H, W) -> (H, B, W), 1 = absent
    same = torch.eye(known.shape[-1], dtype=known.dtype, device=known.device)  # (W, W)
    beside = torch.ones_like(same).tril(1).triu(-1) - same  # (W, W)
    within, between = DIRECT * beside, DIRECT * same + DIAGONAL * beside  # weights in a row, and from row to row

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


def _weighted_neighbors(images: Tensor) -> Tensor:
    """The weighted sum of each pixel's neighbors, zero outside the image: (B, C, H, W) -> (B, C, H, W)."""
    edge, middle = [DIAGONAL, DIRECT, DIAGONAL], [DIRECT, 0, DIRECT]
    kernel = torch.tensor([edge, middle, edge], dtype=images.dtype, device=images.device)  # (3, 3)
    single = images.flatten(0, 1)[:, None]  # (B, C, H, W) -> (B C, 1, H, W)
    return conv2d(single, kernel[None, None], padding=1).view_as(images)
