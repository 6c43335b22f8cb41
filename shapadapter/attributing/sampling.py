"""Methods that ask the model about coalitions: Shapley values, estimated or exact, and what is lost without one player.

All of them play the game the adapter is trained for, with its removal operator and its value.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from shapadapter.game import PatchGame
from shapadapter.shapley import kernel_shap as fit
from shapadapter.shapley import sample_paired_coalitions

from .case import Answer, Case


def kernel_shap(case: Case) -> Answer:
    """KernelSHAP with paired coalitions of the exact kernel law (Lundberg & Lee 2017; Covert & Lee 2021)."""
    count = case.evaluations // 2 * 2
    maps = []
    for game in _games(case):
        coalitions = sample_paired_coalitions(game.players, count, case.generator)  # (M, N)
        values = game.values(coalitions).cpu()  # (M, K)
        maps.append(fit(coalitions, values, game.null_values.cpu(), game.full_values.cpu()))  # (N, K)
    return Answer(case.shown(torch.stack(maps)), count)


def permutation(case: Case) -> Answer:
    """Mean gains in random orders of joining, each order used forwards and backwards (Castro et al. 2009; Mitchell et al. 2022).

    The gains of one order sum to v(all) - v(empty), so the estimate does. Pairs of orders are independent: their spread
    gives the standard errors.

    Raises:
        ValueError: not even one pair of orders can be paid.
    """
    cost = 2 * (case.players - 1)
    pairs = case.evaluations // cost
    if pairs < 1:
        raise ValueError(
            f"A pair of orders of {case.players} players takes {cost} evaluations, got evaluations={case.evaluations}. "
            f"Pass evaluations={cost} or more, or method='kernel_shap'."
        )
    maps, errors = [], []
    for game in _games(case):
        gains = _gains_in_orders(game, pairs, case.generator)  # (P, N, K)
        maps.append(gains.mean(dim=0))
        if pairs > 1:
            errors.append(gains.std(dim=0) / pairs**0.5)
    standard_errors = case.shown(torch.stack(errors)) if errors else None
    return Answer(case.shown(torch.stack(maps)), pairs * cost, standard_errors)


def _gains_in_orders(game: PatchGame, pairs: int, generator: torch.Generator) -> Tensor:
    """What each player adds on joining, mean of an order and its reverse, for P of these pairs: (P, N, K) float64."""
    players = game.players
    place = torch.rand(pairs, players, generator=generator).argsort(dim=1)  # (P, N): when each player joins
    place = torch.cat([place, players - 1 - place])  # (2 P, N)
    sizes = torch.arange(1, players)[:, None]  # (N - 1, 1)
    coalitions = place[:, None] < sizes  # (2 P, N - 1, N)
    inner = game.values(coalitions.flatten(0, 1)).cpu().double().unflatten(0, (2 * pairs, -1))  # (2 P, N - 1, K)
    null, full = (v.cpu().double().expand(2 * pairs, 1, -1) for v in (game.null_values, game.full_values))
    steps = torch.cat([null, inner, full], dim=1).diff(dim=1)  # (2 P, N, K): in order of joining
    gains = steps.gather(1, place[..., None].expand_as(steps))  # (2 P, N, K): in order of the players
    return (gains[:pairs] + gains[pairs:]) / 2


def exact(case: Case) -> Answer:
    """The Shapley values themselves, from all 2^N coalitions; at most 16 players."""
    maps = torch.stack([game.exact() for game in _games(case)])  # (B, N, K)
    return Answer(case.shown(maps), 2**case.players)


def leave_one_out(case: Case) -> Answer:
    """What is lost without one player: v(all) - v(all without n)."""
    without = ~torch.eye(case.players, dtype=torch.bool)  # (N, N)
    maps = torch.stack([game.full_values - game.values(without) for game in _games(case)])  # (B, N, K)
    return Answer(case.shown(maps), case.players)


def _games(case: Case) -> Iterator[PatchGame]:
    """The game of each image. One by one, so that a call is about many coalitions and the full image costs little."""
    for index in range(case.images):
        inputs = case.image(index)
        yield PatchGame(case.model, inputs.pop("pixel_values"), case.batch_size, **inputs)
