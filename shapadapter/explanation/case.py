"""What every method of explanation is given and gives back; methods that only ask for values, and maps without a model.

Methods that sample play the game the adapter is trained for, with its removal operator and its value.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shapadapter.adapter import ShapleyLayer
from shapadapter.backbone import sum_over_tiles
from shapadapter.core.estimates import kernel_shap as fit
from shapadapter.core.shapley import generator_of, pays_for_all, sample_pairs, sample_sizes
from shapadapter.data.images import IMAGE_INPUTS
from shapadapter.explanation.game import BatchGame
from shapadapter.explanation.passes import Predicted
from shapadapter.explanation.refine import enumerated


@dataclass(frozen=True)
class Case:
    """A batch of images to explain, after its forward pass."""

    model: nn.Module  # wrapped
    layer: ShapleyLayer
    batch: Predicted
    evaluations: int  # of the model, that a method that samples may spend on each image
    seed: int
    first: int  # the number of the first image of the batch among all; what is drawn depends on it
    batch_size: int  # images in a forward pass

    @property
    def images(self) -> int:
        """B."""
        return self.batch.classes.shape[0]

    @property
    def players(self) -> int:
        """N."""
        return self.batch.tiling.count

    @property
    def pixel_values(self) -> Tensor:
        """The images (B, C, H, W), or as patches (B, L, p * p * C)."""
        return self.batch.inputs["pixel_values"]

    @property
    def ends(self) -> tuple[Tensor, Tensor]:
        """v(empty) and v(all) for the shown classes, (B, C) each."""
        null, full = self.batch.output.null_values, self.batch.output.logits
        return self.shown(null).float().cpu(), self.shown(full).float().cpu()

    @property
    def game(self) -> BatchGame:
        """Its values are of the shown classes."""
        return BatchGame(self.model, self.batch.inputs, self.batch.classes, self.batch_size)

    def values(self, coalitions: Tensor) -> Tensor:
        """v(S) of coalitions (B, M, N), whose sizes are the same for all images, for the shown classes: (B, M, C)."""
        return self.game.values(torch.arange(self.images, device="cpu"), coalitions)

    def sources(self) -> list[torch.Generator]:
        """A source of randomness for each image, whatever batch it is in."""
        return [generator_of(self.seed, 1 + self.first + image) for image in range(self.images)]

    def logits(self, pixel_values: Tensor) -> Tensor:
        """Logits (r * B, K) of variants of the images, (r * B, C, H, W): first one of each image, then another."""
        runs = pixel_values.shape[0] // self.images
        inputs = {
            name: value.repeat(runs, *[1] * (value.ndim - 1)) if name in IMAGE_INPUTS else value
            for name, value in self.batch.inputs.items()
        }
        return self.model(**{**inputs, "pixel_values": pixel_values}).logits

    def shown(self, values: Tensor) -> Tensor:
        """The columns (B, ..., C) of the classes to show, of (B, ..., K)."""
        index = self.batch.classes.to(values.device).view(self.images, *[1] * (values.ndim - 2), -1)
        return values.gather(-1, index.expand(*values.shape[:-1], -1))

    def from_cells(self, cells: Tensor) -> Tensor:
        """What the cells are worth, (B, cells, C), shared out among the players: (B, N, C)."""
        return self.batch.tiling.attributions(cells.float())

    def from_pixels(self, pixels: Tensor) -> Tensor:
        """What the pixels are worth, (B, H, W, C), summed over the players' tiles: (B, N, C)."""
        seen = self.batch.seen
        return sum_over_tiles(pixels, self.batch.tiling.players, (seen.shape[1], seen.shape[2]))


@dataclass(frozen=True)
class Answer:
    """What a method says."""

    maps: Tensor  # (B, N, C), what each player is worth to each shown class
    evaluations: int | None = 0  # spent on each image beyond its forward pass; None if nobody counted
    standard_errors: Tensor | None = None  # (B, N, C), of the maps, where the method knows them


