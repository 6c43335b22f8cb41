"""Compare the maps of two models: the label randomisation test, among others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from shapadapter.backbone import evaluation_view
from shapadapter.errors import ShapleyError
from shapadapter.explaining import predictions
from shapadapter.game import active_layer
from shapadapter.metrics import Interval, spearman

from .data import Rows, choose
from .methods import Explainer, Methods
from .sanity import maps_of
from .summary import mean_of


def map_agreement(
    model: nn.Module,
    other_model: nn.Module,
    dataset: Any,
    processor: Any | None = None,
    *,
    method: str | Explainer = "shapadapter",
    images: int = 32,
    seed: int = 0,
    batch_size: int = 32,
    **options: Any,
) -> Interval:
    """Rank correlation of two models' maps of the same images, for the classes that the first predicts.

    With an `other_model` trained on shuffled labels this is the label randomisation test (Adebayo et al. 2018): maps of
    a good method then have little in common.

    Args:
        model: a wrapped classifier.
        other_model: another one with the same classes and players.
        dataset: as for `evaluate`.
        processor: as for `evaluate`; both models get the same images.
        method: a name that `attribute` knows, or a function as for `evaluate`.
        images: how many images, drawn from the data.
        seed: of all that is drawn.
        batch_size: images in a forward pass.
        **options: further keyword arguments of the models' forward.

    Returns:
        The mean Spearman correlation over images, with its bootstrap interval.

    Raises:
        ShapleyError: the models differ in classes or players.
    """
    classes = [active_layer(each).classes for each in (model, other_model)]
    if classes[0] != classes[1]:
        raise ShapleyError(f"Expected two models with the same classes, got {classes[0]} and {classes[1]} of them.")
    methods = Methods.of({"compared": method}, seed, options)
    alone = replace(methods, explainers={"compared": method})
    rows, found = Rows(dataset, processor), []
    chosen = choose(len(rows), images, seed)
    model, other_model = evaluation_view(model), evaluation_view(other_model)
    with torch.no_grad():
        for start in range(0, len(chosen), batch_size):
            indices = chosen[start : start + batch_size]
            inputs = rows.batch(indices).inputs
            (batch,) = predictions(model, inputs, None, None, 1, None, len(indices), options)
            one, other = (maps_of(alone, each, batch, indices)[:, 0] for each in (model, other_model))  # (b, N)
            if one.shape != other.shape:
                raise ShapleyError(f"The models have {one.shape[1]} and {other.shape[1]} players.")
            found.append(spearman(other, one))  # (b,)
    return mean_of(torch.cat(found), None, seed)
