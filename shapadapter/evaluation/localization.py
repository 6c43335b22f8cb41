"""Do attributions lie on the object? Measures against a mask, and the grid pointing game."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from shapadapter.backbone import sum_over_tiles
from shapadapter.core.errors import ShapleyError
from shapadapter.data.images import prepare_images
from shapadapter.evaluation.dataset import Rows
from shapadapter.evaluation.plan import Plan
from shapadapter.evaluation.records import Record, Records, digest, plain
from shapadapter.explanation.passes import Predicted


def energy_inside(attributions: Tensor, inside: Tensor) -> Tensor:
    """The share of the positive attribution that lies inside a region: `sum phi+ * inside / sum phi+`.

    The energy-based pointing game (Wang et al. 2020) on players. Negative attributions are set aside first: in a
    signed sum they would cancel, and the share would have no bound. A map that knows nothing gets the share of the
    image that the region covers.

    Args:
        attributions: (..., rows, cols) attribution of each player to one class.
        inside: (..., rows, cols) share of each player's tile inside the region, 0 to 1
            (`grid.pixels_to_players` makes it from a pixel mask).

    Returns:
        (...) share in 0 .. 1; nan where no attribution is positive.

    Raises:
        ValueError: the two are not on the same grid.
    """
    _check_same_grid(attributions, inside)
    positive = attributions.clamp(min=0)  # (..., rows, cols)
    return (positive * inside).sum(dim=(-2, -1)) / positive.sum(dim=(-2, -1))  # (..., rows, cols) -> (...)


def pointing_game(attributions: Tensor, inside: Tensor) -> Tensor:
    """Whether the player with the largest attribution is part of the object (Zhang et al. 2018).

    Several largest ones share the hit. So a map that says the same of every player gets what chance gets.

    Args:
        attributions: (..., rows, cols) attribution of each player to one class.
        inside: (..., rows, cols) share of each player's tile inside the object, 0 to 1.

    Returns:
        (...) float64, 1 for a hit and 0 for a miss; nan where the object covers more than half of no tile, so that
        no map could hit it, or an attribution is nan.

    Raises:
        ValueError: the two are not on the same grid.
    """
    _check_same_grid(attributions, inside)
    truth = inside > 0.5  # (..., rows, cols)
    largest = attributions == attributions.amax(dim=(-2, -1), keepdim=True)  # (..., rows, cols)
    hits = (largest & truth).sum(dim=(-2, -1)).double() / largest.sum(dim=(-2, -1))  # (..., rows, cols) -> (...)
    return hits.masked_fill(~truth.any(dim=-1).any(dim=-1), torch.nan)


def grid_pointing(attributions: Tensor, cell: Tensor, side: int) -> Tensor:
    """The share of the positive attribution in the cell of a montage that shows the class (Böhle et al. 2021).

    The montage is made of `side x side` images of different classes; the attributions are to the class of one.

    Args:
        attributions: (..., rows, cols) attribution of each player of the montage to one class.
        cell: (...) int, the cell that shows the class: 0 to side^2 - 1, row by row.
        side: Number of images along each side of the montage; it divides rows and cols.

    Returns:
        (...) share in 0 .. 1, chance is `1 / side^2`; nan where no attribution is positive.

    Raises:
        ValueError: players lie across the cells, or there is no such cell.
    """
    rows, cols = attributions.shape[-2:]
    if side < 1 or rows % side or cols % side:
        raise ValueError(f"{rows} x {cols} players cannot be cut into {side} x {side} cells of a montage.")
    if bool(((cell < 0) | (cell >= side**2)).any()):
        raise ValueError(f"cells are numbered 0 to {side**2 - 1}, row by row, but got {cell.tolist()}.")
    down = torch.arange(rows, device=cell.device)[:, None] // (rows // side)  # (rows, 1)
    right = torch.arange(cols, device=cell.device) // (cols // side)  # (cols,)
    inside = down * side + right == cell[..., None, None]  # (rows, cols), (..., 1, 1) -> (..., rows, cols)
    return energy_inside(attributions, inside.to(attributions.device))


@dataclass(frozen=True)
class Segmentation:
    """How well thresholded attributions separate the object from the background, per image.

    Attributes:
        accuracy: (...) share of players on the right side.
        iou: (...) intersection over union, mean of object and background.
        average_precision: (...) of the object's players in the order of the attributions, no threshold needed;
            nan where no player is part of the object.
    """

    accuracy: Tensor
    iou: Tensor
    average_precision: Tensor


def segmentation(attributions: Tensor, inside: Tensor) -> Segmentation:
    """Take the players above the mean attribution for the object, and compare (Chefer et al. 2021).

    On players instead of pixels, and image by image. The average precision is that of the object alone.

    Args:
        attributions: (..., rows, cols) attribution of each player to one class.
        inside: (..., rows, cols) share of each player's tile inside the object, 0 to 1.

    Returns:
        float64 measures in 0 .. 1, one per image.

    Raises:
        ValueError: the two are not on the same grid.
    """
    _check_same_grid(attributions, inside)
    scores, truth = torch.broadcast_tensors(attributions.double().flatten(-2), (inside > 0.5).flatten(-2))  # (..., N)
    # Above the mean means above the least, too; a rounded mean can lie below all entries of a constant map.
    found = (scores > scores.mean(dim=-1, keepdim=True)) & (scores > scores.amin(dim=-1, keepdim=True))  # (..., N)
    both = torch.stack([_iou(found, truth), _iou(~found, ~truth)])  # (2, ...)
    return Segmentation(
        accuracy=(found == truth).double().mean(dim=-1),  # (..., N) -> (...)
        iou=both.nanmean(dim=0),  # (2, ...) -> (...); an image that is all object has no background to find
        average_precision=_average_precision(scores, truth),
    )


def _iou(found: Tensor, truth: Tensor) -> Tensor:
    """Of sets of players, nan where both are empty: (..., N), (..., N) -> (...)."""
    return (found & truth).sum(dim=-1).double() / (found | truth).sum(dim=-1)


def _average_precision(scores: Tensor, truth: Tensor) -> Tensor:
    """The mean, over the object's players, of the precision among all that score as high: (..., N) -> (...)."""
    as_high = scores[..., None, :] >= scores[..., None]  # (..., N, N): row n holds who scores at least as high as n
    precision = (as_high & truth[..., None, :]).sum(dim=-1).double() / as_high.sum(dim=-1)  # (..., N, N) -> (..., N)
    return (precision * truth).sum(dim=-1) / truth.sum(dim=-1)  # (..., N) -> (...)


