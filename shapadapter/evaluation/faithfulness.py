"""Do attributions say what players are worth? Their error to the Shapley values, and drops when players go at random."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from shapadapter.adapter.coalitions import evaluate_coalitions
from shapadapter.core.estimates import exact_shapley_values, kernel_shap, kernel_shap_error
from shapadapter.core.shapley import (
    MAX_ENUMERATED_PLAYERS,
    all_coalitions,
    generator_of,
    pays_for_all,
    sample_pairs,
    sample_sizes,
)
from shapadapter.core.statistics import is_constant, pearson, relative_l2, spearman, top_k_overlap
from shapadapter.explanation.passes import Predicted

# -- the game --------------------------------------------------------------------------------------------------------


class Scores(NamedTuple):
    """Logits of the explained class, (B, M) float64, and their probabilities; of quantities the same numbers again."""

    values: Tensor
    likelihoods: Tensor


class Games:
    """The games of B images, for one class each, played together; `rows` coalitions in all go in a forward pass."""

    def __init__(self, model: nn.Module, batch: Predicted, rows: int) -> None:
        self.model, self.batch, self.rows = model, batch, rows
        self.classes = batch.classes[:, 0]  # (B,)
        self.players = batch.tiling.count
        self.full = self._read(batch.output.logits[:, None])  # (B, 1)
        self.null = self._read(batch.output.null_values[:, None])  # (B, 1)

    def play(self, coalitions: Tensor) -> Scores:
        """The scores (B, M) of coalitions (B, M, N) bool; fastest where a column holds coalitions of one size."""
        each = self.rows // len(self.classes)
        found = evaluate_coalitions(self.model, self.batch.inputs, coalitions, each, self._stacked)  # (B, M, 2)
        return Scores(*found.unbind(-1))

    def _stacked(self, logits: Tensor) -> Tensor:
        scores = self._read(logits)
        return torch.stack([scores.values, scores.likelihoods], dim=-1)  # (B, m, 2)

    def _read(self, logits: Tensor) -> Scores:
        """The explained class's scores (B, m) in logits (B, m, K)."""
        logits = logits.double()
        index = self.classes.to(logits.device)[:, None, None].expand(-1, logits.shape[1], 1)  # (B, m, 1)
        values = logits.gather(2, index)[..., 0]  # (B, m)
        if self.batch.likelihood == "softmax":
            likelihoods = (values - logits.logsumexp(dim=2)).exp()  # (B, m)
        else:
            likelihoods = values.sigmoid() if self.batch.likelihood == "sigmoid" else values
        return Scores(values.cpu(), likelihoods.cpu())


# -- the error to the Shapley values ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Truth:
    """Shapley values of the explained class of B images, and KernelSHAP's way towards them, all float64.

    Attributes:
        values: (B, N).
        errors: (B,) their own relative L2 error, estimated; 0 where they are exact.
        estimates: (B, budgets, N) KernelSHAP with each budget, on coalitions of its own; exact if it pays for all.
    """

    values: Tensor
    errors: Tensor
    estimates: Tensor


def is_exact(players: int) -> bool:
    """Whether so many players' coalitions are enumerated."""
    return players <= MAX_ENUMERATED_PLAYERS


def find_truth(games: Games, indices: Sequence[int], evaluations: int, budgets: Sequence[int], seed: int) -> Truth:
    """Enumerate, up to 16 players, or run KernelSHAP with many pairs, drawn for the images' places `indices` (B,).

    The coalitions of the budgets are independent of the truth's, those of a small budget the first of a larger one's.
    """
    ends = games.null.values, games.full.values  # (B, 1) each
    stream = _draw(games.players, indices, budgets[-1], seed, "budgets")  # (B, M, N)
    if is_exact(games.players):
        table = games.play(all_coalitions(games.players).expand(len(indices), -1, -1)).values  # (B, 2^N)
        values = exact_shapley_values(table.t()).t()  # (2^N, B) -> (N, B) -> (B, N)
        errors = torch.zeros(len(indices), dtype=torch.float64, device="cpu")
        bits = torch.arange(games.players, device="cpu")
        streamed = table.gather(1, (stream.long() << bits).sum(dim=-1))  # (B, M): the table's row of each coalition
    else:
        drawn = _draw(games.players, indices, evaluations, seed, "truth")  # (B, M', N)
        played = games.play(torch.cat([drawn, stream], dim=1)).values[..., None]  # (B, M' + M, 1)
        values = kernel_shap(drawn, played[:, :evaluations], *ends)[..., 0]  # (B, N)
        errors = kernel_shap_error(drawn, played[:, :evaluations], *ends)[:, 0]  # (B, 1) -> (B,)
        streamed = played[:, evaluations:, 0]  # (B, M)
    fits = [
        values
        if pays_for_all(budget, games.players)
        else kernel_shap(stream[:, :budget], streamed[:, :budget, None], *ends)[..., 0]
        for budget in budgets
    ]  # (B, N) each
    return Truth(values, errors, torch.stack(fits, dim=1))


