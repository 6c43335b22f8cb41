"""What a visitor sees of an explanation: pictures and words, made without asking the model again."""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn.functional import interpolate

from shapadapter.explanation.explanation import Explanation
from shapadapter.visual import overlay, symmetric_limit
from shapadapter.visual.wording import MINUS, Column, adding_up, columns, expected_error, level, number

SIDE = 512  # pixels: pictures whose longer side is shorter are enlarged beyond it, so that patches have sharp edges


@dataclass(frozen=True)
class View:
    """One explained image, and where the visitor is in it."""

    explanation: Explanation  # of one image; its classes are on offer
    place: int = 0  # the chosen class, 0 for the likeliest one
    patch: tuple[int, int] | None = None  # row and column of the chosen patch, or None

    @property
    def columns(self) -> list[Column]:
        """The classes on offer, the likeliest first."""
        return columns(self.explanation, 0, max_classes=self.explanation.classes.shape[1])

    @property
    def column(self) -> Column:
        """The chosen class."""
        return self.columns[self.place]

    @property
    def limit(self) -> float:
        """The attribution that gets the full colour, the same for all classes on offer."""
        return symmetric_limit(np.stack([column.values.numpy() for column in self.columns]))

    def patch_at(self, x: int, y: int) -> tuple[int, int]:
        """The patch under a pixel of the enlarged picture."""
        rows, cols = self.column.values.shape
        height, width = original(self).shape[:2]
        return min(max(y, 0) * rows // height, rows - 1), min(max(x, 0) * cols // width, cols - 1)


def original(view: View) -> NDArray[np.uint8]:
    """The image as the model saw it, (H, W, 3), enlarged."""
    image = view.explanation.images[0].numpy()  # (1, H, W, 3) -> (H, W, 3)
    factor = math.ceil(SIDE / max(image.shape[:2]))
    size = (image.shape[1] * factor, image.shape[0] * factor)
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))


def map_picture(view: View, share: float, opacity: float) -> NDArray[np.uint8]:
    """The map of the chosen class over the image, (H, W, 3), with a frame around the chosen patch.

    A `share` of the patches, 0..1, keeps its colour: those with the largest attributions, for or against. `opacity` is that
    of the map, 0..1.
    """
    picture, values = original(view), strongest(view.column.values, share)
    heat = interpolate(values[None, None], size=picture.shape[:2], mode="nearest-exact")[
        0, 0
    ]  # (rows, cols) -> (H, W)
    drawn = Image.fromarray(overlay(picture, heat.numpy(), view.limit))
    mixed = Image.blend(Image.fromarray(picture), drawn, opacity)
    if view.patch is not None:
        (row, col), (rows, cols), (width, height) = view.patch, values.shape, mixed.size
        low, high = (
            (col * width // cols, row * height // rows),
            ((col + 1) * width // cols, (row + 1) * height // rows),
        )
        for color, line in (("white", 4), ("black", 2)):
            ImageDraw.Draw(mixed).rectangle((*low, high[0] - 1, high[1] - 1), outline=color, width=line)
    return np.asarray(mixed)


def strongest(values: Tensor, share: float) -> Tensor:
    """Values (rows, cols), zero but for the given share of those that are largest in size, rounded up."""
    kept = math.ceil(share * values.numel())
    order = values.abs().flatten().argsort(descending=True, stable=True)  # (rows, cols) -> (N,)
    chosen = torch.zeros_like(values).flatten()  # (N,)
    chosen[order[:kept]] = values.flatten()[order[:kept]]
    return chosen.view_as(values)  # (rows, cols)


def class_list(view: View) -> str:
    """A button for each class on offer, with its probability as a bar, or its value where that is a quantity."""
    buttons = []
    for place, column in enumerate(view.columns):
        share = float(view.explanation.probabilities[0, column.index])
        quantity = math.isnan(share)
        text = "&lt; 0.1 %" if 0 < share < 0.001 else f"{100 * share:.1f} %"
        text = number(float(view.explanation.logits[0, column.index])) if quantity else text
        buttons.append(
            f'<button type="button" data-place="{place}" aria-pressed="{str(place == view.place).lower()}">'
            f'<span class="bar" style="width: {0 if quantity else 100 * share:.1f}%"></span>'
            f'<span class="name">{_name(column)}</span><span class="share">{text}</span></button>'
        )
    return f'<div class="classes" role="group" aria-label="Class to explain">{"".join(buttons)}</div>'


def scale_bar(view: View) -> str:
    """What the colours mean, with their numbers."""
    low, high = _signed(view, -view.limit), _signed(view, view.limit)
    return (
        f'<div class="scale"><div class="colours" role="img" aria-label="Colours from {low}, blue, over 0, transparent, to '
        f'{high}, red"></div><div class="ticks"><span>{low}<br>against</span><span>0</span><span>{high}<br>for</span></div>'
        f"</div>"
    )


def reading(view: View) -> str:
    """The value of the chosen patch for the chosen class."""
    if view.patch is None:
        return '<p class="reading">Click a patch of the map to read its number.</p>'
    row, col = view.patch
    value = _signed(view, float(view.column.values[row, col]))
    return f'<p class="reading">Row {row + 1}, column {col + 1}: <strong>{value}</strong> for <em>{_name(view.column)}</em></p>'


def sum_check(view: View) -> str:
    """That the empty image's score and all patches together make the model's score."""
    one, index = view.explanation, view.column.index
    total = float(view.column.values.double().sum())
    null, logit = float(one.null_values[0, index]), float(one.logits[0, index])
    start, patches, end, score = adding_up([null], [total], [logit], decimals=3)
    return (
        f'<p class="check"><strong>Sum check</strong> for <em>{_name(view.column)}</em>: {start} for an empty picture, and '
        f"{patches} from all patches together, make {end}. The score the model gives is {score}.</p>"
    )


def how_made(view: View) -> str:
    """The level of the map, and how near it is thought to be."""
    one = view.explanation
    error = "" if view.column.errors is None else f", {expected_error(one, view.column.index)}"
    return f'<p class="quiet level"><strong>Level</strong>: {escape(level([one]))}{error}.</p>'


def message(text: str) -> str:
    """A sentence for the visitor that may quote anything."""
    return f'<p class="message" role="alert">{escape(text)}</p>'


def _name(column: Column) -> str:
    # `bdi` keeps a name that is written from right to left from turning the numbers beside it.
    return f"<bdi>{escape(column.label)}</bdi>"


def _signed(view: View, value: float) -> str:
    """An attribution with as many decimals as give the largest one three digits."""
    decimals = 2 - math.floor(math.log10(view.limit)) if view.limit else 0
    return f"{value:+.{min(max(decimals, 2), 9)}f}".replace("-", MINUS)