def _check_same_grid(attributions: Tensor, inside: Tensor) -> None:
    """Refuse a region that is not on the players' grid."""
    if attributions.shape[-2:] != inside.shape[-2:]:
        raise ValueError(
            f"attributions are on a grid of {tuple(attributions.shape[-2:])}, the region on one of "
            f"{tuple(inside.shape[-2:])}. Take a pixel mask through `grid.pixels_to_players` first."
        )


def mask_measures(maps: Tensor, inside: Tensor) -> dict[str, Tensor]:
    """Every measure of maps (B, methods, rows, cols) against masks (B, rows, cols), (B, methods) each."""
    truth = inside[:, None]  # (B, 1, rows, cols)
    parts = segmentation(maps, truth)
    energy = energy_inside(maps, truth)  # (B, methods)
    # A map without positive attribution points nowhere: that is worth what a map that knows nothing gets.
    chance = truth.mean(dim=(-2, -1)).expand_as(energy)  # (B, 1) -> (B, methods)
    return {
        "energy_inside": torch.where(energy.isnan(), chance, energy),
        "pointing_game": pointing_game(maps, truth),
        "segmentation_accuracy": parts.accuracy,
        "segmentation_iou": parts.iou,
        "segmentation_ap": parts.average_precision,
    }


def saliency(batch: Predicted) -> Tensor:
    """Reference maps (B, rows, cols) without a model: how far the color of each tile is from the image's mean color."""
    pictures = batch.seen.float()  # (B, H, W, 3)
    areas = sum_over_tiles(torch.ones_like(pictures[..., :1]), batch.tiling.players, batch.tiling.seen)  # (B, N, 1)
    tiles = sum_over_tiles(pictures, batch.tiling.players, batch.tiling.seen) / areas  # (B, N, 3)
    distance = (tiles - pictures.mean(dim=(1, 2))[:, None]).norm(dim=-1)  # (B, N)
    return distance.double().unflatten(1, batch.tiling.players)


def tiles_inside(inside: NDArray[np.bool_], batch: Predicted, processor: Any | None) -> Tensor:
    """The share of each tile that is part of the object, (rows, cols) float64 in 0..1.

    The mask (H, W), as large as the image in the data set, is resized and cropped by the same processor; without one it
    must fit the prepared images.
    """
    size = tuple(batch.inputs["pixel_values"].shape[-2:])
    if processor is not None:
        pixels = _processed(inside, processor)  # (h, w)
    elif inside.shape == size:
        pixels = torch.from_numpy(inside).double()
    else:
        raise ShapleyError(
            f"Without a processor expected masks of the size of the prepared images, {size}, got {inside.shape}."
        )
    height, width = batch.tiling.seen
    return adaptive_avg_pool2d(pixels[None, :height, :width], batch.tiling.players)[0]  # (rows, cols)


def _processed(inside: NDArray[np.bool_], processor: Any) -> Tensor:
    """A mask (H, W) as the processor resizes and crops it, (h, w) in 0..1."""
    # What a processor does to colors is linear: where black and white end up tells what a grey is.
    shades = [np.zeros_like(inside), np.ones_like(inside), inside]
    pictures = [Image.fromarray(np.repeat(255 * shade.astype(np.uint8)[..., None], 3, axis=2)) for shade in shades]
    black, white, found = prepare_images(pictures, processor)["pixel_values"].double().mean(dim=1)  # (h, w) each
    share = (found - black) / (white - black)  # (h, w)
    return share.nan_to_num(0, 0, 0).clamp(0, 1)  # padding is neither


