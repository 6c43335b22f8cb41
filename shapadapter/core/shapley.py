"""Shapley values as arithmetic: the kernel law of coalitions, exact values by enumeration, and KernelSHAP.

A coalition is a row of booleans, True = the player is present. The Shapley values are the minimiser of the squared
error of `v(empty) + sum_{n in S} phi_n` to `v(S)` under the *kernel law* of S and the efficiency constraint
`v(empty) + sum_n phi_n = v(all)` (Charnes et al. 1988; Lundberg & Lee 2017). Everything here follows from that:
what is sampled, what is fitted, and what the truth is that a fit can be compared with.
"""

import math
import zlib

import numpy as np
import torch
from torch import Tensor

MAX_ENUMERATED_PLAYERS = 16
"""The most players whose `2**N` coalitions are enumerated: 65,536 model evaluations."""


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


def exact_shapley_values(values: Tensor) -> Tensor:
    """The Shapley values of a game whose every coalition has been evaluated.

    `phi_n = sum over S without n of |S|! (N - 1 - |S|)! / N! * (v(S + n) - v(S))` (Shapley 1953), written as one
    matrix product: each coalition enters with a positive weight for its members and a negative one for the others.

    Args:
        values: (2**N, ...) value of each coalition in the order of `all_coalitions`, N at least 1.

    Returns:
        (N, ...) float64 Shapley values, in the unit of the values.

    Raises:
        ValueError: The number of values is not a power of two from `2**1` to `2**16`.
    """
    players = len(values).bit_length() - 1
    if players < 1 or len(values) != 2**players:
        raise ValueError(f"expected the values of all 2**N coalitions of N >= 1 players, but got {len(values)} values")
    present = all_coalitions(players).to(values.device)  # (2**N, N)
    sizes = present.sum(1, keepdim=True)  # (2**N, 1)
    law = [1 / (players * math.comb(players - 1, size)) for size in range(players)]
    joining = torch.tensor(law, dtype=torch.float64, device=values.device)  # (N,) by the size before joining
    weights = torch.where(present, joining[(sizes - 1).clamp(min=0)], -joining[sizes.clamp(max=players - 1)])
    return torch.tensordot(weights, values.double(), dims=([0], [0]))  # (2**N, N), (2**N, ...) -> (N, ...)


def kernel_shap(coalitions: Tensor, values: Tensor, null_values: Tensor, full_values: Tensor) -> Tensor:
    """Estimate Shapley values by least squares on sampled coalitions, with efficiency as an exact constraint.

    KernelSHAP (Lundberg & Lee 2017) for coalitions drawn *from* the kernel law, which therefore all count the same.
    Written as deviations from equal shares of `v(all) - v(empty)`, the constraint says that the deviations sum to
    zero, and centring the rows of the design matrix enforces it. Where the coalitions do not determine the values
    (fewer than N - 1 independent ones; a pair counts once), the solution nearest to equal shares is returned.

    Args:
        coalitions: (..., M, N) bool, True = present, drawn from the kernel law (`sample_paired_coalitions`).
        values: (..., M, K) value of each coalition for each of K classes. Leading dimensions broadcast.
        null_values: (..., K) value of the empty coalition.
        full_values: (..., K) value of the full coalition.

    Returns:
        (..., N, K) float64 estimates in the unit of the values; they sum to `full_values - null_values`.
    """
    present = coalitions.double()  # (..., M, N)
    shares = present.mean(-1, keepdim=True)  # (..., M, 1): |S| / N
    null, total = null_values.double()[..., None, :], (full_values.double() - null_values.double())[..., None, :]
    surplus = values.double() - null - shares * total  # (..., M, K): what equal shares leave unexplained
    # The centred rows have no component along (1, ..., 1): its singular value is rounding and must be cut off.
    inverse = torch.linalg.pinv(present - shares, rtol=1e-10)  # (..., N, M)
    return total / coalitions.shape[-1] + inverse @ surplus  # (..., N, K)


def kernel_shap_error(coalitions: Tensor, values: Tensor, null_values: Tensor, full_values: Tensor) -> Tensor:
    """Estimate the relative L2 error of `kernel_shap` on the same arguments, without knowing the truth.

    Half of the pairs gives one estimate, the other half an independent one with the same law. The squared distance
    of the two is on average four times the squared error of the estimate from all pairs, as long as the error
    falls with the square root of M. With few coalitions it falls faster, and this is on the safe side. The coalitions
    must come in pairs (`sample_paired_coalitions`).

    Returns:
        (..., K) float64 estimate of `|estimate - truth| / |truth|` over the players, without a unit.

    Raises:
        ValueError: M is not a multiple of 4.
    """
    count = coalitions.shape[-2]
    if count % 4:
        raise ValueError(f"two halves of whole pairs need a multiple of 4 coalitions, but got {count}")
    first = torch.arange(count, device="cpu") % 4 < 2  # (M,): every other pair
    one, other = (
        kernel_shap(coalitions[..., half, :], values[..., half, :], null_values, full_values)
        for half in (first, ~first)
    )  # (..., N, K) each
    estimate = kernel_shap(coalitions, values, null_values, full_values)  # (..., N, K)
    return torch.linalg.vector_norm(one - other, dim=-2) / 2 / torch.linalg.vector_norm(estimate, dim=-2)
