"""Everything that is measured about a few images: one record of plain numbers for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from shapadapter.core.errors import ShapleyError
from shapadapter.core.statistics import relative_l2
from shapadapter.data.labels import known_labels
from shapadapter.evaluation.agreement import agreement
from shapadapter.evaluation.compared import Methods, check_finite, has_unit, stacked
from shapadapter.evaluation.dataset import Rows
from shapadapter.evaluation.deletion import follow, orders
from shapadapter.evaluation.games import Games
from shapadapter.evaluation.localization import SALIENCY, localisation, saliency, tiles_inside
from shapadapter.evaluation.plan import Plan
from shapadapter.evaluation.records import Record, as_numbers, digest
from shapadapter.evaluation.road import road, road_lines, road_measures
from shapadapter.evaluation.sanity import again, dependence, maps_of, stability, with_noise, with_random_parameters
from shapadapter.evaluation.sensitivity import sensitivity
from shapadapter.evaluation.truth import find_truth
from shapadapter.explanation.api import Predicted, predictions

COALITIONS_PER_IMAGE = 8
"""Coalitions that go in a forward pass for each image that could: half their tokens are absent on average."""


@dataclass(frozen=True)
class Measurer:
    """What is measured, on which model and data.

    Attributes:
        model: a wrapped model in evaluation mode.
        rows: the data.
        plan: the methods that are compared, and the effort.
        masks: the column of pixel masks, None without.
    """

    model: nn.Module
    rows: Rows
    plan: Plan
    masks: str | None

    @property
    def methods(self) -> Methods:
        """That are compared."""
        return self.plan.methods

    @cached_property
    def randomised(self) -> nn.Module:
        """The model with random parameters, made when it is first needed."""
        return with_random_parameters(self.model, self.plan.seed)

    def predict(self, inputs: dict[str, Tensor]) -> Predicted:
        """The forward pass of some images, with their predicted classes to explain."""
        count = len(inputs["pixel_values"])
        (batch,) = predictions(self.model, inputs, None, None, 1, None, count, self.methods.options)
        if batch.tiling.count < 2:
            raise ShapleyError("The image is a single player; there is nothing to explain.")
        return batch

    def name_of(self, index: int) -> str:
        """A name for the record of a row that changes with its image, label and mask."""
        row = self.rows.batch([index])
        mask = None if self.masks is None else torch.from_numpy(self.rows.mask(self.masks, index))
        parts = {**row.inputs, "labels": row.labels, "mask": mask}
        return f"image-{index}-{digest(parts).hex()[:12]}"

    def records(self, indices: Sequence[int]) -> list[Record]:
        """Measure the rows of these indices together."""
        rows, seed = self.rows.batch(indices), self.plan.seed
        batch = self.predict(rows.inputs)
        explanations = self.methods.maps(self.model, batch, indices)
        maps = stacked(explanations, batch.classes[:, 0].tolist())  # (B, methods, N)
        check_finite(maps, self.methods.names)
        games = Games(self.model, batch, COALITIONS_PER_IMAGE * self.plan.batch_size)
        truth = find_truth(games, indices, self.plan.truth_evaluations, self.plan.budgets, seed)
        order = orders(maps, indices, seed)  # (B, methods, N)
        curves = follow(games, order)
        measures = {
            **agreement(maps, truth.values, [has_unit(one) for one in explanations[0]]),
            **curves.measures(),
            **sensitivity(games, maps, indices, seed),
            "evaluations": torch.tensor([[_spent(one) for one in several] for several in explanations], device="cpu"),
        }
        lines = {"insertion": curves.insertion, "deletion": curves.deletion}
        if self.plan.thorough:
            measures |= self._sanity(batch, maps, indices)
            kept = road(games, order, indices, seed)
            measures |= road_measures(kept)
            lines |= road_lines(kept)
        common = {
            "players": torch.tensor([batch.tiling.players], device="cpu").expand(len(indices), -1),
            "class": games.classes.cpu(),
            "label": _single(rows.labels, len(indices)),
            "likelihood": games.full.likelihoods[:, 0],
            "truth_error": truth.errors,
            "kernel_shap": relative_l2(truth.estimates, truth.values[:, None]),  # (B, budgets)
        }
        return self._as_records(indices, common, measures, lines, self._located(indices, batch, maps))

    def _sanity(self, batch: Predicted, maps: Tensor, indices: Sequence[int]) -> dict[str, Tensor]:
        """What happens to the maps (B, methods, N) without the model's knowledge, and under noise."""
        options = self.methods.options
        untaught = maps_of(self.methods, self.randomised, again(self.randomised, batch, options), indices)
        noisy = with_noise(self.model, batch, indices, self.plan.seed, options)
        shaken = maps_of(self.methods, self.model, noisy, indices)
        return {
            **dependence(maps, untaught),
            **stability(maps, shaken, batch.output.logits, noisy.output.logits),
        }

    def _located(
        self, indices: Sequence[int], batch: Predicted, maps: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]] | None:
        """The object's share of each image (B,) and the measures (B, methods + 1), with the reference without a model."""
        if self.masks is None:
            return None
        masks = [self.rows.mask(self.masks, index) for index in indices]
        inside = torch.stack([tiles_inside(mask, batch, self.rows.processor) for mask in masks])  # (B, rows, cols)
        grids = maps.unflatten(-1, batch.tiling.players)  # (B, methods, rows, cols)
        every = torch.cat([grids, saliency(batch)[:, None]], dim=1)  # (B, methods + 1, rows, cols)
        return inside.mean(dim=(1, 2)), localisation(every, inside)

    def _as_records(
        self,
        indices: Sequence[int],
        common: dict[str, Tensor],
        measures: dict[str, Tensor],
        lines: dict[str, Tensor],
        located: tuple[Tensor, dict[str, Tensor]] | None,
    ) -> list[Record]:
        """Tensors (B, ...) and (B, methods, ...) as one record for each image."""
        names = self.methods.names
        records = []
        for place, index in enumerate(indices):
            record: Record = {"index": index, **{name: as_numbers(value[place]) for name, value in common.items()}}
            record["methods"] = _by_method(names, measures, place)
            record["curves"] = _by_method(names, lines, place)
            if located is not None:
                area, where = located
                record["area"] = float(area[place])
                for name, found in _by_method([*names, SALIENCY], where, place).items():
                    record["methods"].setdefault(name, {}).update(found)
            records.append(record)
        return records


def _by_method(names: list[str], values: dict[str, Tensor], place: int) -> dict[str, dict[str, Any]]:
    return {
        name: {measure: as_numbers(value[place, column]) for measure, value in values.items()}
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
