"""How to read the blocks of a table: what stands in each, in which unit, and what chance gets."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

About = Mapping[str, Any]

SANITY = (
    "Spearman correlation with the maps of a model with random parameters; relative change of the map under pixel noise "
    "of 5 % of the image's deviation, and that over the relative change of the logits."
)
COST = (
    "Evaluations beyond the forward pass, a gradient counts as one. Time and peak memory of activations over those of the "
    "base model's plain forward pass, measured side by side; of the one pass with LoRA merged."
)


FEW_IMAGES = 8
"""Fewer say little."""


def summary(about: About) -> str:
    """What was measured, in a few sentences."""
    rows, cols = about["players"]
    over = "images" if about["groups"] is None else f"{about['groups']} groups of images"
    where = f"{about['checkpoint']} on {about['folder']}: " if "checkpoint" in about else ""
    methods = f" Compared: {', '.join(about['methods'])}." if "methods" in about else ""
    few = about["images"] < FEW_IMAGES
    doubt = f" Only {about['images']} image{'s' * (about['images'] > 1)}: the numbers say little." if few else ""
    return (
        f"{where}{about['model']}, {rows} x {cols} players, removal by {about['removal']}, prediction by {about['prediction']}. "
        f"{about['images']} of {about['data']} images explained, seed {about['seed']}; explained is {about['explained']}, "
        f"and the game's value is its {about['value']}. Mean ± half the width of the 95 % bootstrap interval over {over}."
        f"{methods}{doubt}"
    )


PEAK = (
    "* About as many pairs of coalitions as players: there the fit of KernelSHAP is at its most unstable, and its error "
    "above that of smaller and larger budgets."
)


def peaks(about: About, budgets: Iterable[int]) -> list[int]:
    """The budgets, in evaluations, within a tenth of two for each player."""
    pairs = 2 * math.prod(about["players"])
    return [budget for budget in budgets if abs(budget - pairs) <= 0.1 * pairs]


def truth(about: About) -> str:
    """Of the error to the truth."""
    count = f"{about['truth_evaluations']:,}"
    if about["truth"] == "exact":
        words = f"The truth is exact: all {count} coalitions."
    else:
        words = f"The truth is KernelSHAP with {count} evaluations, its own error {about['truth_error']:.2g}."
    return f"{words} Top-k: k = {about['top_k']}. Methods without a unit have no L2 error."


def curves(about: About) -> str:
    """Of insertion, deletion and AOPC."""
    return (
        f"Read as the explained class's {about['curves_read']}, by this model, with the removal of its game. MoRF: most "
        "relevant first, LeRF: least relevant first."
    )


def removal(about: About) -> str:
    """Of sensitivity-n, faithfulness correlation, infidelity and ROAD."""
    counts = ", ".join(map(str, about["removed_counts"]))
    return (
        f"n = {counts} of {math.prod(about['players'])} players removed, {about['removal_draws']} coalitions each, values "
        "in logits; faithfulness correlation with the second n. Infidelity of the map scaled to fit best: equal shares get "
        "1. ROAD: share of images still predicted alike, mean over 10 % to 90 % of the players imputed."
    )


def places(about: About, pointing: bool) -> str:
    """Of localisation."""
    area = about["area"]
    words = [] if area is None else [f"The object covers {area:.3g} of the image: the energy that chance gets inside."]
    return " ".join([*words, *(["Grid pointing on 2 x 2 montages: chance 0.25."] if pointing else [])])
