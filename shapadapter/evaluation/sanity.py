"""Do maps depend on what the model has learned, and are they stable where the model is?"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from shapadapter.backbone import evaluation_view
from shapadapter.core.errors import ShapleyError
from shapadapter.core.statistics import Interval, generator_of, relative_l2, spearman
from shapadapter.data.images import IMAGE_INPUTS
from shapadapter.evaluation.compared import Explainer, Methods, image_of, stacked
from shapadapter.evaluation.dataset import Rows, choose
from shapadapter.evaluation.summary import mean_of
from shapadapter.explanation.api import Predicted, predictions
from shapadapter.explanation.game import active_layer

NOISE = 0.05
"""Standard deviation of the pixel noise, in that of the image's own pixels."""


def with_random_parameters(model: nn.Module, seed: int) -> nn.Module:
    """A copy whose parameters, of base and adapter, are drawn anew: normal, with each tensor's mean and deviation.

    The model-parameter randomisation test (Adebayo et al. 2018): maps that stay the same do not depend on the model.
    """
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.is_floating_point() and parameter.numel() > 1:
                numbers = parameter.float()
                noise = torch.randn(parameter.shape, generator=generator, device="cpu").to(parameter.device)
                parameter.copy_(numbers.mean() + numbers.std() * noise)
    return other


def dependence(maps: Tensor, randomised: Tensor) -> dict[str, Tensor]:
    """How much maps (B, methods, N) are like those of a model that knows nothing: (B, methods), near 0 is good."""
    return {"randomised": spearman(randomised, maps)}


def stability(maps: Tensor, noisy: Tensor, logits: Tensor, noisy_logits: Tensor) -> dict[str, Tensor]:
    """Relative change of maps (B, methods, N) under noise, and its ratio to that of the logits (B, K)."""
    change = relative_l2(noisy, maps)  # (B, methods)
    moved = relative_l2(noisy_logits.double(), logits.double())[:, None].cpu()  # (B, 1)
    return {"noise_change": change, "noise_ratio": change / moved}


def with_noise(
    model: nn.Module, batch: Predicted, indices: Sequence[int], seed: int, options: dict[str, Any]
) -> Predicted:
    """The batch again, after a little Gaussian noise on its pixels; the same classes are explained."""
    parts = []
    for place, index in enumerate(indices):
        pixels = image_of(batch.inputs, place)["pixel_values"]  # (1, C, H, W)
        drawn = torch.randn(pixels.shape, generator=generator_of(seed, index, "noise"), device="cpu").to(pixels)
        parts.append(pixels + NOISE * pixels.std() * drawn)
    inputs = {**_images(batch), "pixel_values": torch.cat(parts)}
    return again(model, replace(batch, inputs={**batch.inputs, **inputs}), options)


def again(model: nn.Module, batch: Predicted, options: dict[str, Any]) -> Predicted:
    """What a model says of the images of a batch, with the same classes to explain."""
    images = _images(batch)
    (found,) = predictions(model, images, None, None, 1, None, len(images["pixel_values"]), options)
    return replace(found, classes=batch.classes)


def maps_of(methods: Methods, model: nn.Module, batch: Predicted, indices: Sequence[int]) -> Tensor:
    """The maps (B, methods, N) of every method."""
    return stacked(methods.maps(model, batch, indices), batch.classes[:, 0].tolist())


def _images(batch: Predicted) -> dict[str, Tensor]:
    return {name: value for name, value in batch.inputs.items() if name in IMAGE_INPUTS}


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
