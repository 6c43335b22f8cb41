"""Do attributions say by how much the value drops when players are removed at random?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shapadapter.core.statistics import generator_of, is_constant, pearson
from shapadapter.evaluation.agreement import informed
from shapadapter.evaluation.games import Games


def removal_coalitions(players: int, removed: int, count: int, generator: torch.Generator) -> Tensor:
    """Draw coalitions that lack one number of players, each set of them being equally likely.

    Args:
        players: Number of players N, at least 2.
        removed: How many players are absent in each, 1 to N - 1.
        count: Number of coalitions M.
        generator: Source of randomness; the coalitions lie on its device.

    Returns:
        (M, N) bool, True = present, independent of each other.

    Raises:
        ValueError: If `removed` is not in 1 .. N - 1.
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
        (...) float64 in -1 .. 1; nan where the predicted or the true drops are all the same, as with a map of zeros or of
        equal shares.

    Raises:
        ValueError: If the coalitions are not all of one size: larger coalitions have larger values, and the
            correlation would be high for that alone.
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
    """The faithfulness correlation (Bhatt et al. 2020): `sensitivity_n` for one chosen number of removed players.

    Args:
        attributions: (..., N) attribution of each player to one class.
        coalitions: (..., M, N) bool, True = present, all of one size; 100 of them in the paper.
        values: (..., M) value of each coalition.
        full_values: (...) value with all players present.

    Returns:
        (...) float64 in -1 .. 1; nan as in `sensitivity_n`.

    Raises:
        ValueError: If the coalitions are not all of one size.
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
        rescale: Multiply each image's attributions by the factor that makes the error smallest, for methods without
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
    """`infidelity` divided by the variance of the true drops, so that images and models can be compared.

    Args:
        attributions: (..., N) attribution of each player to one class.
        coalitions: (..., M, N) bool, True = present, of any law. Leading dimensions broadcast.
        values: (..., M) value of each coalition.
        full_values: (...) value with all players present.
        rescale: As in `infidelity`.

    Returns:
        (...) float64 without a unit: 0 is perfect, 1 what the mean drop, said of every coalition, would get; a map
        of zeros gets 1 or more. nan where the true drops are all the same.
    """
    error = infidelity(attributions, coalitions, values, full_values, rescale)  # (...)
    variance = (
        values.double().var(dim=-1, correction=0).masked_fill(is_constant(values), torch.nan)
    )  # (..., M) -> (...)
    return error / variance


def _drops(attributions: Tensor, coalitions: Tensor, values: Tensor, full_values: Tensor) -> tuple[Tensor, Tensor]:
    """The predicted and the true drop of each coalition, (..., M) each, in float64."""
    removed = (~coalitions).double()  # (..., M, N)
    predicted = (removed @ attributions.double()[..., None])[..., 0]  # (..., M, N) @ (..., N, 1) -> (..., M)
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
