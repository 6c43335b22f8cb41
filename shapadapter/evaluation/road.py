"""ROAD: remove and debias. Removed players' pixels are imputed, and the model sees a whole image (Rong et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from shapadapter.metrics import noisy_linear_imputation

from .games import Games
from .methods import image_of
from .seeds import generator_of

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
