"""Spend more evaluations of the model on an explanation: which coalitions, in which rounds, and when it is enough."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shapadapter.core.posterior import Posterior, exact_posterior, shapley_posterior
from shapadapter.core.shapley import (
    MAX_ENUMERATED_PLAYERS,
    all_coalitions,
    pays_for_all,
    sample_in_turns,
    sample_sizes,
)
from shapadapter.data.images import IMAGE_INPUTS
from shapadapter.explanation.explanation import Explanation

UNTIL = "until"

RELATIVE_ERROR, MAX_REFINE = 0.1, 4096
"""What "until" aims at, and the most evaluations it spends on an image, unless told."""

FIRST_ROUND = 64
"""Evaluations of the first round of "until"; each later round adds half of what was spent before."""

COALITIONS = 32
"""Coalitions of an image in a call of the model, which also evaluates the whole image each time."""

ROWS = 8
"""Coalitions, of all images, in a call: so many times `batch_size`. Most of them are much smaller than an image."""


REPEATS = 4
"""With few players, how many times as many coalitions as a round evaluates are drawn, at most: repeats cost nothing."""


@dataclass(frozen=True)
class Plan:
    """How many evaluations each image gets.

    Attributes:
        totals: evaluations spent on an image after each round, increasing and even.
        relative_error: an image whose shown classes all have at most this error is done.
        seed: of the coalitions.
    """

    totals: tuple[int, ...]
    relative_error: float
    seed: int

    @classmethod
    def of(cls, refine: int | str, relative_error: float | None, max_refine: int | None, seed: int) -> Plan | None:
        """The plan that arguments of `explain` ask for, None without refinement.

        Raises:
            ValueError: an odd or negative number of evaluations, a relative error that is not positive, or one that
                nothing would look at.
        """
        if refine != UNTIL and not in_pairs(refine):
            raise ValueError(
                f"refine must be an even number of evaluations, 0 or more, or {UNTIL!r}, for coalitions come in pairs; got "
                f"refine={refine!r}."
            )
        if not isinstance(refine, str):
            if relative_error is not None or max_refine is not None:
                raise ValueError(f"relative_error and max_refine are for refine={UNTIL!r}; got refine={refine!r}.")
            return cls((refine,), 0.0, seed) if refine else None
        wanted = RELATIVE_ERROR if relative_error is None else relative_error
        most = MAX_REFINE if max_refine is None else max_refine
        if not (most and in_pairs(most)):
            raise ValueError(
                f"With refine={UNTIL!r} max_refine must be an even number of evaluations, 2 or more; got "
                f"max_refine={max_refine!r}."
            )
        if not wanted > 0:
            raise ValueError(f"Expected a positive relative_error, such as 0.1, got {relative_error}.")
        totals = [min(FIRST_ROUND, most)]
        while totals[-1] < most:
            totals.append(min(totals[-1] + max(2, totals[-1] // 4 * 2), most))
        return cls(tuple(totals), wanted, seed)

    def coalitions(self, turn: int, images: list[int], players: int) -> Tensor:
        """The new coalitions (b, m, N) of a round.

        The sizes are the same for all images, so that coalitions of one size are a rectangular batch. Each image draws
        from a source of its own, so that it does not matter with which others it is explained.
        """
        count = self.totals[turn] - (self.totals[turn - 1] if turn else 0)
        sizes = sample_sizes(players, count // 2, self.source(turn, 0))  # (m / 2,)
        return torch.stack([sample_in_turns(players, sizes, self.source(turn, 1 + image)) for image in images])

    def source(self, turn: int, place: int) -> torch.Generator:
        """A source of randomness of one round and place: 0 for what all images share, 1 + an image's number for its own."""
        state = np.random.SeedSequence(self.seed, spawn_key=(turn, place)).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(state[0]))


def in_pairs(count: Any) -> bool:
    """Whether so many evaluations are coalitions with their complements."""
    return isinstance(count, int | np.integer) and not isinstance(count, bool) and bool(count >= 0 and count % 2 == 0)


