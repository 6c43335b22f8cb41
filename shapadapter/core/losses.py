"""The Shapley objective as pure arithmetic on attributions and coalition values.

Shapes throughout: B images, N players, K classes, M coalitions per image. All sums are taken in float32 at least,
whatever the dtype of the inputs and inside autocast too: efficiency is a matter of 1e-5, bfloat16 of 1e-2.
"""

import torch
from torch import Tensor

SCALE_FLOOR = 1e-8
"""The least scale to divide the loss by, so that a model that says nothing yet does not explode."""


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


def coalition_residuals(
    attributions: Tensor, coalitions: Tensor, coalition_values: Tensor, null_values: Tensor
) -> Tensor:
    """What the attributions leave unexplained of each coalition: `v(S) - v(empty) - sum_{n in S} phi_n`.

    The null values are a constant here. In `vote` prediction they are a parameter that stands on both sides of the
    difference; a gradient into them leads the model to say the same about every image, the trivial minimum.

    Args:
        attributions: (B, N, K) attribution of each player to each class.
        coalitions: (B, M, N) bool, True = present.
        coalition_values: (B, M, K) values `v(S)`. A gradient flows through them unless the caller detaches them.
        null_values: (B, K) values `v(empty)`; no gradient flows through them.

    Returns:
        (B, M, K) in the unit of the values. Its mean square is the Shapley loss in that unit, squared.
    """
    return gains(coalition_values, null_values) - coalition_sums(attributions, coalitions)


def gains(coalition_values: Tensor, null_values: Tensor) -> Tensor:
    """`v(S) - v(empty)`, (B, M, K) in float32 at least, of values (B, M, K) and (B, K); the latter are a constant."""
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

    For each image the mean of the squared `coalition_residuals`, divided by `expected_square`; then the mean over
    images. For coalitions of the kernel law and attributions that obey efficiency, its minimiser is the Shapley value
    (Charnes et al. 1988; Lundberg & Lee 2017; as a loss to train with: FastSHAP, Jethani et al. 2022). The division
    makes it free of the scale of the logits, image by image, so that accumulated micro-batches add up to the whole
    batch. The divisor has no gradient, or larger attributions alone would lower the loss.

    Args:
        attributions: (B, N, K) attributions that obey efficiency (`project_on_efficiency`, or by construction).
        coalitions: (B, M, N) bool, True = present, drawn from the kernel law (`shapley.sample_pairs`).
        coalition_values: (B, M, K) values `v(S)`. A gradient flows through them unless the caller detaches them.
        null_values: (B, K) values `v(empty)`; no gradient flows through them (`coalition_residuals` says why).

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
