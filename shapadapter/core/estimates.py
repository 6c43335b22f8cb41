"""Estimates of Shapley values from evaluations of the game: exact ones, KernelSHAP, and refined predictions with errors.

A prediction is refined as the mean of a prior, on which the evaluations are a linear regression with noise. With no
evaluation the posterior mean is the prediction, with many it tends to the Shapley value, and on the way each of the two
counts as much as it has turned out to be worth on this very image and class.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from shapadapter.core.shapley import all_coalitions, size_distribution

LOG_RATIOS = torch.linspace(-10, 30, 81, dtype=torch.float64, device="cpu")
"""Grid of log R, R = how much the error of the prediction moves a pair, over how much the interactions do (variances)."""

RANK = 1e-9
"""A singular value below this share of the largest is rounding."""

STIFFNESS = 2.0
"""One over how well the weights of predictions are known beforehand, see `calibrated_posterior`."""

POWER = 0.25
"""Of the likelihood of R after calibration (a power posterior, Gruenwald & van Ommen 2017).

What gradients leave open is uneven: much of it lies on a few players. At 1 the errors of a classifier that never saw a
coalition were too small, at 0.25 they hold, and those of trained models hardly change.
"""

SMALLEST_REST = 0.05
"""The least `1 - leverage` to divide a squared residual by."""


@dataclass(frozen=True)
class Posterior:
    """What is known of the Shapley values after some evaluations.

    Attributes:
        mean: (..., N, K) float64, in the unit of the values.
        standard_error: (..., N, K) float64, one standard deviation in the same unit: 0 for exact values, NaN without
            any evaluation, infinite with one or two pairs, which say nothing about their own noise.
    """

    mean: Tensor
    standard_error: Tensor

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Low and high (..., N, K), between which the Shapley values of a share `level` of the players lie."""
        reach = NormalDist().inv_cdf((1 + level) / 2) * self.standard_error  # (..., N, K)
        return self.mean - reach, self.mean + reach

    @property
    def relative_error(self) -> Tensor:
        """(..., K): the expected L2 error over the players, as a share of the length of the mean."""
        return relative_error(self.mean, self.standard_error)


def relative_error(mean: Tensor, standard_error: Tensor) -> Tensor:
    """The expected L2 error over the players, as a share of the length of the estimate (..., N, K): (..., K).

    0 where nothing is left open, whatever the length.
    """
    error, length = (torch.linalg.vector_norm(part, dim=-2) for part in (standard_error, mean))  # (..., K) each
    return torch.where(error == 0, error, error / length)


def shapley_posterior(
    attributions: Tensor,
    coalitions: Tensor,
    values: Tensor,
    null_values: Tensor,
    full_values: Tensor,
    power: float = 1.0,
) -> Posterior:
    """Refine predicted Shapley values by evaluated coalitions.

    The Shapley values are `attributions + d`, with `d ~ N(0, tau^2 (I - 1 1^T / N))`, so that efficiency is exact. A
    pair S and complement gives one row, `(r(S) - r(complement)) / 2 = z . d + noise`, with what the attributions leave
    unexplained, `r(S) = v(S) - v(empty) - sum_{n in S} phi_n`, and z the centred indicator of S; interactions of an
    even kind cancel in it. The noise `N(0, sigma^2)` stands for the others. The ratio of the scales, which differs from
    image to image and class to class, is integrated out under the marginal likelihood: sigma in closed form with
    Jeffreys' prior, `R = tau^2 E|z|^2 / sigma^2` on a grid with a half-Cauchy prior on its square root (Gelman 2006;
    Polson & Scott 2012). That prior never lets few evaluations conclude that a prediction is perfect.

    The noise is larger for some sizes than for others. The estimate must not weigh them for that, or it would tend to
    something else than the Shapley value; the errors are widened instead, by the HC2 estimate of the variance
    (MacKinnon & White 1985) where that is larger.

    Args:
        attributions: (..., N, K) predicted Shapley values of K classes.
        coalitions: (..., M, N) bool, True = present, of the kernel law; rows `2 p` and `2 p + 1` are complements
            (`shapley.sample_in_turns`, `shapley.sample_pairs`).
        values: (..., M, K) value of each coalition.
        null_values: (..., K) value of the empty coalition.
        full_values: (..., K) value of the full coalition.
        power: of the likelihood of R, less than 1 where a model of equal, normal noise would be too sure of it.

    Returns:
        The posterior. Its mean sums to `full_values - null_values`; with M = 0 it is `attributions` as they are.

    Raises:
        ValueError: The coalitions do not come in pairs.
    """
    players, count = attributions.shape[-2], coalitions.shape[-2]
    prior, null, full = attributions.double(), null_values.double(), full_values.double()
    if not count:
        return Posterior(prior, torch.full_like(prior, torch.nan))
    prior = prior + ((full - null - prior.sum(-2)) / players)[..., None, :]  # (..., N, K), efficient in float64
    fit = _Fit.of(*_rows(prior, coalitions, values, null), power)
    # The noise of one or two rows has no expectation under Jeffreys' prior.
    error = fit.variance().clamp(min=0).sqrt() if count > 4 else torch.full_like(prior, torch.inf)
    return Posterior(prior + fit.mean, error)


