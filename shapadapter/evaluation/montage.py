"""The grid pointing game: of four images in one, does the map of each class lie on its own image? (Böhle et al. 2021)."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from shapadapter.evaluation.localization import grid_pointing
from shapadapter.evaluation.measure import Measurer
from shapadapter.evaluation.records import Record, Records, digest, plain
from shapadapter.explanation.api import Predicted, predictions

SIDE = 2
"""Images along each side of a montage."""


def montages(measurer: Measurer, kept: Records, records: Sequence[Record]) -> tuple[list[Record], str | None]:
    """Play the game on montages of images that the model predicts right.

    Args:
        measurer: of the images.
        kept: where records of montages are kept, too.
        records: of the images.

    Returns:
        one record for each montage, by method the share of positive attribution in the class's own quarter; or none, and
        why.
    """
    batch = measurer.predict(measurer.rows.batch([records[0]["index"]]).inputs)
    reason = _impossible(batch)
    fours = [] if reason else _fours(records, measurer.plan.seed)
    if not reason and not fours:
        reason = "Grid pointing needs four images of different classes that the model predicts right."
    found = []
    for four in fours:
        montage = _montage(measurer.rows.batch([record["index"] for record in four]).inputs["pixel_values"])
        name = f"montage-{digest({'pixels': montage, 'classes': torch.tensor([r['class'] for r in four], device='cpu')}).hex()[:12]}"
        record = kept.find(name) or _played(measurer, montage, four)
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


def _fours(records: Sequence[Record], seed: int) -> list[list[Record]]:
    """Groups of four images of different classes, each image in one, as many as there are."""
    by_class: dict[int, list[Record]] = defaultdict(list)
    for record in records:
        if record["label"] is None or record["label"] == record["class"]:
            by_class[record["class"]].append(record)
    source = random.Random(seed)
    fours = []
    while len(by_class) >= SIDE**2:
        # From the classes with most images left, so that as few as possible remain.
        largest = sorted(by_class, key=lambda name: -len(by_class[name]))[: SIDE**2]
        four = [by_class[name].pop() for name in largest]
        source.shuffle(four)
        fours.append(four)
        by_class = defaultdict(list, {name: left for name, left in by_class.items() if left})
    return fours


def _montage(pixels: Tensor) -> Tensor:
    """Four images (4, C, H, W), each half as large, in one (1, C, H, W)."""
    height, width = pixels.shape[-2] // SIDE, pixels.shape[-1] // SIDE
    small = interpolate(pixels.float(), size=(height, width), mode="bilinear", antialias=True)  # (4, C, H / 2, W / 2)
    rows = small.unflatten(0, (SIDE, SIDE)).permute(2, 0, 3, 1, 4)  # (C, 2, H / 2, 2, W / 2)
    return rows.flatten(3, 4).flatten(1, 2)[None]  # (1, C, H, W)


def _played(measurer: Measurer, montage: Tensor, four: Sequence[Record]) -> Record:
    """The record of one montage: only classes count that the model still gives more than chance."""
    inputs, methods = {"pixel_values": montage}, measurer.methods
    (batch,) = predictions(measurer.model, inputs, None, None, None, None, 1, methods.options)
    logits = batch.output.logits[0].double().cpu()  # (K,)
    softmax = batch.likelihood == "softmax"
    likelihoods = logits.softmax(dim=0) if softmax else logits.sigmoid()  # (K,)
    cells = [
        (cell, record["class"])
        for cell, record in enumerate(four)
        if likelihoods[record["class"]] > (1 / len(logits) if softmax else 0.5)
    ]
    targets = [target for _, target in cells]
    shares: dict[str, dict[str, float]] = {}
    for name in methods.names if cells else ():
        explanation = methods.explain(name, measurer.model, inputs, targets, four[0]["index"])
        maps = torch.cat([explanation.for_label(target) for target in targets])  # (cells, rows, cols)
        share = grid_pointing(maps, torch.tensor([cell for cell, _ in cells], device="cpu"), SIDE)  # (cells,)
        # Without positive attribution: what a map that knows nothing gets.
        shares[name] = {"grid_pointing": float(share.nan_to_num(1 / SIDE**2).mean())}
    return {"methods": plain(shares), "cells": len(cells)}