@dataclass(frozen=True)
class BatchGame:
    """The games of a batch of images.

    Attributes:
        model: a wrapped model.
        inputs: keyword arguments of its forward for the batch.
        classes: (B, C), the classes whose values are asked for.
        batch_size: images in a forward pass.
        count: called with the number of evaluations after each call of the model.
    """

    model: nn.Module
    inputs: dict[str, Any]
    classes: Tensor
    batch_size: int
    count: Callable[[int], Any] = field(default=lambda evaluations: None)

    def values(self, images: Tensor, coalitions: Tensor) -> Tensor:
        """v(S) of some images (b,), each with its coalitions (b, m, N) of the same sizes: (b, m, C) fp32, on the CPU."""
        order = coalitions[0].sum(dim=1).argsort(stable=True)  # (m,): by size
        together = max(1, ROWS * self.batch_size // COALITIONS)
        parts = [
            torch.cat([self._call(some, chosen[:, columns]) for columns in order.split(COALITIONS)], dim=1)
            for some, chosen in zip(images.split(together), coalitions.split(together), strict=True)
        ]
        return torch.cat(parts)[:, order.argsort()]

    def _call(self, images: Tensor, coalitions: Tensor) -> Tensor:
        device = self.classes.device
        rows = images.to(device)
        inputs = {name: value[rows] if name in IMAGE_INPUTS else value for name, value in self.inputs.items()}
        values = self.model(**inputs, coalitions=coalitions.to(device)).coalition_values  # (b, m, K)
        self.count(coalitions.shape[0] * coalitions.shape[1])
        shown = self.classes[rows][:, None].expand(-1, values.shape[1], -1)  # (b, C) -> (b, m, C)
        return values.gather(2, shown).float().cpu()


def refined(explanation: Explanation, game: BatchGame, plan: Plan, first: int) -> Explanation:
    """The explanation of a batch after more evaluations.

    Args:
        explanation: what one forward pass says.
        game: of the same images.
        plan: how many evaluations.
        first: the number of its first image among all that are explained; coalitions depend on it.
    """
    prior = explanation.attributions.flatten(1, 2)  # (B, N, C)
    batch, players = prior.shape[:2]
    ends = torch.stack([explanation.null_values, explanation.logits], dim=1)  # (B, 2, K)
    ends = ends.gather(2, explanation.classes[:, None].expand(-1, 2, -1))  # (B, 2, C)
    if pays_for_all(plan.totals[0], players):
        found = _enumerated(game, torch.arange(batch, device="cpu"), ends, players)
        mean, error, spent = found.mean, found.standard_error, torch.full((batch,), 2**players - 2, device="cpu")
    elif plan.relative_error and players <= MAX_ENUMERATED_PLAYERS:
        alone = [_sparing(game, image, prior[image], ends[image], plan, first + image) for image in range(batch)]
        mean, error = (torch.stack([getattr(one, part) for one, _ in alone]) for part in ("mean", "standard_error"))
        spent = torch.tensor([evaluations for _, evaluations in alone], device="cpu")
    else:
        mean, error, spent = _sampled(game, prior, ends, plan, first)
    grid = explanation.attributions.shape[1:3]
    maps, errors = (part.float().unflatten(1, grid) for part in (mean, error))  # (B, rows, cols, C) each
    return replace(explanation, attributions=maps, standard_errors=errors, evaluations=spent)


def _sampled(game: BatchGame, prior: Tensor, ends: Tensor, plan: Plan, first: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and error (B, N, C) after as many rounds as each image takes, and what it has spent (B,).

    Args:
        game: of B images.
        prior: (B, N, C), predicted Shapley values.
        ends: (B, 2, C), the values of nobody and of everybody.
        plan: how many evaluations.
        first: the number of the first image.
    """
    batch, players, shown = prior.shape
    mean, error = prior.double(), torch.full_like(prior, torch.nan, dtype=torch.float64)
    spent = torch.zeros(batch, dtype=torch.int64, device="cpu")
    # Of the images that are not done yet, (b,): their coalitions and values so far.
    images = torch.arange(batch, device="cpu")
    coalitions, values = (
        torch.empty(batch, 0, players, dtype=torch.bool, device="cpu"),
        torch.empty(batch, 0, shown, device="cpu"),
    )
    for turn, total in enumerate(plan.totals):
        new = plan.coalitions(turn, (first + images).tolist(), players)  # (b, m, N)
        coalitions = torch.cat([coalitions, new], dim=1)  # (b, M, N)
        values = torch.cat([values, game.values(images, new)], dim=1)  # (b, M, C)
        found = shapley_posterior(prior[images], coalitions, values, *ends[images].unbind(1))
        mean[images], error[images], spent[images] = found.mean, found.standard_error, total
        open_ = found.relative_error.amax(dim=1) > plan.relative_error  # (b,)
        images, coalitions, values = images[open_], coalitions[open_], values[open_]
        if not len(images):
            break
    return mean, error, spent


def _sparing(
    game: BatchGame, image: int, prior: Tensor, ends: Tensor, plan: Plan, number: int
) -> tuple[Posterior, int]:
    """`_sampled` for one image of few players, whose coalitions are soon drawn again: each is evaluated once.

    In the first round that could pay for every coalition, those that are left are evaluated: the values are exact then.

    Args:
        game: of the batch.
        image: its place in the batch.
        prior: (N, C), predicted Shapley values.
        ends: (2, C), the values of nobody and of everybody.
        plan: how many evaluations.
        number: the image's among all that are explained.

    Returns:
        The posterior, and the evaluations spent.
    """
    players = len(prior)
    every, source = all_coalitions(players), plan.source(0, 1 + number)  # (2**N, N)
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
    for _ in range(REPEATS):
        sizes = sample_sizes(players, max(count, FIRST_ROUND) // 2, source)  # (m / 2,)
        coalitions = sample_in_turns(players, sizes, source)  # (m, N)
        pairs = (
            (coalitions.long() << torch.arange(players, device="cpu")).sum(dim=1).unflatten(0, (-1, 2))
        )  # (m / 2, 2)
        for pair in pairs.tolist():
            if len(new) == count:
                return rows
            rows += pair
            new.update(set(pair) - known)
    return rows


def _enumerated(game: BatchGame, images: Tensor, ends: Tensor, players: int) -> Posterior:
    """The Shapley values (b, N, C) of some images (b,), given the values of nobody and of everybody (b, 2, C)."""
    proper = all_coalitions(players)[1:-1].expand(len(images), -1, -1)  # (b, 2**N - 2, N)
    values = torch.cat([ends[:, :1], game.values(images, proper), ends[:, 1:]], dim=1)  # (b, 2**N, C)
    found = exact_posterior(values.transpose(0, 1))  # (N, b, C)
    return Posterior(found.mean.transpose(0, 1), found.standard_error.transpose(0, 1))