def _rows(prior: Tensor, coalitions: Tensor, values: Tensor, null: Tensor) -> tuple[Tensor, Tensor]:
    """The centred indicators (..., P, N) of one of each pair, and half of what `prior` leaves of their gap, (..., P, K)."""
    if coalitions.shape[-2] % 2 or not bool((coalitions[..., 0::2, :] ^ coalitions[..., 1::2, :]).all()):
        raise ValueError("Expected coalitions in pairs: rows 2 p and 2 p + 1 must be complements.")
    present = coalitions.double()  # (..., M, N)
    residuals = values.double() - null[..., None, :] - present @ prior  # (..., M, K)
    first = present[..., 0::2, :]  # (..., P, N)
    gaps = (residuals[..., 0::2, :] - residuals[..., 1::2, :]) / 2  # (..., P, K)
    return first - first.mean(-1, keepdim=True), gaps


def calibrated_posterior(
    predictions: Tensor,
    weights: Tensor,
    coalitions: Tensor,
    values: Tensor,
    null_values: Tensor,
    full_values: Tensor,
) -> Posterior:
    """Combine several predictions of the Shapley values, and refine what they say together, by evaluated coalitions.

    Predictions err in ways of their own: the head does not know the picture well, a gradient not what is far from the full
    image. Their weighted sum is better than the best of them, and the pairs tell the weights of each image and class, by a
    regression of their gaps on what each prediction says of them, with a ridge towards `weights`.

    What pairs say beyond a few weights is worth little before they are more than the players: with P pairs of N players
    the least squares of KernelSHAP are worst at P = N. So of the step from the combination to its `shapley_posterior` the
    share `1 - r min(1, N / P)` is taken, with r the correlation of the gaps with what the predictions say of them: all of it
    where these say nothing, little where they say much, and all in the end, where the estimate tends to the Shapley values.

    Args:
        predictions: (..., N, K, F) of F predictions; what they add to all players alike has no say.
        weights: (F,) of each, before anything is known.
        coalitions: (..., M, N) bool, in pairs, as for `shapley_posterior`; likewise the rest.
        values: (..., M, K) value of each coalition.
        null_values: (..., K) value of the empty coalition.
        full_values: (..., K) value of the full coalition.

    Returns:
        The posterior; its mean sums to `full_values - null_values`. Its errors hold those of `shapley_posterior` and of the
        weights.
    """
    players, pairs = predictions.shape[-3], coalitions.shape[-2] // 2
    null, full = null_values.double(), full_values.double()
    equal = ((full - null) / players)[..., None, :].expand(predictions.shape[:-1])  # (..., N, K)
    centred = predictions.double() - predictions.double().mean(-3, keepdim=True)  # (..., N, K, F)
    chosen = weights.double().expand(*centred.shape[:-3], *centred.shape[-2:])[..., None]  # (..., K, F, 1)
    if not pairs:
        together = equal + torch.einsum("...nkf,...kf->...nk", centred, chosen[..., 0])  # (..., N, K)
        return Posterior(together, torch.full_like(together, torch.nan))
    design, gaps = _rows(equal, coalitions, values, null)  # (..., P, N), (..., P, K)
    said = torch.einsum("...pn,...nkf->...kpf", design, centred)  # (..., K, P, F)
    left = gaps.mT[..., None] - said @ chosen  # (..., K, P, 1)
    # Each weight is taken to be right to 1 / STIFFNESS, in the unit of the noise.
    ridge = STIFFNESS**2 * left.square().mean(-2, keepdim=True) * torch.eye(said.shape[-1]).to(left)
    # Predictions may be alike, or all zero.
    inverse = torch.linalg.pinv(said.mT @ said + ridge, hermitian=True)  # (..., K, F, F)
    chosen = chosen + inverse @ (said.mT @ left)
    together = equal + torch.einsum("...nkf,...kf->...nk", centred, chosen[..., 0])  # (..., N, K)
    found = shapley_posterior(together, coalitions, values, null, full, POWER)
    unexplained = (gaps.mT[..., None] - said @ chosen).square().mean((-2, -1))  # (..., K)
    explained = (1 - unexplained / gaps.square().mean(-2).clamp(min=1e-300)).clamp(0, 1)  # (..., K)
    step = (1 - explained.sqrt() * min(1.0, players / pairs))[..., None, :]  # (..., 1, K)
    # Of the weights.
    doubt = torch.einsum("...nkf,...kfg,...nkg->...nk", centred, inverse * unexplained[..., None, None], centred)
    variance = found.standard_error.square() + doubt  # (..., N, K)
    return Posterior(together + step * (found.mean - together), variance.sqrt())


