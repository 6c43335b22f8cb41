"""Maps that know nothing of the model: what every method should beat."""

from __future__ import annotations

import torch

from .case import Answer, Case


def random(case: Case) -> Answer:
    """Uniform numbers in 0..1, seeded."""
    shape = (case.players, case.batch.classes.shape[1])
    return Answer(
        torch.stack([torch.rand(shape, generator=case.source(image), device="cpu") for image in range(case.images)])
    )


def centre(case: Case) -> Answer:
    """A Gaussian bump in the middle of the image, a quarter of its sides wide: where photographers put things."""
    rows, cols = (
        ((torch.arange(count, device="cpu") + 0.5) / count - 0.5).square() for count in case.batch.tiling.players
    )  # (rows,) and (cols,): squared distance from the middle, in sides
    bump = torch.exp(-(rows[:, None] + cols) / (2 * 0.25**2)).flatten()  # (N,)
    return Answer(bump[None, :, None].expand(case.images, -1, case.batch.classes.shape[1]))


def equal(case: Case) -> Answer:
    """Equal shares of v(all) - v(empty) for all players."""
    output = case.batch.output
    share = (output.logits.float() - output.null_values.float())[:, None] / case.players  # (B, 1, K)
    return Answer(case.shown(share.expand(-1, case.players, -1)))
