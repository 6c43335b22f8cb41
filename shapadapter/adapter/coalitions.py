"""The game of a wrapped model: what it says of an image when only some players are there."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedModel

from shapadapter.adapter.call import ModelCall, runs_by_size
from shapadapter.adapter.head import ProjectionHead
from shapadapter.backbone import (
    Anatomy,
    FeatureHooks,
    ForwardCall,
    evaluating,
    evaluation_view,
    fill_absent,
    score,
    with_patch_mask,
)


@dataclass(frozen=True)
class Rules:
    """What an adapter's config says about its game.

    Attributes:
        prediction: "vote" or "classifier".
        classes: K of the adapter; with texts P.
        removal: "drop", "mask" or "pixels".
        blur: whether absent pixels show the blurred present ones.
        fill_color: the colour they show otherwise; None for 0 in the image processor's scale.
        grid: (rows, cols) of the players, None for the cells.
        offset: (down, right) by which cells look beside their place, in cells.
        empty: (1, K), v(empty) where it is known beforehand, as in a model that is exported for one size of images.
    """

    prediction: str
    classes: int
    removal: Any
    blur: bool = False
    fill_color: tuple[float, ...] | None = None
    grid: tuple[int, int] | None = None
    offset: tuple[float, float] = (0.0, 0.0)
    empty: Tensor | None = None


@dataclass(frozen=True)
class CoalitionGame:
    """One call's game: values v(S) in scores (K), or with texts in the space of embeddings (P).

    Attributes:
        model: the base model.
        anatomy: its parts.
        hooks: see its passes.
        rules: of the active adapter.
        head: of the active adapter.
        null: (K,), its null value, with `vote` prediction.
        fill: (C,), its learned colour, if it has one.
        call: what the model was called with.
    """

    model: PreTrainedModel
    anatomy: Anatomy
    hooks: FeatureHooks
    rules: Rules
    head: ProjectionHead
    null: Tensor | None
    fill: Tensor | None
    call: ModelCall

    def value(self, images: Tensor | None, present: Tensor, size: int | None) -> Tensor:
        """v(S) of the images of index (R,), or of all, with the players `present` (R, N) bool: (R, K) fp32.

        Args:
            images: (R,).
            present: (R, N), True = present.
            size: how many are, in every row; not needed where pixels are replaced.
        """
        inputs, current, weights = self._removed(self.call.inputs(images), present, size)
        with self.hooks.during(current):
            scores = score(self.model, self.anatomy, inputs)
        if self.rules.prediction == "classifier":
            assert scores is not None
            return scores.float()
        assert current.features is not None
        assert self.null is not None
        # Detached: as part of a target, the null value stands on both sides of the Shapley loss.
        return self.null.float().detach() + self.head.votes(current.features, self.call.tiling.cells, weights)

    def _removed(
        self, inputs: dict[str, Any], present: Tensor, size: int | None
    ) -> tuple[dict[str, Any], ForwardCall, Tensor | None]:
        """Inputs of the base model without the absent players, the pass, and how much of each cell is present."""
        tiling = self.call.tiling
        cells = tiling.cells[0] * tiling.cells[1]
        without_token = not torch.is_grad_enabled()
        if self.rules.removal == "pixels":
            pixels = self._filled(inputs["pixel_values"], present)
            inputs = {**inputs, "pixel_values": pixels}
            return inputs, ForwardCall(cells, without_token=without_token), tiling.cell_weights(present)
        assert size is not None
        chosen = tiling.present_cells(present)  # (R, cells)
        # A stable sort keeps the present ones in raster order, and asks the device for nothing, as `nonzero` would.
        order = chosen.byte().argsort(dim=1, descending=True, stable=True)  # (R, cells)
        index = order[:, : size * cells // tiling.count]  # (R, s)
        native = self.anatomy.family.patches
        if native:
            inputs = with_patch_mask(inputs, chosen)
        return inputs, ForwardCall(cells, index, self.rules.removal, native, without_token), None

    def _filled(self, images: Tensor, present: Tensor) -> Tensor:
        colour = self.fill
        if colour is None:
            # Filled in on the device: numbers that are brought there would halt it in every step.
            channels = self.rules.fill_color or [0.0] * images.shape[1]
            colour = torch.stack([images.new_full((), channel) for channel in channels])  # (C,)
        tiling = self.call.tiling
        return fill_absent(images, present, tiling.players, colour, self.rules.blur, tiling.seen)

    def empty_value(self) -> Tensor:
        """v(empty), (1, K): no pixel of a player enters, so one image stands for all."""
        if self.rules.empty is not None:
            return self.rules.empty
        nobody = torch.zeros(1, self.call.tiling.count, dtype=torch.bool, device=self.call.pixel_values.device)
        first = torch.zeros(1, dtype=torch.long, device=nobody.device)
        with self._targets() as game:
            return game.value(first, nobody, 0)

    @contextmanager
    def _targets(self, gradient: bool = False) -> Iterator[CoalitionGame]:
        """The game as a source of targets: without gradients, dropout and drop path, unless gradients are asked for."""
        if gradient:
            yield self
        elif torch.compiler.is_compiling():
            # A view is made of Python objects that a compiled graph cannot hold; a trace disturbs no other thread.
            with torch.no_grad(), evaluating(self.model):
                yield self
        else:
            with torch.no_grad():
                yield self._evaluated

    @functools.cached_property
    def _evaluated(self) -> CoalitionGame:
        return replace(self, model=evaluation_view(self.model))

    def coalition_values(self) -> Tensor | None:
        """v(S) of every coalition of the call, (B, M, K) fp32."""
        call = self.call
        if call.coalitions is None:
            return None
        with self._targets(call.coalition_grad) as game:
            if call.coalition_sizes is not None:
                # A pass for each coalition, of all images: a pair costs what the full image does.
                columns = [
                    game.value(None, call.coalitions[:, m], size) for m, size in enumerate(call.coalition_sizes)
                ]
                return torch.stack(columns, dim=1)  # M times (B, K) -> (B, M, K)
            return game._values_of_any(call.coalitions)

    def _values_of_any(self, coalitions: Tensor) -> Tensor:
        """v(S) of coalitions (B, M, N) of whatever sizes, (B, M, K)."""
        images, count = coalitions.shape[:2]
        if not images * count:
            return self.call.pixel_values.new_zeros(images, count, self.rules.classes, dtype=torch.float32)
        if self.rules.removal == "pixels":
            owners = torch.arange(images * count, device=coalitions.device) // count  # (B * M,)
            return self.value(owners, coalitions.flatten(0, 1), None).unflatten(0, (images, count))
        order, values = [], []
        for rows, owners, present, size in runs_by_size(coalitions):
            order.append(rows)
            values.append(self.value(owners, present, size))
        # (B * M, K), back from order of size to order of the coalitions
        return torch.cat(values).index_select(0, torch.cat(order).argsort()).unflatten(0, (images, count))


def freeze_statistics(model: nn.Module) -> None:
    """Let batch norms use the statistics they were pretrained with.

    In training mode they would take those of the batch, and the values of coalitions, in which part of each image is
    missing, would be measured by another yardstick than the prediction.
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.training = False
