"""What is measured of images: one record of plain numbers for each, sanity checks among them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from shapadapter.backbone import evaluation_view
from shapadapter.core.errors import ShapleyError
from shapadapter.core.shapley import generator_of
from shapadapter.core.statistics import Interval, relative_l2, spearman
from shapadapter.data.labels import known_labels
from shapadapter.evaluation.dataset import Rows, choose
from shapadapter.evaluation.deletion import areas, follow, orders, road
from shapadapter.evaluation.equal_cost import errors_of
from shapadapter.evaluation.faithfulness import Games, agreement, find_truth, sensitivity
from shapadapter.evaluation.localization import mask_measures, saliency, tiles_inside
from shapadapter.evaluation.plan import SALIENCY, Explainer, Plan, has_unit, images_of, stacked
from shapadapter.evaluation.records import Means, Record, digest, plain
from shapadapter.explanation.game import active_layer
from shapadapter.explanation.passes import Predicted

COALITIONS_PER_IMAGE = 8
"""Coalitions that go in a forward pass for each image that could: half their tokens are absent on average."""

NOISE = 0.05
"""Standard deviation of the pixel noise, in that of the image's own pixels."""


@dataclass(frozen=True)
class Measurer:
    """What is measured: a wrapped model in evaluation mode, rows, a plan, and the column of masks, None without."""

    model: nn.Module
    rows: Rows
    plan: Plan
    masks: str | None

    @cached_property
    def randomized(self) -> nn.Module:
        """The model with random parameters, made when it is first needed."""
        return with_random_parameters(self.model, self.plan.seed)

    def name_of(self, index: int) -> str:
        """A name for the record of a row that changes with its image, label and mask."""
        row = self.rows.batch([index])
        mask = None if self.masks is None else torch.from_numpy(self.rows.mask(self.masks, index))
        parts = {**row.inputs, "labels": row.labels, "mask": mask}
        return f"image-{index}-{digest(parts).hex()[:12]}"

    def records(self, indices: Sequence[int]) -> list[Record]:
        """Measure the rows of these indices together."""
        (inputs, labels), plan = self.rows.batch(indices), self.plan
        batch = plan.predict(self.model, inputs)
        if batch.tiling.count < 2:
            raise ShapleyError("The image is a single player; there is nothing to explain.")
        explanations = plan.explanations(self.model, batch, indices)
        maps = stacked(explanations, batch.classes)  # (B, methods, N)
        finite = maps.isfinite().all(dim=-1).all(dim=0).tolist()  # for each method
        if not all(finite):
            bad = [name for name, one in zip(plan.names, finite, strict=True) if not one]
            raise ShapleyError(
                f"The methods {bad} gave attributions that are not finite; no curve can be drawn of them."
            )
        games = Games(self.model, batch, COALITIONS_PER_IMAGE * plan.batch_size)
        truth = find_truth(games, indices, plan.truth_evaluations, plan.budgets, plan.seed)
        order = orders(maps, indices, plan.seed)  # (B, methods, N)
        curves = follow(games, order)
        if plan.thorough:
            curves |= road(games, order, indices, plan.seed)
        measures = {
            **agreement(maps, truth.values, [has_unit(one) for one in explanations[0]]),
            **areas(curves),
            **sensitivity(games, maps, indices, plan.seed),
            "evaluations": torch.tensor([[_spent(one) for one in several] for several in explanations], device="cpu"),
            **(self._sanity(batch, maps, indices) if plan.thorough else {}),
        }
        area, places = self._places(batch, maps, indices)
        common = {
            "players": torch.tensor([batch.tiling.players], device="cpu").expand(len(indices), -1),
            "class": games.classes.cpu(),
            "label": _single(labels, len(indices)),
            "likelihood": games.full.likelihoods[:, 0],
            "truth_error": truth.errors,
            "kernel_shap": relative_l2(truth.estimates, truth.values[:, None]),  # (B, budgets)
            **area,
        }
        against = errors_of(self.model, plan, batch, indices, truth.values)
        records: list[Record] = []
        for image, index in enumerate(indices):
            methods = _by_method(plan.names, measures, image)
            for name, found in _by_method([*plan.names, SALIENCY] if places else [], places, image).items():
                methods.setdefault(name, {}).update(found)
            numbers = {name: plain(value[image]) for name, value in common.items()}
            lines = _by_method(plan.names, curves, image)
            numbers["cost_curve"] = plain(against[image])
            records.append({"index": index, **numbers, "methods": methods, "curves": lines})
        return records

    def _sanity(self, batch: Predicted, maps: Tensor, indices: Sequence[int]) -> dict[str, Tensor]:
        """What happens to the maps (B, methods, N) without the model's knowledge, and under noise."""
        untaught = _maps(self.plan, self.randomized, _again(self.plan, self.randomized, batch), indices)
        pixels = batch.inputs["pixel_values"].clone()  # (B, C, H, W)
        for place, index in enumerate(indices):
            drawn = torch.randn(pixels[:1].shape, generator=generator_of(self.plan.seed, index, "noise"), device="cpu")
            pixels[place] += NOISE * pixels[place].std() * drawn[0].to(pixels)
        noisy = _again(self.plan, self.model, replace(batch, inputs={**batch.inputs, "pixel_values": pixels}))
        shaken = _maps(self.plan, self.model, noisy, indices)
        # Near 0 is good: maps that stay the same do not depend on what the model has learned.
        found = {"randomised": spearman(untaught, maps)}
        return {**found, **stability(maps, shaken, batch.output.logits, noisy.output.logits)}

    def _places(
        self, batch: Predicted, maps: Tensor, indices: Sequence[int]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The object's share of each image (B,), and the measures (B, methods + 1), with the reference without a model."""
        if self.masks is None:
            return {}, {}
        masks = [self.rows.mask(self.masks, index) for index in indices]
        inside = torch.stack([tiles_inside(mask, batch, self.rows.processor) for mask in masks])  # (B, rows, cols)
        grids = maps.unflatten(-1, batch.tiling.players)  # (B, methods, rows, cols)
        every = torch.cat([grids, saliency(batch)[:, None]], dim=1)  # (B, methods + 1, rows, cols)
        return {"area": inside.mean(dim=(1, 2))}, mask_measures(every, inside)


def _by_method(names: list[str], values: dict[str, Tensor], image: int) -> dict[str, dict[str, Any]]:
    """Of one image in tensors (B, methods, ...)."""
    return {
        name: {measure: plain(value[image, column]) for measure, value in values.items()}
        for column, name in enumerate(names)
    }


def _single(labels: Tensor | None, images: int) -> Tensor:
    """The one label of each image, (B,); nan where there is none, or several."""
    if labels is None or labels.ndim != 1 or labels.is_floating_point():
        return torch.full((images,), torch.nan, device="cpu")
    known = known_labels(labels, quantities=False)  # (B,)
    return (labels if bool(known.all()) else labels.double().where(known, torch.nan)).cpu()


def _spent(explanation: Any) -> float:
    """Model evaluations beyond the forward pass; nan if nobody counted."""
    return float("nan") if explanation.evaluations is None else float(explanation.evaluations[0])


# -- do maps depend on what the model has learned, and are they stable where the model is? ---------------------------


def with_random_parameters(model: nn.Module, seed: int) -> nn.Module:
    """A copy whose parameters, of base and adapter, are drawn anew: normal, with each tensor's mean and deviation.

    The model-parameter randomization test (Adebayo et al. 2018).
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


def stability(maps: Tensor, noisy: Tensor, logits: Tensor, noisy_logits: Tensor) -> dict[str, Tensor]:
    """Relative change of maps (B, methods, N) under noise, and its ratio to that of the logits (B, K)."""
    change = relative_l2(noisy, maps)  # (B, methods)
    moved = relative_l2(noisy_logits.double(), logits.double())[:, None].cpu()  # (B, 1)
    return {"noise_change": change, "noise_ratio": change / moved}


def _again(plan: Plan, model: nn.Module, batch: Predicted) -> Predicted:
    """What a model says of the images of a batch, with the same classes to explain."""
    return replace(plan.predict(model, images_of(batch.inputs)), classes=batch.classes)


def _maps(plan: Plan, model: nn.Module, batch: Predicted, indices: Sequence[int]) -> Tensor:
    """The maps (B, methods, N) of every method."""
    return stacked(plan.explanations(model, batch, indices), batch.classes)


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

    With an `other_model` trained on shuffled labels this is the label randomization test (Adebayo et al. 2018): maps of
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
    plan = replace(Plan.of({"compared": method}, seed, options), explainers={"compared": method})
    rows, found = Rows(dataset, processor), []
    chosen = choose(len(rows), images, seed)
    model, other_model = evaluation_view(model), evaluation_view(other_model)
    with torch.no_grad():
        for start in range(0, len(chosen), batch_size):
            indices = chosen[start : start + batch_size]
            batch = plan.predict(model, rows.batch(indices).inputs)
            one, other = (_maps(plan, each, batch, indices)[:, 0] for each in (model, other_model))  # (b, N)
            if one.shape != other.shape:
                raise ShapleyError(f"The models have {one.shape[1]} and {other.shape[1]} players.")
            found.append(spearman(other, one))  # (b,)
    return Means(None, seed).of_columns(torch.cat(found)[:, None])[0]
