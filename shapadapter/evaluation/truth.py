"""The Shapley values that every method is measured against, and KernelSHAP's way towards them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shapadapter.core.shapley import (
    MAX_ENUMERATED_PLAYERS,
    all_coalitions,
    exact_shapley_values,
    kernel_shap,
    kernel_shap_error,
    pays_for_all,
    sample_pairs,
    sample_sizes,
)
from shapadapter.core.statistics import generator_of
from shapadapter.evaluation.games import Games


@dataclass(frozen=True)
class Truth:
    """Shapley values of the explained class of B images, and estimates of them.

    Attributes:
        values: (B, N) float64.
        errors: (B,) float64, their own relative L2 error, estimated; 0 where they are exact.
        estimates: (B, budgets, N) float64, KernelSHAP with each budget, on coalitions of its own; exact if it pays for all.
    """

    values: Tensor
    errors: Tensor
    estimates: Tensor


def is_exact(players: int) -> bool:
    """Whether so many players' coalitions are enumerated."""
    return players <= MAX_ENUMERATED_PLAYERS


def find_truth(games: Games, indices: Sequence[int], evaluations: int, budgets: Sequence[int], seed: int) -> Truth:
    """Enumerate, up to 16 players, or run KernelSHAP with many paired coalitions.

    The coalitions of the budgets are independent of the truth's, those of a small budget the first of a larger one's.

    Args:
        games: of B images.
        indices: (B,) the images' places in the data set, which seed what is drawn for them.
        evaluations: of KernelSHAP for the truth, a multiple of 4.
        budgets: evaluations, rising and even.
        seed: of the coalitions.
    """
    stream = _draw(games.players, indices, budgets[-1], seed, "budgets")  # (B, M, N)
    if is_exact(games.players):
        table = games.play(all_coalitions(games.players).expand(len(games), -1, -1)).values  # (B, 2^N)
        values = exact_shapley_values(table.t()).t()  # (2^N, B) -> (N, B) -> (B, N)
        errors = torch.zeros(len(games), dtype=torch.float64, device="cpu")
        rows = (stream.long() << torch.arange(games.players, device="cpu")).sum(
            dim=-1
        )  # (B, M): the table's row of a coalition
        streamed = table.gather(1, rows)  # (B, M)
    else:
        drawn = _draw(games.players, indices, evaluations, seed, "truth")  # (B, M, N)
        played = games.play(torch.cat([drawn, stream], dim=1)).values  # (B, M + M')
        values = _fit(games, drawn, played[:, :evaluations])  # (B, N)
        ends = games.null.values, games.full.values  # (B, 1) each
        errors = kernel_shap_error(drawn, played[:, :evaluations, None], *ends)[:, 0]  # (B, 1) -> (B,)
        streamed = played[:, evaluations:]
    fits = [
        values if pays_for_all(budget, games.players) else _fit(games, stream[:, :budget], streamed[:, :budget])
        for budget in budgets
    ]  # (B, N) each
    return Truth(values, errors, torch.stack(fits, dim=1))


def _fit(games: Games, coalitions: Tensor, values: Tensor) -> Tensor:
    """KernelSHAP of coalitions (B, M, N) with values (B, M): (B, N)."""
    return kernel_shap(coalitions, values[..., None], games.null.values, games.full.values)[..., 0]


def _draw(players: int, indices: Sequence[int], count: int, seed: int, purpose: str) -> Tensor:
    """Pairs of the kernel law for each image, (B, M, N). All have the same sizes, and each subsets of its own."""
    # A place that no image has.
    sizes = sample_sizes(players, count // 2, generator_of(seed, 2**32 - 1, purpose))  # (P,)
    drawn = [sample_pairs(1, players, count // 2, generator_of(seed, i, purpose), sizes) for i in indices]
    return torch.cat(drawn)  # (B, 2 P, N)
