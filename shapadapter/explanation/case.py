"""What every method of explanation is given and gives back, and maps that know nothing of the model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from shapadapter.adapter import ShapleyLayer
from shapadapter.backbone import sum_over_tiles
from shapadapter.data.images import IMAGE_INPUTS
from shapadapter.explanation.api import Predicted


@dataclass(frozen=True)
class Case:
    """A batch of images to explain, after its forward pass.

    Attributes:
        model: the wrapped model.
        layer: its Shapley layer.
        batch: the images and what the model said of them.
        evaluations: how many model evaluations a method that samples may spend on each image.
        seed: of all that is drawn.
        first: the number of the first image of the batch among all; what is drawn depends on it.
        batch_size: images in a forward pass.
    """

    model: nn.Module
    layer: ShapleyLayer
    batch: Predicted
    evaluations: int
    seed: int
    first: int
    batch_size: int

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

    def source(self, image: int | None = None) -> torch.Generator:
        """A source of randomness of one image's own, whatever batch it is in, or one that all images share."""
        place = 0 if image is None else 1 + self.first + image
        state = np.random.SeedSequence(self.seed, spawn_key=(place,)).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(state[0]))

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
    """What a method says.

    Attributes:
        maps: (B, N, C), what each player is worth to each shown class.
        evaluations: model evaluations spent on each image beyond its forward pass; None if nobody counted.
        standard_errors: (B, N, C), of the maps, where the method knows them.
    """

    maps: Tensor
    evaluations: int | None = 0
    standard_errors: Tensor | None = None


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
