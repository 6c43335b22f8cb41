"""The kernel law of coalitions, and the Shapley objective as arithmetic on attributions and coalition values.

A coalition is a row of booleans, True = the player is present. The Shapley values are the minimiser of the squared
error of `v(empty) + sum_{n in S} phi_n` to `v(S)` under the *kernel law* of S and the efficiency constraint
`v(empty) + sum_n phi_n = v(all)` (Charnes et al. 1988; Lundberg & Lee 2017).

Shapes throughout: B images, N players, K classes, M coalitions per image. Sums of the losses are taken in float32 at
least, whatever the dtype of the inputs and inside autocast too: efficiency is a matter of 1e-5, bfloat16 of 1e-2.
"""

import zlib

import numpy as np
import torch
from torch import Tensor

MAX_ENUMERATED_PLAYERS = 16
"""The most players whose `2**N` coalitions are enumerated: 65,536 model evaluations."""

SCALE_FLOOR = 1e-8
"""The least scale to divide the loss by, so that a model that says nothing yet does not explode."""


def seed_of(seed: int, *key: int | str) -> int:
    """The seed of what `key` names, as an image's index and a purpose.

    The same in batches of any size, in any order and after an interruption, and independent of that of any other key.
    """
    words = [zlib.crc32(part.encode()) if isinstance(part, str) else part for part in key]
    return int(np.random.SeedSequence([seed % 2**32, *words]).generate_state(1)[0])


def generator_of(seed: int, *key: int | str) -> torch.Generator:
    """A generator with the seed `seed_of(seed, *key)`, on the CPU."""
    return torch.Generator().manual_seed(seed_of(seed, *key))


def size_distribution(players: int) -> Tensor:
    """The kernel law of coalition sizes: `p(s)` proportional to `1 / (s (N - s))` for `s = 1 .. N - 1`.

    The Shapley kernel `(N - 1) / (C(N, s) s (N - s))` of Lundberg & Lee (2017), summed over the `C(N, s)` coalitions
    of size `s`. The empty and the full coalition have no place in it: the efficiency constraint already fixes them.

    Returns:
        (N - 1,) float64 probabilities; entry `i` belongs to size `i + 1`.

    Raises:
        ValueError: There are fewer than 2 players.
    """
    if players < 2:
        raise ValueError(f"a coalition that is neither empty nor full needs at least 2 players, but got {players}")
    sizes = torch.arange(1, players, dtype=torch.float64, device="cpu")  # (N - 1,)
    weights = 1 / (sizes * (players - sizes))
    return weights / weights.sum()


def sample_sizes(players: int, count: int, generator: torch.Generator) -> Tensor:
    """Draw independent coalition sizes from the kernel law (`size_distribution`): (count,) int64 in `1 .. N - 1`."""
    # float32, because not every accelerator knows float64; the law is kept to 1e-7.
    law = size_distribution(players).float().to(generator.device)
    return torch.multinomial(law, count, replacement=True, generator=generator) + 1


def sample_pairs(
    batch: int, players: int, pairs: int, generator: torch.Generator, sizes: Tensor | None = None
) -> Tensor:
    """Draw pairs of a coalition and its complement for each image of a batch, all images with the same sizes.

    One size per pair for the whole batch keeps "the present players of every image" a rectangular tensor, so that
    absent players can be dropped instead of masked. The size follows the kernel law, and given the size each image
    has a uniform subset of its own. The law is symmetric in `s` and `N - s`, so the complement follows it too;
    using both lowers the variance (paired sampling, Covert & Lee 2021).

    Args:
        batch: Number of images B.
        players: Number of players N, at least 2.
        pairs: Number of pairs P per image.
        generator: Source of randomness; the coalitions lie on its device.
        sizes: (P,) sizes in `1 .. N - 1` to use instead of drawn ones.

    Returns:
        (B, 2 P, N) bool, True = present. Column `2 p` has size `sizes[p]`, column `2 p + 1` is its complement.

    Raises:
        ValueError: There are fewer than 2 players, or the sizes are not P numbers in `1 .. N - 1`.
    """
    if sizes is None:
        sizes = sample_sizes(players, pairs, generator)  # (P,)
    elif sizes.shape != (pairs,) or not bool(((sizes >= 1) & (sizes < players)).all()):
        raise ValueError(f"sizes must be {pairs} numbers in 1 .. {players - 1}, but got {sizes.tolist()}")
    noise = torch.rand(batch, pairs, players, generator=generator, device=generator.device)  # (B, P, N)
    order = noise.argsort(dim=-1)  # (B, P, N): a uniform permutation of 0 .. N - 1 in each row
    present = order < sizes.to(generator.device)[:, None]  # (B, P, N)
    return torch.stack([present, ~present], dim=2).flatten(1, 2)  # (B, P, 2, N) -> (B, 2 P, N)


