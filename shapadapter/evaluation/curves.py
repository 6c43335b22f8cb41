"""Insertion and deletion curves of several methods, from one set of model evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shapadapter.metrics import aopc, curve_area, order_of, prefix_coalitions

from .games import Games
from .seeds import generator_of


@dataclass(frozen=True)
class Curves:
    """The likelihood of the explained class while players are added or removed, the most relevant first.

    Attributes:
        insertion: (B, methods, N + 1) float64.
        deletion: (B, methods, N + 1) float64.
    """

    insertion: Tensor
    deletion: Tensor

    def measures(self) -> dict[str, Tensor]:
        """Areas and AOPC, (B, methods) each.

        Removing the least relevant first (LeRF) is inserting the most relevant first, read backwards.
        """
        morf, lerf = aopc(self.deletion), aopc(self.insertion.flip(-1))  # (B, methods)
        return {
            "insertion": curve_area(self.insertion),
            "deletion": curve_area(self.deletion),
            "aopc_morf": morf,
            "aopc_lerf": lerf,
            "aopc_gap": morf - lerf,
        }


def orders(maps: Tensor, indices: Sequence[int], seed: int) -> Tensor:
    """The players of maps (B, methods, N) from the most relevant down; ties are broken alike for every method."""
    ranked = [
        torch.stack([order_of(one, generator_of(seed, index, "ties")) for one in several])
        for several, index in zip(maps, indices, strict=True)
    ]
    return torch.stack(ranked)  # (B, methods, N)


def follow(games: Games, order: Tensor) -> Curves:
    """Play the coalitions along the curves of B images in the orders (B, methods, N)."""
    inner = [prefix_coalitions(order, insertion)[..., 1:-1, :] for insertion in (True, False)]
    coalitions = torch.stack(inner, dim=1)  # (B, 2, methods, N - 1, N)
    played = games.play(coalitions.flatten(1, 3)).likelihoods.unflatten(
        1, coalitions.shape[1:4]
    )  # (B, 2, methods, N - 1)
    null, full = (
        ends[:, None].expand(-1, order.shape[1], -1) for ends in (games.null.likelihoods, games.full.likelihoods)
    )  # (B, 1) -> (B, methods, 1)
    return Curves(
        insertion=torch.cat([null, played[:, 0], full], dim=-1),
        deletion=torch.cat([full, played[:, 1], null], dim=-1),
    )
