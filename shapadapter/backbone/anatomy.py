"""Where a vision model keeps what the adapter needs, and how its cells lie on an image."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from shapadapter.backbone.families import Layout, Profile
from shapadapter.core.errors import ImageError


@dataclass(frozen=True)
class Anatomy(Profile):
    """The parts of a vision model, as a dry run found them.

    A *cell* is a place of the final features: a patch of a token-sequence model, a cell of the final feature map of
    another. All names are of modules.
    """

    source: str  # its output holds the final features
    layout: Layout  # how they lie in it
    backbone: tuple[str, ...]  # the model's children that lead from the image to the features
    behind: tuple[str, ...]  # what has parameters and runs only after them, such as the classifier
    entrance: str  # the first with parameters: tells device and dtype
    cell: tuple[int, int]  # (height, width) in pixels
    rounds_up: bool  # whether an incomplete cell at the border of the image is a cell, too
    channels: int  # of the image
    prefix: int  # tokens in front of the cells (class token, distillation token, registers)
    width: int  # D, the features of a cell
    classes: int  # K, the model's scores; with texts P, the size of an embedding
    sample: tuple[int, int]  # (height, width) of an image on which a forward pass was seen to work
    options: dict[str, Any] = field(default_factory=dict)  # keyword arguments that pass was given
    blocks: tuple[str, ...] = ()  # transformer blocks, first to last, each (B, T, D) to (B, T, D)
    attentions: tuple[str, ...] = ()  # one for each block, or none where they do not call transformers' interface
    pooled: str = (
        ""  # of a model of blocks, where the head pools tokens: an attention to them, or what it may take the mean of
    )

    @property
    def mechanism(self) -> Literal["sequence", "readout", "latents"]:
        """Whether the token travels through the blocks, or reads the final map, or what cells gather from latents."""
        if self.layout == "latents":
            return "latents"
        return "sequence" if self.attentions else "readout"

    def cells(self, pixel_values: Tensor, spatial_shapes: Tensor | None = None, **_: Any) -> tuple[int, int]:
        """The (rows, cols) of cells on images (B, C, H, W), or on patches (B, N, 3 * p * p) of `spatial_shapes`."""
        if self.family.patches:
            return _patch_grid(pixel_values, spatial_shapes)
        if pixel_values.ndim != 4 or pixel_values.shape[1] != self.channels:
            raise ImageError(
                f"Expected pixel_values of shape (batch, {self.channels}, height, width), got "
                f"{tuple(pixel_values.shape)}."
            )
        up = (self.cell[0] - 1, self.cell[1] - 1) if self.rounds_up else (0, 0)
        rows, cols = ((pixel_values.shape[2 + axis] + up[axis]) // self.cell[axis] for axis in (0, 1))
        if self.layout == "latents":
            return max(2, rows), max(2, cols)
        if rows * cols < 2:
            raise ImageError(
                f"An image of {pixel_values.shape[2]} x {pixel_values.shape[3]} pixels holds {rows} x {cols} "
                f"patches of {self.cell[0]} x {self.cell[1]}; the game needs at least two players. Send larger images."
            )
        return rows, cols

    def seen(self, pixel_values: Tensor, cells: tuple[int, int]) -> tuple[int, int]:
        """The (height, width) of the part of images (B, C, H, W) that `cells` cover."""
        if self.rounds_up or self.family.patches or self.layout == "latents":
            return pixel_values.shape[-2], pixel_values.shape[-1]
        return cells[0] * self.cell[0], cells[1] * self.cell[1]


def _patch_grid(pixel_values: Tensor, spatial_shapes: Tensor | None) -> tuple[int, int]:
    if spatial_shapes is None or pixel_values.ndim != 3:
        raise ImageError(
            "Expected pixel_values of shape (batch, patches, 3 * p * p) with spatial_shapes (batch, 2), as this model's "
            f"image processor makes them, got {tuple(pixel_values.shape)}"
            f"{' without spatial_shapes' if spatial_shapes is None else ''}."
        )
    grids = {(int(rows), int(cols)) for rows, cols in spatial_shapes.tolist()}
    if len(grids) > 1:
        raise ImageError(
            f"Images of one batch must have one grid of patches, got {sorted(grids)} (rows, cols). Send images of "
            "different shapes in different batches, or resize them to one shape first."
        )
    return grids.pop()


def first_tensor(output: Any) -> Tensor | None:
    """The tensor itself, `last_hidden_state`, or the first of a tuple."""
    found = getattr(output, "last_hidden_state", output)
    if isinstance(found, tuple | list):
        found = found[0] if found else None
    return found if isinstance(found, Tensor) else None


def cells_first(features: Tensor, anatomy: Anatomy) -> Tensor:
    """Features as (B, cells, D) in raster order, without prefix; latents as they are."""
    if anatomy.layout == "channels_first":
        return features.flatten(2).transpose(1, 2)  # (B, D, rows, cols) -> (B, cells, D)
    if anatomy.layout == "channels_last":
        return features.flatten(1, 2)  # (B, rows, cols, D) -> (B, cells, D)
    return features[:, anatomy.prefix :] if anatomy.layout == "tokens" else features