def sample_in_turns(players: int, sizes: Tensor, generator: torch.Generator) -> Tensor:
    """Draw pairs of a coalition and its complement in which the players take turns.

    As `sample_pairs` for one image: every coalition is a uniform subset of its size. But up to a third of the players,
    coalitions of one size are successive parts of one random order of the players, so that none is drawn again before
    it is the others' turn. That lowers the error of a fit: by a quarter on random games of 8 or 12 players, by about
    5 % with 64. Larger parts of one order would nearly be each other's complements, and those are evaluated anyway.

    Args:
        players: Number of players N, at least 2.
        sizes: (P,) int64, sizes of the kernel law (`sample_sizes`), in any order.
        generator: Source of randomness, on the CPU.

    Returns:
        (2 P, N) bool, True = present. Row `2 p` has size `min(s, N - s)` of the size s = `sizes[p]`, row `2 p + 1` is
        its complement.
    """
    smaller = torch.minimum(sizes, players - sizes)  # (P,)
    present = torch.empty(len(sizes), players, dtype=torch.bool, device="cpu")  # (P, N)
    for size in smaller.unique().tolist():
        places = (smaller == size).nonzero()[:, 0]  # (p,)
        parts = players // size if 3 * size <= players else 1
        drawn = torch.rand(-(-len(places) // parts), 1, players, generator=generator, device="cpu")
        rank = drawn.argsort(-1)  # (orders, 1, N): a uniform order each
        part = torch.arange(parts, device="cpu")[:, None]  # (parts, 1)
        turns = (rank >= part * size) & (rank < (part + 1) * size)  # (orders, parts, N)
        present[places] = turns.flatten(0, 1)[: len(places)]  # (orders * parts, N) -> (p, N)
    return torch.stack([present, ~present], dim=1).flatten(0, 1)  # (P, 2, N) -> (2 P, N)


def sample_paired_coalitions(players: int, count: int, generator: torch.Generator) -> Tensor:
    """Draw M = `count` coalitions of one image for `kernel_shap`, as `sample_pairs`: (M, N) bool, True = present.

    Raises:
        ValueError: The count is not a positive even number, or there are fewer than 2 players.
    """
    if count < 2 or count % 2:
        raise ValueError(f"coalitions come in pairs: count must be a positive even number, but got {count}")
    return sample_pairs(1, players, count // 2, generator)[0]  # (1, M, N) -> (M, N)


def pays_for_all(evaluations: int, players: int) -> bool:
    """Whether so many model evaluations are enough for every coalition but nobody and everybody, `2**N - 2` of them.

    Sampling with such a budget would be no cheaper than the exact values, and not exact.
    """
    return players <= MAX_ENUMERATED_PLAYERS and evaluations >= 2**players - 2


def all_coalitions(players: int) -> Tensor:
    """Enumerate every coalition, (2**N, N) bool: player `n` is present in row `i` if bit `n` of `i` is set.

    Raises:
        ValueError: There are more than 16 players.
    """
    if players > MAX_ENUMERATED_PLAYERS:
        raise ValueError(
            f"{players} players have 2**{players} coalitions; at most {MAX_ENUMERATED_PLAYERS} players can be "
            "enumerated. Estimate the values with `kernel_shap` instead."
        )
    rows = torch.arange(2**players, device="cpu")[:, None]  # (2**N, 1)
    return (rows >> torch.arange(players, device="cpu")) & 1 == 1  # (2**N, N)


# -- the objective ----------------------------------------------------------------------------------------------------


def _precise(values: Tensor) -> Tensor:
    """The same values in float32, or in float64 if they are so already."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def coalition_sums(attributions: Tensor, coalitions: Tensor) -> Tensor:
    """What attributions (B, N, K) predict for `v(S) - v(empty)`: their sum over the players present, (B, M, K).

    Args:
        attributions: (B, N, K) attribution of each player to each class.
        coalitions: (B, M, N) bool, True = present.
    """
    attributions = _precise(attributions)
    with torch.autocast(attributions.device.type, enabled=False):  # it would multiply in bfloat16
        return coalitions.to(attributions.dtype) @ attributions  # (B, M, N) @ (B, N, K) -> (B, M, K)


def gains(coalition_values: Tensor, null_values: Tensor) -> Tensor:
    """`v(S) - v(empty)`, (B, M, K) in float32 at least, of values (B, M, K) and (B, K).

    The null values are a constant here. In `vote` prediction they are a parameter that stands on both sides of the
    difference; a gradient into them leads the model to say the same about every image, the trivial minimum.
    """
    return _precise(coalition_values) - _precise(null_values.detach())[:, None]  # (B, K) -> (B, 1, K) -> (B, M, K)


def expected_square(attributions: Tensor) -> Tensor:
    """What the squares of `coalition_sums` are on average over the kernel law: the scale of the Shapley loss.

    For one class it is `((1 - 1/H) (sum phi)^2 + sum phi^2 / H) / 2` with `H = 1 + 1/2 + ... + 1/(N - 1)`, since under
    the kernel law a player is present with probability 1/2 and two with `(1 - 1/H) / 2`. It does not depend on the
    coalitions that were drawn: a scale that did, like the mean square of their values, would weigh small and large
    coalitions otherwise than the kernel law, and the minimiser would no longer be the Shapley value.

    Returns:
        (B,) the mean over the classes of (B, N, K), without a gradient, at least `SCALE_FLOOR`.
    """
    attributions = _precise(attributions.detach())  # (B, N, K)
    harmonic = sum(1 / size for size in range(1, attributions.shape[1]))
    total, squares = attributions.sum(dim=1).square(), attributions.square().sum(dim=1)  # (B, K) each
    return ((total + (squares - total) / harmonic) / 2).mean(dim=1).clamp(min=SCALE_FLOOR)  # (B,)


def shapley_loss(attributions: Tensor, coalitions: Tensor, coalition_values: Tensor, null_values: Tensor) -> Tensor:
    """The Shapley loss: how far the attributions are from explaining the coalitions, relative to their values.

    For each image the mean square of `v(S) - v(empty) - sum_{n in S} phi_n`, divided by `expected_square`; then the mean
    over images. For coalitions of the kernel law and attributions that obey efficiency, its minimiser is the Shapley value
    (Charnes et al. 1988; Lundberg & Lee 2017; as a loss to train with: FastSHAP, Jethani et al. 2022). The division
    makes it free of the scale of the logits, image by image, so that accumulated micro-batches add up to the whole
    batch. The divisor has no gradient, or larger attributions alone would lower the loss.

    Args:
        attributions: (B, N, K) attributions that obey efficiency (`project_on_efficiency`, or by construction).
        coalitions: (B, M, N) bool, True = present, drawn from the kernel law (`sample_pairs`).
        coalition_values: (B, M, K) values `v(S)`. A gradient flows through them unless the caller detaches them.
        null_values: (B, K) values `v(empty)`; no gradient flows through them (`gains` says why).

    Returns:
        Scalar without a unit: 0 for a perfect fit.
    """
    sums = coalition_sums(attributions, coalitions)  # (B, M, K)
    return shapley_loss_of_sums(sums, expected_square(attributions), coalition_values, null_values)


def shapley_loss_of_sums(sums: Tensor, loss_scale: Tensor, coalition_values: Tensor, null_values: Tensor) -> Tensor:
    """`shapley_loss` of attributions of which only the `coalition_sums` and their `expected_square` are known.

    Args:
        sums: (B, M, K) sum of the attributions of the players present.
        loss_scale: (B,) `expected_square` of the attributions.
        coalition_values: (B, M, K) values `v(S)`.
        null_values: (B, K) values `v(empty)`; no gradient flows through them.
    """
    residuals = gains(coalition_values, null_values) - _precise(sums)  # (B, M, K)
    return (residuals.square().mean(dim=(1, 2)) / loss_scale).mean()


@torch.no_grad()
def coalition_fit(
    sums: Tensor, coalitions: Tensor, coalition_values: Tensor, null_values: Tensor, full_values: Tensor
) -> tuple[Tensor, Tensor]:
    """How much of the coalition values the attributions explain beyond the mere size of the coalition (R squared).

    Where `v(S)` grows with the number of present players, equal shares of `v(all) - v(empty)` make the Shapley loss
    small already. Here they are the zero of the scale.

    Args:
        sums: (B, M, K) sum of the attributions of the players present (`coalition_sums`).
        coalitions: (B, M, N) bool, True = present.
        coalition_values: (B, M, K) values `v(S)`.
        null_values: (B, K) values `v(empty)`.
        full_values: (B, K) values `v(all)`.

    Returns:
        explained, total: two scalars without gradient, to be summed over batches; a mean of ratios would hang on the
        batches in which sizes explain most. Their ratio is 1 for a perfect fit, 0 for one no better than equal shares,
        negative for a worse one.
    """
    found = gains(coalition_values, null_values)  # (B, M, K)
    share = coalitions.to(found.dtype).mean(dim=2, keepdim=True)  # (B, M, N) -> (B, M, 1)
    equal = share * gains(full_values[:, None], null_values)  # (B, M, K)
    left, total = ((found - expected).square().sum() for expected in (_precise(sums), equal))
    return total - left, total


def project_on_efficiency(raw: Tensor, full_values: Tensor, null_values: Tensor) -> Tensor:
    """Move attributions (B, N, K) to the nearest point at which they sum to `v(all) - v(empty)`, of (B, K) each.

    Every player gets the same.
    """
    raw = _precise(raw)
    missing = _precise(full_values) - _precise(null_values) - raw.sum(dim=1)  # (B, K)
    return raw + missing[:, None] / raw.shape[1]  # (B, N, K)


def warmup_weight(weight: float, progress: float, warmup: float) -> float:
    """The weight of the Shapley loss after a share `progress` of the training: a linear ramp over `warmup`, then constant."""
    return weight * min(1.0, progress / warmup) if warmup > 0 else weight


def contrastive_loss(similarity: Tensor, matches: Tensor) -> Tensor:
    """Cross-entropy over the rows and over the columns of a similarity, half each (Radford et al. 2021).

    Args:
        similarity: (B, T) similarity of images and texts before softmax.
        matches: (B, T) bool, which belong together, at least one in each row and column. Several matches share the
            target evenly; with one for each, this is the loss of CLIP.
    """
    logits = _precise(similarity)
    target = matches.to(logits.dtype)
    rows, cols = (
        -(target / target.sum(dim=d, keepdim=True) * logits.log_softmax(dim=d)).sum(dim=d).mean() for d in (1, 0)
    )
    return (rows + cols) / 2


def pairwise_sigmoid_loss(similarity: Tensor, matches: Tensor) -> Tensor:
    """Binary cross-entropy of each pair, summed over images and averaged over texts (Zhai et al. 2023).

    Args:
        similarity: (B, T) similarity of images and texts before the sigmoid.
        matches: (B, T) bool, which belong together.
    """
    logits = _precise(similarity)
    return -torch.nn.functional.logsigmoid((2 * matches.to(logits.dtype) - 1) * logits).sum(dim=0).mean()
