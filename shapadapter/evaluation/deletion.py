"""Insertion and deletion: players are added or removed in an order, and the value is followed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shapadapter.core.statistics import generator_of
from shapadapter.evaluation.games import Games


def order_of(attributions: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """The players from the largest attribution to the smallest.

    Some methods give many players the same attribution. In raster order the curve of such a tie would measure where
    objects lie in photographs, not the method: pass a generator to break ties at random.

    Args:
        attributions: (..., N) attribution of each player to one class.
        generator: Source of randomness for ties, on any device; without it, tied players keep raster order.

    Returns:
        (..., N) int64: the number of the player at each place.

    Raises:
        ValueError: If an attribution is nan, which has no place in an order.
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
        ValueError: If the curve has fewer than two points.
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
