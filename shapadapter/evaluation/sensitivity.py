"""Do the attributions say how much is lost when players are removed at random?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shapadapter.metrics import faithfulness_correlation, normalised_infidelity, removal_coalitions, sensitivity_n

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
    """Sensitivity-n, mean over n; faithfulness correlation; infidelity over all these coalitions.

    Args:
        games: of B images.
        maps: (B, methods, N).
        indices: (B,) the images' places in the data set.
        seed: of the coalitions.

    Returns:
        (B, methods) each. The infidelity is that of the map times the factor that suits it best, divided by the variance
        of the true drops: methods without a unit are not punished for it.
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
    # (B, 1, ...): the same coalitions for every method
    full = games.full.values
    each = {
        count: sensitivity_n(maps, coalitions[:, None, place], values[:, None, place], full)
        for place, count in enumerate(counts)
    }
    chosen = counts.index(_count(games.players, FAITHFULNESS_SHARE))
    every = coalitions.flatten(1, 2)[:, None], values.flatten(1, 2)[:, None], full  # (B, 1, n's * draws, N)
    return {
        "sensitivity_n": torch.stack(list(each.values())).nanmean(dim=0),
        "faithfulness_correlation": faithfulness_correlation(
            maps, coalitions[:, None, chosen], values[:, None, chosen], full
        ),
        "infidelity": normalised_infidelity(maps, *every, rescale=True),
    }


def _count(players: int, share: float) -> int:
    return min(max(round(share * players), 1), players - 1)