def exact_posterior(values: Tensor) -> Posterior:
    """The Shapley values, without an error, of a game whose every coalition has been evaluated, as `all_coalitions` has them.

    Args:
        values: (2**N, ...) value of each coalition.
    """
    exact = exact_shapley_values(values)  # (N, ...)
    return Posterior(exact, torch.zeros_like(exact))


@dataclass(frozen=True)
class _Fit:
    """The regression in the directions in which its design is diagonal; r directions, P pairs, G ratios."""

    left: Tensor  # (..., P, r), orthonormal columns
    scales: Tensor  # (..., r), singular values, 0 where they are rounding
    right: Tensor  # (..., r, N), orthonormal rows
    seen: Tensor  # (..., r, K), the observations along the directions
    gaps: Tensor  # (..., P, K), the observations
    ratios: Tensor  # (G,), sigma^2 / tau^2
    weights: Tensor  # (..., G, K), how likely each ratio is; they sum to 1
    noise: Tensor  # (..., G, K), the expected sigma^2 given the ratio

    @classmethod
    def of(cls, design: Tensor, gaps: Tensor, power: float) -> "_Fit":
        """Decompose the design (..., P, N) and weigh the ratios by the observations (..., P, K)."""
        pairs, players = design.shape[-2:]
        left, scales, right = torch.linalg.svd(design, full_matrices=False)
        scales = torch.where(scales > RANK * scales.amax(-1, keepdim=True), scales, 0)  # (..., r)
        sizes = torch.arange(1, players, dtype=torch.float64, device="cpu")  # (N - 1,)
        length = (size_distribution(players) * sizes * (players - sizes) / players).sum()  # E|z|^2
        ratios = length * torch.exp(-LOG_RATIOS)  # (G,)
        seen = left.mT @ gaps  # (..., r, K)
        signal = scales[..., None].square() / ratios  # (..., r, G)
        outside = (gaps.square().sum(-2) - seen.square().sum(-2)).clamp(min=0)  # (..., K)
        misfit = (1 / (1 + signal)).mT @ seen.square() + outside[..., None, :]  # (..., G, K)
        # Half-Cauchy for sqrt(R), as a density of log R.
        prior = -torch.logaddexp(LOG_RATIOS / 2, -LOG_RATIOS / 2)  # (G,)
        likelihood = -signal.log1p().sum(-2)[..., None] / 2 - pairs / 2 * misfit.clamp(min=1e-300).log()  # (..., G, K)
        evidence = prior[:, None] + power * likelihood
        noise = misfit / max(pairs - 2, 1)
        return cls(left, scales, right, seen, gaps, ratios, evidence.softmax(-2), noise)

    @property
    def gains(self) -> Tensor:
        """(..., r, G): how far an observation along a direction moves the estimate, given the ratio."""
        scales = self.scales[..., None]  # (..., r, 1)
        return scales / (scales.square() + self.ratios)

    @property
    def mean(self) -> Tensor:
        """(..., N, K): d, over all ratios."""
        return self.right.mT @ (self.gains @ self.weights * self.seen)

    def variance(self) -> Tensor:
        """(..., N, K): of d, within and between the ratios."""
        players = self.right.shape[-1]
        squares = self.right.mT.square()  # (..., N, r)
        known = squares @ (self.scales[..., None] * self.gains)  # (..., N, G)
        likely = self.weights * self.noise  # (..., G, K)
        within = (1 - 1 / players - known) / self.ratios @ likely  # (..., N, K)
        within = within + (self._spread() - 1)[..., None, :] * (squares @ (self.gains.square() @ likely))
        between = torch.zeros_like(within)
        mean, gains = self.mean, self.gains
        for ratio in range(len(self.ratios)):
            moved = self.right.mT @ (gains[..., ratio, None] * self.seen)  # (..., N, K): d given the ratio
            between += self.weights[..., ratio, None, :] * (moved - mean).square()
        return within + between

    def _spread(self) -> Tensor:
        """(..., K), at least 1: the noise in the estimate by its own residuals, over that of equal noise everywhere."""
        gains = self.gains @ self.weights  # (..., r, K)
        squares = self.left.square()  # (..., P, r)
        leverage = squares @ (self.scales[..., None] * gains)  # (..., P, K)
        residuals = self.gaps - self.left @ (self.scales[..., None] * gains * self.seen)  # (..., P, K)
        own = residuals.square() / (1 - leverage).clamp(min=SMALLEST_REST)  # (..., P, K)
        equal = (self.weights * self.noise).sum(-2) * gains.square().sum(-2)  # (..., K)
        spread = (own * (squares @ gains.square())).sum(-2) / equal  # (..., K)
        return spread.nan_to_num(1.0, posinf=1.0).clamp(min=1)  # 0 / 0 without any noise


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
