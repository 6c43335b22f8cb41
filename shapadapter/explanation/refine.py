"""Spend more evaluations of the model on an explanation: which coalitions, in which rounds, and when it is enough."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shapadapter.core.estimates import Posterior, calibrated_posterior, exact_posterior, shapley_posterior
from shapadapter.core.shapley import (
    MAX_ENUMERATED_PLAYERS,
    all_coalitions,
    generator_of,
    pays_for_all,
    sample_in_turns,
    sample_sizes,
)
from shapadapter.explanation.explanation import Explanation
from shapadapter.explanation.game import GRADIENT_COST, BatchGame
from shapadapter.explanation.passes import Predicted
from shapadapter.explanation.presence import (
    BLOCK,
    LEVEL,
    full_gradients,
    mean_of_live,
    sample_presence,
    share_of_head,
)

UNTIL = "until"

# What "until" aims at, and the most evaluations it spends on an image, unless told.
_RELATIVE_ERROR, _MAX_REFINE = 0.1, 4096

# Evaluations of the first round of "until"; each later round adds half of what was spent before.
_FIRST_ROUND = 64

# The share of the evaluations that goes to gradients. Their mean has little noise and a bias, pairs of coalitions have none
# and tell how large it is.
_FOR_GRADIENTS = 0.4

# From so many samples on their mean is thought better than what one pass says, before the pairs have a say.
_TRUSTED = 32

# With few players, how many times as many coalitions as a round evaluates are drawn, at most: repeats cost nothing.
_REPEATS = 4


@dataclass(frozen=True)
class Plan:
    """How many evaluations each image gets."""

    totals: tuple[int, ...]  # evaluations spent on an image after each round, increasing and even
    relative_error: float  # an image whose shown classes all have at most this error is done
    seed: int  # of the coalitions

    @classmethod
    def of(cls, refine: int | str, relative_error: float | None, max_refine: int | None, seed: int) -> Plan | None:
        """The plan that arguments of `explain` ask for, None without refinement; refuses what it cannot follow."""
        if refine not in (UNTIL, LEVEL) and not in_pairs(refine):
            raise ValueError(
                f"refine must be an even number of evaluations, 0 or more, for coalitions come in pairs, or {UNTIL!r}, or "
                f"{LEVEL!r}; got refine={refine!r}."
            )
        if refine != UNTIL:
            if relative_error is not None or max_refine is not None:
                raise ValueError(f"relative_error and max_refine are for refine={UNTIL!r}; got refine={refine!r}.")
            return cls((int(refine),), 0.0, seed) if refine and refine != LEVEL else None
        wanted = _RELATIVE_ERROR if relative_error is None else relative_error
        most = _MAX_REFINE if max_refine is None else max_refine
        if not (most and in_pairs(most)):
            raise ValueError(
                f"With refine={UNTIL!r} max_refine must be an even number of evaluations, 2 or more; got "
                f"max_refine={max_refine!r}."
            )
        if not wanted > 0:
            raise ValueError(f"Expected a positive relative_error, such as 0.1, got {relative_error}.")
        totals = [min(_FIRST_ROUND, most)]
        while totals[-1] < most:
            totals.append(min(totals[-1] + max(2, totals[-1] // 4 * 2), most))
        return cls(tuple(totals), wanted, seed)


def in_pairs(count: Any) -> bool:
    """Whether so many evaluations are coalitions with their complements."""
    return isinstance(count, int | np.integer) and not isinstance(count, bool) and bool(count >= 0 and count % 2 == 0)


def refined(explanation: Explanation, game: BatchGame, plan: Plan, first: int, predicted: Predicted) -> Explanation:
    """The explanation of a batch after more evaluations; some go to gradients where its pass has kept the graph for them.

    `first` is the number of the batch's first image among all that are explained:
    each image draws from a source of its own, so that it does not matter with which others it is explained.
    """
    prior = explanation.attributions.flatten(1, 2)  # (B, N, C)
    batch, players = prior.shape[:2]
    ends = torch.stack([explanation.null_values, explanation.logits], dim=1)  # (B, 2, K)
    ends = ends.gather(2, explanation.classes[:, None].expand(-1, 2, -1))  # (B, 2, C): of nobody and of everybody
    if pays_for_all(plan.totals[0], players):
        found = enumerated(game, torch.arange(batch, device="cpu"), ends, players)
        mean, error, spent = found.mean, found.standard_error, torch.full((batch,), 2**players - 2, device="cpu")
    elif plan.relative_error and players <= MAX_ENUMERATED_PLAYERS:
        alone = [_each_once(game, image, prior[image], ends[image], plan, first + image) for image in range(batch)]
        mean, error = (torch.stack([getattr(one, part) for one, _ in alone]) for part in ("mean", "standard_error"))
        spent = torch.tensor([evaluations for _, evaluations in alone], device="cpu")
    else:
        room = predicted.presence is not None and blocks_for(plan.totals[-1], prior.shape[2]) >= 0
        gradients = full_gradients(predicted) if room else None  # (B, N, C)
        mean, error, spent = _in_rounds(game, prior, gradients, ends, plan, first)
    grid = explanation.attributions.shape[1:3]
    maps, errors = (part.float().unflatten(1, grid) for part in (mean, error))  # (B, rows, cols, C) each
    return replace(explanation, attributions=maps, standard_errors=errors, evaluations=spent, method="refined")


def enumerated(game: BatchGame, images: Tensor, ends: Tensor, players: int) -> Posterior:
    """The Shapley values (b, N, C) of some images (b,), from all coalitions and the ends (b, 2, C)."""
    proper = all_coalitions(players)[1:-1].expand(len(images), -1, -1)  # (b, 2**N - 2, N)
    values = torch.cat([ends[:, :1], game.values(images, proper), ends[:, 1:]], dim=1)  # (b, 2**N, C)
    found = exact_posterior(values.transpose(0, 1))  # (N, b, C)
    return Posterior(found.mean.transpose(0, 1), found.standard_error.transpose(0, 1))


def _in_rounds(
    game: BatchGame, prior: Tensor, gradients: Tensor | None, ends: Tensor, plan: Plan, first: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and error (B, N, C) after as many rounds as each image takes, and what it has spent (B,)."""
    batch, players, shown = prior.shape
    mean, error = prior.double(), torch.full_like(prior, torch.nan, dtype=torch.float64)
    spent = torch.zeros(batch, dtype=torch.int64, device="cpu")
    # Of the images that are not done yet, (b,): their coalitions and values, samples of presence and gradients so far.
    images = torch.arange(batch, device="cpu")
    coalitions = torch.empty(batch, 0, players, dtype=torch.bool, device="cpu")
    values = torch.empty(batch, 0, shown, device="cpu")
    live = torch.empty(batch, 0, players, dtype=torch.bool, device="cpu")
    felt = torch.empty(batch, 0, players, shown, device="cpu")
    for turn, total in enumerate(plan.totals):
        blocks = 0 if gradients is None else blocks_for(total, shown)
        if blocks < 0:  # the gradients at full presence alone would cost too much of it
            continue
        if total - spent_on_gradients(blocks, shown) < coalitions.shape[1]:
            blocks = live.shape[1] // BLOCK  # what went to pairs before leaves no room for more samples
        numbers = (first + images).tolist()
        if blocks * BLOCK > live.shape[1]:
            sources = [generator_of(plan.seed, turn, "presence", 1 + n) for n in numbers]
            more = blocks - live.shape[1] // BLOCK
            presence, new_live = sample_presence(players, more, generator_of(plan.seed, turn, "presence", 0), sources)
            live = torch.cat([live, new_live], dim=1)  # (b, R, N)
            felt = torch.cat([felt, game.gradients(images, presence)], dim=1)  # (b, R, N, C)
        left = total - (0 if gradients is None else math.ceil(spent_on_gradients(blocks, shown)))
        # The sizes are the same for all images, so that coalitions of one size are a rectangular batch.
        sizes = sample_sizes(players, (left - coalitions.shape[1]) // 2, generator_of(plan.seed, turn, 0))  # (m / 2,)
        new = torch.stack([sample_in_turns(players, sizes, generator_of(plan.seed, turn, 1 + n)) for n in numbers])
        coalitions = torch.cat([coalitions, new], dim=1)  # (b, M, N)
        values = torch.cat([values, game.values(images, new)], dim=1)  # (b, M, C)
        null, full = ends[images].unbind(1)  # (b, C) each
        if gradients is None:
            found = shapley_posterior(prior[images], coalitions, values, null, full)
        else:
            said, weights = _predictions(prior[images], gradients[images], felt, live)
            found = calibrated_posterior(said, weights, coalitions, values, null, full)
        mean[images], error[images], spent[images] = found.mean, found.standard_error, total
        unsure = found.relative_error.amax(dim=1) > plan.relative_error  # (b,)
        images, coalitions, values, live, felt = (part[unsure] for part in (images, coalitions, values, live, felt))
        if not len(images):
            break
    return mean, error, spent


def _predictions(prior: Tensor, gradients: Tensor, felt: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
    """What head, gradient and mean of samples say, (b, N, C, F), and their weights (b, C, F) before anything else is known."""
    share, trust = share_of_head(prior, gradients), min(1.0, live.shape[1] / _TRUSTED)  # (b, C)
    parts, weights = [prior.double(), gradients], [(1 - trust) * share, (1 - trust) * (1 - share)]
    if live.shape[1]:
        parts.append(mean_of_live(felt, live))  # (b, N, C)
        weights.append(torch.full_like(share, trust))
    return torch.stack(parts, dim=-1), torch.stack(weights, dim=-1)


def spent_on_gradients(blocks: int, shown: int) -> float:
    """Evaluations that the gradient at full presence and so many blocks of samples cost, for C shown classes."""
    return GRADIENT_COST * (shown + blocks * BLOCK * (1 + shown))


def blocks_for(total: int, shown: int) -> int:
    """How many blocks of samples so many evaluations have room for, or -1 if the gradient is too dear as well."""
    room = _FOR_GRADIENTS * total - spent_on_gradients(0, shown)
    return -1 if room < 0 else int(room / (spent_on_gradients(1, shown) - spent_on_gradients(0, shown)))


def _each_once(
    game: BatchGame, image: int, prior: Tensor, ends: Tensor, plan: Plan, number: int
) -> tuple[Posterior, int]:
    """`_in_rounds` for one image of few players, whose coalitions are soon drawn again: each is evaluated once.

    In the first round that could pay for every coalition, those that are left are evaluated: the values are exact then.
    Of a prior (N, C) and ends (2, C); the posterior, and the evaluations spent.
    """
    players = len(prior)
    every, source = all_coalitions(players), generator_of(plan.seed, 0, 1 + number)  # (2**N, N)
    table = prior.new_zeros(2**players, prior.shape[1])  # (2**N, C): v(S) by the row of S in `every`
    table[0], table[-1] = ends
    known, drawn = {0, 2**players - 1}, list[int]()
    for total in plan.totals:
        exact = pays_for_all(total, players)
        rows = list(range(2**players)) if exact else _drawn(players, total + 2 - len(known), known, source)
        new = sorted(set(rows) - known)
        table[new] = game.values(torch.tensor([image], device="cpu"), every[new][None])[0]
        known.update(new)
        drawn += rows
        found = exact_posterior(table) if exact else shapley_posterior(prior, every[drawn], table[drawn], *ends)
        if exact or bool((found.relative_error <= plan.relative_error).all()):
            break
    return found, len(known) - 2


def _drawn(players: int, count: int, known: set[int], source: torch.Generator) -> list[int]:
    """Rows of `all_coalitions`, drawn in pairs until `count` are new, or until the few that are would take too long."""
    rows, new = list[int](), set[int]()
    bits = torch.arange(players, device="cpu")
    for _ in range(_REPEATS):
        sizes = sample_sizes(players, max(count, _FIRST_ROUND) // 2, source)  # (m / 2,)
        coalitions = sample_in_turns(players, sizes, source)  # (m, N)
        pairs = (coalitions.long() << bits).sum(dim=1).unflatten(0, (-1, 2))  # (m / 2, 2)
        for pair in pairs.tolist():
            if len(new) == count:
                return rows
            rows += pair
            new.update(set(pair) - known)
    return rows
