"""Do the attributions say how much is lost when players are removed at random?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shapadapter.metrics import normalised_infidelity, removal_coalitions, sensitivity_n

from .agreement import informed
from .games import Games
from .seeds import generator_of

SHARES = (0.1, 0.25, 0.5, 0.75, 0.9)
"""Of the players, removed for sensitivity-n; one n for each."""

FAITHFULNESS_SHARE = 0.25
"""Of the players, removed for the faithfulness correlation."""

DRAWS = 100
"""Coalitions for each n."""


def removed_counts(players: int) -> list[int]:
    """The n of sensitivity-n, rising."""
    return sorted({_count(players, share) for share in SHARES})


def sensitivity(games: Games, maps: Tensor, indices: Sequence[int], seed: int) -> dict[str, Tensor]:
    """Sensitivity-n and infidelity, means over n, and the faithfulness correlation.

    Args:
        games: of B images.
        maps: (B, methods, N).
        indices: (B,) the images' places in the data set.
        seed: of the coalitions.

    Returns:
        (B, methods) each. The infidelity for one n is that of the map times the factor that suits it best, divided by the
        variance of the true drops: no method is punished for its unit, and equal shares for all players get 1. A map
        that points the wrong way is not turned round by a negative factor: it gets 1 as well.
    """
    counts = removed_counts(games.players)
    generators = [generator_of(seed, index, "sensitivity") for index in indices]
    coalitions = torch.stack(
        [
            torch.stack([removal_coalitions(games.players, count, DRAWS, generator) for count in counts])
            for generator in generators
        ]
    )  # (B, n's, draws, N)
    values = games.play(coalitions.flatten(1, 2)).values.unflatten(1, coalitions.shape[1:3])  # (B, n's, draws)
    full = games.full.values  # (B, 1)
    correlations, distances = [], []
    for place in range(len(counts)):
        # (B, 1, ...): the same coalitions for every method
        arguments = coalitions[:, None, place], values[:, None, place], full
        correlations.append(informed(sensitivity_n(maps, *arguments), maps))  # (B, methods)
        distances.append(_infidelity(maps, *arguments))  # (B, methods)
    return {
        "sensitivity_n": torch.stack(correlations).nanmean(dim=0),
        # With one number of players removed, sensitivity-n is the faithfulness correlation.
        "faithfulness_correlation": correlations[counts.index(_count(games.players, FAITHFULNESS_SHARE))],
        "infidelity": torch.stack(distances).nanmean(dim=0),
    }


def _infidelity(maps: Tensor, coalitions: Tensor, values: Tensor, full_values: Tensor) -> Tensor:
    """Of maps (B, methods, N) times the factor that suits them best, (B, methods); 1 if it would turn them round."""
    claimed = ((~coalitions).double() @ maps.double()[..., None])[..., 0]  # (B, methods, draws)
    drops = full_values[..., None] - values  # (B, 1, draws)
    backwards = ((claimed - claimed.mean(dim=-1, keepdim=True)) * drops).mean(dim=-1) < 0  # (B, methods)
    return normalised_infidelity(maps, coalitions, values, full_values, rescale=True).masked_fill(backwards, 1.0)


def _count(players: int, share: float) -> int:
    return min(max(round(share * players), 1), players - 1)