# -- the grid pointing game: of four images in one, does the map of each class lie on its own image? ------------------

SIDE = 2
"""Images along each side of a montage."""


def play_montages(
    model: nn.Module, rows: Rows, plan: Plan, kept: Records, records: Sequence[Record]
) -> tuple[list[Record], str | None]:
    """Play the game on montages of the images of `records` that the model predicts right.

    Returns a record for each montage, by method the share of positive attribution in the class's own quarter; or none,
    and why.
    """
    batch = plan.predict(model, rows.batch([records[0]["index"]]).inputs)
    reason = _impossible(batch)
    fours = [] if reason else montage_groups(records, plan.seed)
    if not reason and not fours:
        reason = "Grid pointing needs four images of different classes that the model predicts right."
    found = []
    for four in fours:
        pixels = montage(rows.batch([record["index"] for record in four]).inputs["pixel_values"])
        classes = torch.tensor([record["class"] for record in four], device="cpu")
        name = f"montage-{digest({'pixels': pixels, 'classes': classes}).hex()[:12]}"
        record = kept.find(name)
        if record is None:
            record = _played(model, plan, pixels, four)
            kept.keep(name, record)
        found.append(record)
    if found and not any(record["methods"] for record in found):
        reason = "Grid pointing: in no montage did the model see any of the four classes."
    return found, reason


def _impossible(batch: Predicted) -> str | None:
    """Why these images make no montage, None if they do."""
    pixels, players = batch.inputs["pixel_values"], batch.tiling.players
    if batch.likelihood == "none" or batch.output.logits.shape[1] < SIDE**2:
        return f"Grid pointing needs a model with {SIDE**2} classes or more."
    if pixels.ndim != 4:
        return "Grid pointing needs images as pixels; these are cut in patches."
    if any(side % SIDE for side in (*pixels.shape[-2:], *players)):
        return (
            f"Grid pointing needs images and players that {SIDE} x {SIDE} quarters divide; there are {players[0]} x "
            f"{players[1]} players."
        )
    return None


def montage_groups(records: Sequence[Record], seed: int) -> list[list[Record]]:
    """Groups of four images of different classes, predicted right, each image in one, as many as there are."""
    by_class: dict[int, list[Record]] = defaultdict(list)
    for record in records:
        if record["label"] is None or record["label"] == record["class"]:
            by_class[record["class"]].append(record)
    source = random.Random(seed)
    groups = []
    while len(by_class) >= SIDE**2:
        # From the classes with most images left, so that as few as possible remain.
        largest = sorted(by_class, key=lambda name: -len(by_class[name]))[: SIDE**2]
        four = [by_class[name].pop() for name in largest]
        source.shuffle(four)
        groups.append(four)
        by_class = defaultdict(list, {name: left for name, left in by_class.items() if left})
    return groups


def montage(pixels: Tensor) -> Tensor:
    """Four images (4, C, H, W), each half as large, in one (1, C, H, W)."""
    height, width = pixels.shape[-2] // SIDE, pixels.shape[-1] // SIDE
    small = interpolate(pixels.float(), size=(height, width), mode="bilinear", antialias=True)  # (4, C, H / 2, W / 2)
    rows = small.unflatten(0, (SIDE, SIDE)).permute(2, 0, 3, 1, 4)  # (C, 2, H / 2, 2, W / 2)
    return rows.flatten(3, 4).flatten(1, 2)[None]  # (1, C, H, W)


def _played(model: nn.Module, plan: Plan, pixels: Tensor, four: Sequence[Record]) -> Record:
    """The record of one montage (1, C, H, W): only classes count that the model still gives more than chance."""
    inputs = {"pixel_values": pixels}
    batch = plan.predict(model, inputs)
    logits = batch.output.logits[0].double().cpu()  # (K,)
    softmax = batch.likelihood == "softmax"
    likelihoods = logits.softmax(dim=0) if softmax else logits.sigmoid()  # (K,)
    chance = 1 / len(logits) if softmax else 0.5
    cells = {cell: record["class"] for cell, record in enumerate(four) if likelihoods[record["class"]] > chance}
    targets = list(cells.values())
    shares: dict[str, dict[str, float]] = {}
    for name in plan.names if cells else ():
        explanation = plan.explain(name, model, inputs, targets, four[0]["index"])
        maps = torch.cat([explanation.for_label(target) for target in targets])  # (cells, rows, cols)
        share = grid_pointing(maps, torch.tensor(list(cells), device="cpu"), SIDE)  # (cells,)
        # Without positive attribution: what a map that knows nothing gets.
        shares[name] = {"grid_pointing": float(share.nan_to_num(1 / SIDE**2).mean())}
    return {"methods": plain(shares), "cells": len(cells)}
