"""Methods that ask the model about coalitions: Shapley values, estimated or exact, and what is lost without one player.

All of them play the game the adapter is trained for, with its removal operator and its value.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from shapadapter.core.shapley import all_coalitions, exact_shapley_values, pays_for_all, sample_pairs, sample_sizes
from shapadapter.core.shapley import kernel_shap as fit
from shapadapter.explanation.case import Answer, Case
from shapadapter.explanation.refine import BatchGame


def kernel_shap(case: Case) -> Answer:
    """KernelSHAP with paired coalitions of the exact kernel law (Lundberg & Lee 2017; Covert & Lee 2021); exact if paid for."""
    if pays_for_all(case.evaluations, case.players):
        return exact(case)
    pairs = case.evaluations // 2
    # All images share the sizes, so that coalitions of one size are a rectangular batch; the players are their own.
    sizes = sample_sizes(case.players, pairs, case.source())  # (P,)
    drawn = [sample_pairs(1, case.players, pairs, case.source(image), sizes) for image in range(case.images)]
    coalitions = torch.cat(drawn)  # (B, 2 P, N)
    maps = fit(coalitions, _values(case, coalitions), *_ends(case))  # (B, N, C)
    return Answer(maps, 2 * pairs)


def permutation(case: Case) -> Answer:
    """Mean gains in random orders of joining, each used forwards and backwards (Castro et al. 2009; Mitchell et al. 2022).

    The gains of one order sum to v(all) - v(empty), so the estimate does. The pairs of orders are independent: their
    spread gives the standard errors. With as many evaluations as there are coalitions the values are exact.

    Raises:
        ValueError: not even one pair of orders can be paid.
    """
    players = case.players
    if pays_for_all(case.evaluations, players):
        answer = exact(case)
        return replace(answer, standard_errors=torch.zeros_like(answer.maps))
    cost = 2 * (players - 1)
    pairs = case.evaluations // cost
    if pairs < 1:
        raise ValueError(
            f"A pair of orders of {players} players takes {cost} evaluations, got evaluations={case.evaluations}. Pass "
            f"evaluations={cost} or more, or method='kernel_shap'."
        )
    draws = [torch.rand(pairs, players, generator=case.source(image), device="cpu") for image in range(case.images)]
    place = torch.stack(draws).argsort(dim=-1)  # (B, P, N): when each player joins
    gains = _gains(case, torch.cat([place, players - 1 - place], dim=1))  # (B, 2 P, N, C)
    means = (gains[:, :pairs] + gains[:, pairs:]) / 2  # (B, P, N, C)
    errors = means.std(dim=1) / pairs**0.5 if pairs > 1 else None  # (B, N, C)
    return Answer(means.mean(dim=1), pairs * cost, errors)


def _gains(case: Case, place: Tensor) -> Tensor:
    """What each player adds when the players join in the order of `place` (B, R, N): (B, R, N, C) float64."""
    sizes = torch.arange(1, case.players, device="cpu")[:, None]  # (N - 1, 1)
    coalitions = place[:, :, None] < sizes  # (B, R, N - 1, N)
    inner = _values(case, coalitions.flatten(1, 2)).unflatten(1, coalitions.shape[1:3])  # (B, R, N - 1, C)
    null, full = (end[:, None, None].expand(-1, place.shape[1], -1, -1) for end in _ends(case))  # (B, R, 1, C)
    steps = torch.cat([null, inner, full], dim=2).double().diff(dim=2)  # (B, R, N, C): in order of joining
    return steps.gather(2, place[..., None].expand_as(steps))  # in order of the players


def exact(case: Case) -> Answer:
    """The Shapley values themselves, from all 2^N coalitions; at most 16 players."""
    null, full = _ends(case)
    proper = all_coalitions(case.players)[1:-1]  # (2**N - 2, N)
    values = _values(case, proper.expand(case.images, -1, -1))  # (B, 2**N - 2, C)
    every = torch.cat([null[:, None], values, full[:, None]], dim=1)  # (B, 2**N, C)
    maps = exact_shapley_values(every.transpose(0, 1)).transpose(0, 1)  # (N, B, C) to (B, N, C)
    return Answer(maps, len(proper))


def leave_one_out(case: Case) -> Answer:
    """What is lost without one player: v(all) - v(all without n)."""
    without = ~torch.eye(case.players, dtype=torch.bool, device="cpu")  # (N, N)
    values = _values(case, without.expand(case.images, -1, -1))  # (B, N, C)
    return Answer(_ends(case)[1][:, None] - values, case.players)


def _values(case: Case, coalitions: Tensor) -> Tensor:
    """v(S) of coalitions (B, M, N), whose sizes are the same for all images, for the shown classes: (B, M, C)."""
    game = BatchGame(case.model, case.batch.inputs, case.batch.classes, case.batch_size)
    return game.values(torch.arange(case.images, device="cpu"), coalitions)


def _ends(case: Case) -> tuple[Tensor, Tensor]:
    """v(empty) and v(all) for the shown classes, (B, C) each."""
    output = case.batch.output
    null, full = (case.shown(value).float().cpu() for value in (output.null_values, output.logits))
    return null, full
