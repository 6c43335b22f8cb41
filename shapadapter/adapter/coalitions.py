"""The game of a wrapped model: what it says of an image when only some players are there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedModel

from shapadapter.backbone import Anatomy, Carrier, Pass, fill_absent, score, with_patch_mask

from .call import ModelCall, coalition_runs
from .head import ProjectionHead


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
    """

    prediction: str
    classes: int
    removal: Any
    blur: bool = False
    fill_color: tuple[float, ...] | None = None
    grid: tuple[int, int] | None = None
    offset: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class CoalitionGame:
    """One call's game: values v(S) in scores (K), or with texts in the space of embeddings (P).

    Attributes:
        model: the base model.
        anatomy: its parts.
        carrier: sees its passes.
        rules: of the active adapter.
        head: of the active adapter.
        null: (K,), its null value, with `vote` prediction.
        fill: (C,), its learned colour, if it has one.
        call: what the model was called with.
    """

    model: PreTrainedModel
    anatomy: Anatomy
    carrier: Carrier
    rules: Rules
    head: ProjectionHead
    null: Tensor | None
    fill: Tensor | None
    call: ModelCall

    def value(self, images: Tensor, present: Tensor) -> Tensor:
        """v(S) of the images of index (R,) with the players `present` (R, N) bool: (R, K) fp32."""
        inputs, current, weights = self._removed(self.call.inputs(images), present)
        with self.carrier.passing(current):
            scores = score(self.model, self.anatomy.kind, self.anatomy.family, inputs)
        if self.rules.prediction == "classifier":
            assert scores is not None
            return scores.float()
        assert current.features is not None
        assert self.null is not None
        # Detached: as part of a target, the null value stands on both sides of the Shapley loss.
        return self.null.float().detach() + self.head.votes(current.features, self.call.tiling.cells, weights)

    def _removed(self, inputs: dict[str, Any], present: Tensor) -> tuple[dict[str, Any], Pass, Tensor | None]:
        """Inputs of the base model without the absent players, the pass, and how much of each cell is present."""
        tiling = self.call.tiling
        cells = tiling.cells[0] * tiling.cells[1]
        if self.rules.removal == "pixels":
            pixels = self._filled(inputs["pixel_values"], present)
            return {**inputs, "pixel_values": pixels}, Pass(cells), tiling.cell_weights(present)
        chosen = tiling.present_cells(present)  # (R, cells)
        # All coalitions of a batch have one size.
        index = chosen.nonzero()[:, 1].view(len(chosen), -1)  # (R, s)
        native = self.anatomy.family.patches
        if native:
            inputs = with_patch_mask(inputs, chosen)
        return inputs, Pass(cells, index, self.rules.removal, native), None

    def _filled(self, images: Tensor, present: Tensor) -> Tensor:
        colour = self.fill
        if colour is None:
            colour = images.new_tensor(self.rules.fill_color or [0.0] * images.shape[1])  # (C,)
        tiling = self.call.tiling
        return fill_absent(images, present, tiling.players, colour, self.rules.blur, tiling.seen)

    def empty_value(self) -> Tensor:
        """v(empty), (1, K): no pixel of a player enters, so one image stands for all."""
        nobody = torch.zeros(1, self.call.tiling.count, dtype=torch.bool, device=self.call.pixel_values.device)
        first = torch.zeros(1, dtype=torch.long, device=nobody.device)
        with self.call.targets(self.model, gradient=False):
            return self.value(first, nobody)

    def coalition_values(self) -> Tensor | None:
        """v(S) of every coalition of the call, (B, M, K) fp32."""
        call = self.call
        if call.coalitions is None:
            return None
        order, values = [], []
        with call.targets(self.model, gradient=call.coalition_grad):
            for rows, images, present in coalition_runs(call.coalitions, by_size=self.rules.removal != "pixels"):
                order.append(rows)
                values.append(self.value(images, present))
        if not values:
            return call.pixel_values.new_zeros(*call.coalitions.shape[:2], self.rules.classes, dtype=torch.float32)
        # (B * M, K), back from order of size to order of the coalitions
        flat = torch.cat(values).index_select(0, torch.cat(order).argsort())
        return flat.unflatten(0, call.coalitions.shape[:2])


def freeze_statistics(model: nn.Module) -> None:
    """Let batch norms use the statistics they were pretrained with.

    In training mode they would take those of the batch, and the values of coalitions, in which part of each image is
    missing, would be measured by another yardstick than the prediction.
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.training = False