# -- coalitions ------------------------------------------------------------------------------------------------------


def kernel_shap(case: Case) -> Answer:
    """KernelSHAP with paired coalitions of the exact kernel law (Lundberg & Lee 2017; Covert & Lee 2021); exact if paid for."""
    if pays_for_all(case.evaluations, case.players):
        return exact(case)
    pairs = case.evaluations // 2
    # All images share the sizes, so that coalitions of one size are a rectangular batch; the players are their own.
    sizes = sample_sizes(case.players, pairs, generator_of(case.seed, 0))  # (P,)
    coalitions = torch.cat([sample_pairs(1, case.players, pairs, source, sizes) for source in case.sources()])
    return Answer(fit(coalitions, case.values(coalitions), *case.ends), 2 * pairs)  # of (B, 2 P, N)


def permutation(case: Case) -> Answer:
    """Mean gains in random orders of joining, each used forwards and backwards (Castro et al. 2009; Mitchell et al. 2022).

    The gains of one order sum to v(all) - v(empty), so the estimate does. The pairs of orders are independent: their
    spread gives the standard errors. With as many evaluations as there are coalitions the values are exact.
    """
    players = case.players
    if pays_for_all(case.evaluations, players):
        answer = exact(case)
        return Answer(answer.maps, answer.evaluations, torch.zeros_like(answer.maps))
    cost = 2 * (players - 1)
    pairs = case.evaluations // cost
    if pairs < 1:
        raise ValueError(
            f"A pair of orders of {players} players takes {cost} evaluations, got evaluations={case.evaluations}. Pass "
            f"evaluations={cost} or more, or method='kernel_shap'."
        )
    draws = [torch.rand(pairs, players, generator=source, device="cpu") for source in case.sources()]
    place = torch.stack(draws).argsort(dim=-1)  # (B, P, N): when each player joins
    place = torch.cat([place, players - 1 - place], dim=1)  # (B, R, N), R = 2 P orders
    sizes = torch.arange(1, players, device="cpu")[:, None]  # (N - 1, 1)
    coalitions = place[:, :, None] < sizes  # (B, R, N - 1, N)
    inner = case.values(coalitions.flatten(1, 2)).unflatten(1, coalitions.shape[1:3])  # (B, R, N - 1, C)
    null, full = (end[:, None, None].expand(-1, 2 * pairs, -1, -1) for end in case.ends)  # (B, R, 1, C)
    steps = torch.cat([null, inner, full], dim=2).double().diff(dim=2)  # (B, R, N, C): in order of joining
    gains = steps.gather(2, place[..., None].expand_as(steps))  # in order of the players
    means = (gains[:, :pairs] + gains[:, pairs:]) / 2  # (B, P, N, C)
    errors = means.std(dim=1) / pairs**0.5 if pairs > 1 else None  # (B, N, C)
    return Answer(means.mean(dim=1), pairs * cost, errors)


def exact(case: Case) -> Answer:
    """The Shapley values themselves, from all 2^N coalitions; at most 16 players."""
    images = torch.arange(case.images, device="cpu")
    found = enumerated(case.game, images, torch.stack(case.ends, dim=1), case.players)
    return Answer(found.mean, 2**case.players - 2)


def leave_one_out(case: Case) -> Answer:
    """What is lost without one player: v(all) - v(all without n)."""
    without = ~torch.eye(case.players, dtype=torch.bool, device="cpu")  # (N, N)
    values = case.values(without.expand(case.images, -1, -1))  # (B, N, C)
    return Answer(case.ends[1][:, None] - values, case.players)


# -- what a method has to beat -----------------------------------------------------------------------------------------


def random(case: Case) -> Answer:
    """Uniform numbers in 0..1, seeded."""
    shape = (case.players, case.batch.classes.shape[1])
    return Answer(torch.stack([torch.rand(shape, generator=source, device="cpu") for source in case.sources()]))


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
