"""The gradient by presence: what one backward pass knows of all players, where a coalition gives one number.

In the soft game player n is present to a degree m_n in [0, 1] (`PatchGame.value`), and at 0 and 1 it is the game of
coalitions. Its gradient at full presence, dv / dm_n, is what the player contributes itself plus what all others would say
less if they listened to it a little less. That second part, which no head can read off the player's own feature, is most of
a Shapley value. Averages of gradients at random presence come nearer still.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from shapadapter.adapter import ShapleyLayer
from shapadapter.core.shapley import project_on_efficiency
from shapadapter.explanation.explanation import Explanation
from shapadapter.explanation.game import GRADIENT_COST, presence_gradients
from shapadapter.explanation.passes import Predicted

LEVEL = "gradient"
"""What `refine` is called that adds one backward pass for each class shown."""

GROUPS = 2
"""Players are live in turns, one part of so many at a time; the others are there or not. More parts: less bias, more noise."""

BLOCK = 2 * GROUPS
"""Samples in which each player is live twice, at m and at 1 - m."""


def pays_off(layer: ShapleyLayer) -> bool:
    """Whether the gradient tells enough to spend anything on it unasked: where presence is a matter of attention.

    Where pixels are blended, as in convolutional networks, it was no nearer to the Shapley values than one forward pass.
    """
    return layer.active is not None and layer.rules[layer.active].removal != "pixels"


def full_gradients(batch: Predicted) -> Tensor:
    """The gradient at full presence, of the pass that predicted: (B, N, C) float64 on the CPU, of the shown classes."""
    assert batch.presence is not None
    with torch.enable_grad():
        return presence_gradients(batch.output.logits.gather(1, batch.classes), batch.presence).cpu().double()


def share_of_head(maps: Tensor, gradients: Tensor) -> Tensor:
    """The weight of what the head says beside the gradient, (B, N, C) each: (B, C), at most a half.

    The two err in ways of their own, and their mean is nearer to the truth than either. A head that was never trained says
    next to nothing, and has next to no weight.
    """
    said, felt = (part.double().std(dim=1) for part in (maps, gradients))  # (B, C) each
    return 0.5 * (said / felt.clamp(min=1e-30)).clamp(max=1)


def gradient_level(explanation: Explanation, batch: Predicted) -> Explanation:
    """What the head and the gradient at full presence say together, with an error that their difference tells.

    Were their errors independent and of equal size, the mean's would be half of how far they are apart. It is spread evenly
    over the players.
    """
    maps, gradients = explanation.attributions.flatten(1, 2).double(), full_gradients(batch)  # (B, N, C)
    share = share_of_head(maps, gradients)[:, None]  # (B, 1, C)
    ends = [
        values.gather(1, explanation.classes) for values in (explanation.logits, explanation.null_values)
    ]  # (B, C)
    felt = project_on_efficiency(gradients, *(end.double() for end in ends))  # (B, N, C)
    together = share * maps + (1 - share) * felt
    apart = (felt - maps).square().mean(dim=1, keepdim=True).sqrt()  # (B, 1, C)
    errors = ((1 - share) * apart).expand_as(together)  # (B, N, C)
    grid = explanation.attributions.shape[1:3]
    return replace(
        explanation,
        attributions=together.float().unflatten(1, grid),
        standard_errors=errors.float().unflatten(1, grid),
        evaluations=torch.full((len(maps),), math.ceil(GRADIENT_COST * maps.shape[-1]), device="cpu"),
        method=LEVEL,
    )


def sample_presence(
    players: int, blocks: int, sizes: torch.Generator, sources: Sequence[torch.Generator]
) -> tuple[Tensor, Tensor]:
    """Draw presences for some images, each from a source of its own; how many are there is the same for all images.

    In each sample one group of the players is live, at m uniform in [0, 1]; of the others a number, uniform from none to all,
    is there and the rest is not. The next sample is its complement, 1 - m: effects of any two players cancel in the mean of
    both, as in a pair of coalitions. A block of samples makes each player live in turn.

    Returns:
        presence (B, R, N) float32 and live (B, R, N) bool, with R = `BLOCK * blocks`.
    """
    draws = blocks * GROUPS
    # One from each part of 0..1, so that many and few are there equally often; in random order, for groups take turns.
    levels = (
        torch.randperm(draws, generator=sizes, device="cpu") + torch.rand(draws, generator=sizes, device="cpu")
    ) / draws
    presence, live = [], []
    for source in sources:
        order = torch.rand(blocks, players, generator=source, device="cpu").argsort(dim=1)  # (blocks, N)
        group = (order * GROUPS // players).repeat_interleave(GROUPS, 0)  # (draws, N), in 0..GROUPS - 1
        chosen = group == (torch.arange(draws, device="cpu") % GROUPS)[:, None]  # (draws, N)
        degree, place = torch.rand(2, draws, players, generator=source, device="cpu")  # (draws, N) each
        rank = place.masked_fill(chosen, 2.0).argsort(dim=1).argsort(dim=1)  # (draws, N), the live ones last
        others = (~chosen).sum(dim=1)  # (draws,)
        count = (levels * (others + 1)).long().minimum(others)[:, None]  # (draws, 1)
        drawn = torch.where(chosen, degree, (rank < count).float())  # (draws, N)
        presence.append(torch.stack([drawn, 1 - drawn], dim=1).flatten(0, 1))  # (R, N)
        live.append(chosen.repeat_interleave(2, 0))  # (R, N)
    return torch.stack(presence), torch.stack(live)


def mean_of_live(gradients: Tensor, live: Tensor) -> Tensor:
    """Of each player the mean over the samples in which it was live: (B, R, N, C) and (B, R, N) to (B, N, C) float64."""
    weights = live.double()[..., None]  # (B, R, N, 1)
    return (gradients.double() * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)