def _draw(players: int, indices: Sequence[int], count: int, seed: int, purpose: str) -> Tensor:
    """Pairs of the kernel law for each image, (B, M, N): of the same sizes for all, each with subsets of its own."""
    nobody = 2**32 - 1  # a place that no image has
    sizes = sample_sizes(players, count // 2, generator_of(seed, nobody, purpose))  # (P,)
    drawn = [sample_pairs(1, players, count // 2, generator_of(seed, i, purpose), sizes) for i in indices]
    return torch.cat(drawn)  # (B, 2 P, N)


def agreement(maps: Tensor, truth: Tensor, units: Sequence[bool]) -> dict[str, Tensor]:
    """Distance and likeness of maps (B, methods, N) to the truth (B, N), (B, methods) each.

    `units` says whether each method speaks of the value: an error in its unit means nothing for the others.
    """
    true = truth[:, None]  # (B, 1, N)
    error = relative_l2(maps, true).masked_fill(~torch.tensor(units, device="cpu"), torch.nan)  # (B, methods)
    return {
        "error": error,
        "pearson": _informed(pearson(maps, true), maps),
        "spearman": _informed(spearman(maps, true), maps),
        "top_k_overlap": top_k_overlap(maps, true, top_count(truth.shape[-1])),
    }


def _informed(correlation: Tensor, maps: Tensor) -> Tensor:
    """Correlations (B, methods), 0 where the map (B, methods, N) is constant."""
    # Left out of the mean, the images on which a method says nothing would raise its score.
    return correlation.masked_fill(is_constant(maps) & correlation.isnan(), 0.0)


def top_count(players: int) -> int:
    """How many players are the top: a tenth, rounded up."""
    return math.ceil(players / 10)


# -- players removed at random ---------------------------------------------------------------------------------------


def removal_coalitions(players: int, removed: int, count: int, generator: torch.Generator) -> Tensor:
    """Draw coalitions that lack one number of players, each set of them being equally likely.

    Args:
        players: number of players N, at least 2.
        removed: how many players are absent in each, 1 to N - 1.
        count: number of coalitions M.
        generator: source of randomness; the coalitions lie on its device.

    Returns:
        (M, N) bool, True = present, independent of each other.

    Raises:
        ValueError: `removed` is not in 1 .. N - 1.
    """
    if not 1 <= removed < players:
        raise ValueError(f"removed must be in 1 .. {players - 1} for {players} players, but got {removed}.")
    noise = torch.rand(count, players, generator=generator, device=generator.device)  # (M, N)
    return noise.argsort(dim=-1) >= removed  # (M, N): a uniform permutation of 0 .. N - 1 in each row


def sensitivity_n(attributions: Tensor, coalitions: Tensor, values: Tensor, full_values: Tensor) -> Tensor:
    """Sensitivity-n for one n: the correlation of predicted and true drops (Ancona et al. 2018).

    Pearson's correlation, over coalitions that each lack n players, of the sum of the removed players' attributions
    with `v(all) - v(S)`. Blind to a common factor in the attributions; 1 for every n in a linear game.

    Args:
        attributions: (..., N) attribution of each player to one class.
        coalitions: (..., M, N) bool, True = present, all of one size (`removal_coalitions`). Leading dimensions
            broadcast: (M, N) serves all images.
        values: (..., M) value of each coalition.
        full_values: (...) value with all players present.

    Returns:
        (...) float64 in -1 .. 1; nan where the predicted or the true drops are all the same, as with equal shares.

    Raises:
        ValueError: the coalitions are not all of one size: larger ones have larger values, and the correlation would be
            high for that alone.
    """
    sizes = coalitions.sum(dim=-1)  # (..., M, N) -> (..., M)
    if bool((sizes != sizes.flatten()[0]).any()):
        raise ValueError(
            f"sensitivity-n removes one number of players, but the coalitions have {int(sizes.min())} to "
            f"{int(sizes.max())} present. Draw them with `removal_coalitions` and call it for each number."
        )
    correlation = pearson(*_drops(attributions, coalitions, values, full_values))  # (..., M), (..., M) -> (...)
    # The sums of equal attributions differ in their rounding; a correlation would be that of noise.
    return correlation.masked_fill(is_constant(attributions), torch.nan)


def faithfulness_correlation(attributions: Tensor, coalitions: Tensor, values: Tensor, full_values: Tensor) -> Tensor:
    """The faithfulness correlation (Bhatt et al. 2020): `sensitivity_n` for one chosen n; arguments and result as there.

    The paper draws 100 coalitions.
    """
    return sensitivity_n(attributions, coalitions, values, full_values)


def infidelity(
    attributions: Tensor, coalitions: Tensor, values: Tensor, full_values: Tensor, rescale: bool = False
) -> Tensor:
    """The mean squared error of the predicted drops: `E[(I^T phi - (v(all) - v(S)))^2]` (Yeh et al. 2019).

    I is 1 for the players outside S. With coalitions of the kernel law this is the Shapley loss, seen from the full
    coalition.

    Args:
        attributions: (..., N) attribution of each player to one class.
        coalitions: (..., M, N) bool, True = present, of any law. Leading dimensions broadcast.
        values: (..., M) value of each coalition.
        full_values: (...) value with all players present.
        rescale: multiply each image's attributions by the factor that makes the error smallest, for methods without
            a unit (as `captum.metrics.infidelity(normalize=True)`). The factor may be negative.

    Returns:
        (...) float64 in the unit of the values, squared: 0 is perfect.
    """
    predicted, true = _drops(attributions, coalitions, values, full_values)  # (..., M)
    if rescale:
        energy = predicted.square().sum(dim=-1, keepdim=True)  # (..., 1)
        factor = (predicted * true).sum(dim=-1, keepdim=True) / energy  # (..., 1)
        predicted = predicted * factor.masked_fill(energy == 0, 0)  # (..., M)
    return (predicted - true).square().mean(dim=-1)  # (..., M) -> (...)


def normalised_infidelity(
    attributions: Tensor, coalitions: Tensor, values: Tensor, full_values: Tensor, rescale: bool = False
) -> Tensor:
    """`infidelity` divided by the variance of the true drops, so that images and models compare; arguments as there.

    Returns:
        (...) float64 without a unit: 0 is perfect, 1 what the mean drop, said of every coalition, would get; a map
        of zeros gets 1 or more. nan where the true drops are all the same.
    """
    error = infidelity(attributions, coalitions, values, full_values, rescale)  # (...)
    return error / values.double().var(dim=-1, correction=0).masked_fill(is_constant(values), torch.nan)


def _drops(attributions: Tensor, coalitions: Tensor, values: Tensor, full_values: Tensor) -> tuple[Tensor, Tensor]:
    """The predicted and the true drop of each coalition, (..., M) each, in float64."""
    predicted = ((~coalitions).double() @ attributions.double()[..., None])[
        ..., 0
    ]  # (..., M, N), (..., N) -> (..., M)
    return predicted, full_values.double()[..., None] - values.double()  # (..., M)


SHARES = (0.1, 0.25, 0.5, 0.75, 0.9)
"""Of the players, removed for sensitivity-n; one n for each."""

FAITHFULNESS_SHARE = 0.25
"""Of the players, removed for the faithfulness correlation."""

DRAWS = 100
"""Coalitions for each n."""


def removed_counts(players: int) -> list[int]:
    """The n of sensitivity-n, rising."""
    return sorted({_count(players, share) for share in SHARES})


def _count(players: int, share: float) -> int:
    return min(max(round(share * players), 1), players - 1)


def sensitivity(games: Games, maps: Tensor, indices: Sequence[int], seed: int) -> dict[str, Tensor]:
    """Sensitivity-n and infidelity of maps (B, methods, N), means over n, and the faithfulness correlation, (B, methods).

    The infidelity is that of the map times the factor that suits it best, divided by the variance of the true drops: no
    method is punished for its unit, and equal shares for all players get 1. So does a map that points the wrong way.
    """
    counts = removed_counts(games.players)
    generators = [generator_of(seed, index, "sensitivity") for index in indices]
    drawn = [removal_coalitions(games.players, n, DRAWS, one) for one in generators for n in counts]  # (draws, N) each
    coalitions = torch.stack(drawn).unflatten(0, (len(indices), len(counts)))  # (B, n's, draws, N)
    values = games.play(coalitions.flatten(1, 2)).values.unflatten(1, coalitions.shape[1:3])  # (B, n's, draws)
    correlations, distances = [], []
    for place in range(len(counts)):
        # (B, 1, ...): the same coalitions for every method
        given = coalitions[:, None, place], values[:, None, place], games.full.values
        correlations.append(_informed(sensitivity_n(maps, *given), maps))  # (B, methods)
        predicted, true = _drops(maps, *given)  # (B, methods, draws), (B, 1, draws)
        backwards = ((predicted - predicted.mean(dim=-1, keepdim=True)) * true).mean(dim=-1) < 0  # (B, methods)
        distances.append(normalised_infidelity(maps, *given, rescale=True).masked_fill(backwards, 1.0))
    return {
        "sensitivity_n": torch.stack(correlations).nanmean(dim=0),
        # With one number of players removed, sensitivity-n is the faithfulness correlation.
        "faithfulness_correlation": correlations[counts.index(_count(games.players, FAITHFULNESS_SHARE))],
        "infidelity": torch.stack(distances).nanmean(dim=0),
    }
