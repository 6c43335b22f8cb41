"""The game of a wrapped model: its values of coalitions, when only some players of an image are there."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedModel

from shapadapter.adapter.call import ModelCall
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


def evaluate_coalitions(
    model: nn.Module,
    inputs: Mapping[str, Any],
    coalitions: Tensor,
    per_call: int,
    read: Callable[[Tensor], Tensor] = lambda values: values,
) -> Tensor:
    """v(S) of any number of coalitions of a batch of images, a few at a time.

    Each call evaluates the full images as well. In order of size, as many coalitions of one size as possible share a
    pass, without padding; column by column those of all images should have one size, others are only slower. Gradients
    and modes are the caller's: `torch.inference_mode()`, and `evaluation_view(model)` where dropout may be on.

    Args:
        model: a wrapped model.
        inputs: keyword arguments of its forward, `pixel_values` (B, C, H, W) among them.
        coalitions: (B, M, N) bool, True = present, on any device.
        per_call: coalitions of each image in a call of the model.
        read: what to keep of the values (B, m, K) of a call, as (B, m, ...); all of them unless told.

    Returns:
        (B, M, ...), in the order of `coalitions`.
    """
    order = coalitions.sum(dim=-1).amax(dim=0).argsort(stable=True)  # (M,)
    parts = []
    for columns in order.split(max(1, per_call)):
        chosen = coalitions[:, columns].to(inputs["pixel_values"].device)  # (B, m, N)
        parts.append(read(model(**inputs, coalitions=chosen).coalition_values))
    values = torch.cat(parts, dim=1)
    return values[:, order.argsort().to(values.device)]


@dataclass(frozen=True)
class Rules:
    """What an adapter's config says about its game."""

    prediction: str  # "vote" or "classifier"
    classes: int  # K of the adapter; with texts P
    removal: Any  # "drop", "mask" or "pixels"
    blur: bool = False  # whether absent pixels show the blurred present ones
    fill_color: tuple[float, ...] | None = None  # what they show otherwise; None for 0 in the image processor's scale
    grid: tuple[int, int] | None = None  # (rows, cols) of the players, None for the cells
    offset: tuple[float, float] = (0.0, 0.0)  # (down, right) by which cells look beside their place, in cells
    empty: Tensor | None = None  # (1, K), v(empty) where it is known beforehand, as in a model exported for one size


@dataclass(frozen=True)
class CoalitionGame:
    """One call's game by the active adapter: values v(S) in scores (K), or with texts in the space of embeddings (P)."""

    model: PreTrainedModel  # the base model
    anatomy: Anatomy
    hooks: FeatureHooks  # sees its passes
    rules: Rules
    head: ProjectionHead
    null: Tensor | None  # (K,), with `vote` prediction
    fill: Tensor | None  # (C,), where the color is learned
    call: ModelCall

    def value(self, images: Tensor | None, present: Tensor, size: int | None) -> Tensor:
        """v(S) of the images of index (R,), or of all, with the players `present` (R, N) bool: (R, K) fp32.

        `size` is how many are in every row; it is not needed where pixels are replaced, nor of players that are present to
        a degree, (R, N) in 0..1.
        """
        shorter = self.call.coalition_grad == "present"
        inputs, current, weights = self.removed(self.call.inputs(images), present, size, shorter)
        with self.hooks.during(current):
            scores = score(self.model, self.anatomy, inputs)
        if self.rules.prediction == "classifier":
            assert scores is not None
            return scores.float()
        assert current.features is not None
        assert self.null is not None
        # Detached: as part of a target, the null value stands on both sides of the Shapley loss.
        return self.null.float().detach() + self.head.votes(current.features, self.call.tiling.cells, weights)

    def removed(
        self, inputs: dict[str, Any], present: Tensor, size: int | None = None, shorter: bool = False
    ) -> tuple[dict[str, Any], ForwardCall, Tensor | None]:
        """Inputs of the base model without the absent players, the pass, and how much of each cell is present.

        With `shorter`, tokens at degree 0 are dropped where they can be; the features are those of the others, then.
        """
        tiling = self.call.tiling
        cells = tiling.cells[0] * tiling.cells[1]
        without_token = not torch.is_grad_enabled()
        if self.rules.removal == "pixels":
            images, color = inputs["pixel_values"], self.fill
            if color is None:
                # Filled in on the device: numbers that are brought there would halt it in every step.
                channels = self.rules.fill_color or [0.0] * images.shape[1]
                color = torch.stack([images.new_full((), channel) for channel in channels])  # (C,)
            pixels = fill_absent(images, present, tiling.players, color, self.rules.blur, tiling.seen)
            return (
                {**inputs, "pixel_values": pixels},
                ForwardCall(cells, without_token=without_token),
                tiling.cell_weights(present),
            )
        chosen = tiling.present_cells(present)  # (R, cells)
        if present.is_floating_point():
            index = None
            if self.rules.removal == "drop" and shorter:
                most = max(1, int((chosen > 0).sum(dim=1).amax()))  # attention wants a token
                index = chosen.detach().argsort(dim=1, descending=True, stable=True)[:, :most]  # (R, s)
                chosen = chosen.gather(1, index)  # (R, s)
            return inputs, ForwardCall(cells, index, presence=chosen, without_token=without_token), chosen
        assert size is not None
        # A stable sort keeps the present ones in raster order, and asks the device for nothing, as `nonzero` would.
        order = chosen.byte().argsort(dim=1, descending=True, stable=True)  # (R, cells)
        index = order[:, : size * cells // tiling.count]  # (R, s)
        native = self.anatomy.family.patches
        if native:
            inputs = with_patch_mask(inputs, chosen)
        return (
            inputs,
            ForwardCall(cells, index, self.rules.removal, patch_mask=native, without_token=without_token),
            None,
        )

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
        with self._targets(bool(call.coalition_grad)) as game:
            if call.coalition_sizes is not None:
                # A pass for each coalition, of all images: a pair costs what the full image does.
                columns = [
                    game.value(None, call.coalitions[:, m], size) for m, size in enumerate(call.coalition_sizes)
                ]
                return torch.stack(columns, dim=1)  # M times (B, K) -> (B, M, K)
            return game._values_of_any(call.coalitions)

    def _values_of_any(self, coalitions: Tensor) -> Tensor:
        """v(S) of coalitions (B, M, N) of whatever sizes, bool or in 0..1: (B, M, K)."""
        images, count = coalitions.shape[:2]
        if not images * count:
            return self.call.pixel_values.new_zeros(images, count, self.rules.classes, dtype=torch.float32)
        flat = coalitions.flatten(0, 1)  # (B * M, N)
        owners = torch.arange(images * count, device=coalitions.device) // count  # (B * M,), the image of each
        if self.rules.removal == "pixels" or coalitions.is_floating_point():
            return self.value(owners, flat, None).unflatten(0, (images, count))
        # Grouped by size, so that the tokens of a pass are a rectangle without padding.
        sizes = flat.sum(dim=1)  # (B * M,)
        groups = [((sizes == size).nonzero()[:, 0], size) for size in sizes.unique().tolist()]  # (R,) rows each
        values = torch.cat([self.value(owners[rows], flat[rows], size) for rows, size in groups])  # (B * M, K)
        # Back from order of size to order of the coalitions.
        order = torch.cat([rows for rows, _ in groups])  # (B * M,)
        return values.index_select(0, order.argsort()).unflatten(0, (images, count))


def freeze_statistics(model: nn.Module) -> None:
    """Let batch norms use the statistics they were pretrained with.

    In training mode they would take those of the batch, and the values of coalitions, in which part of each image is
    missing, would be computed with other statistics than the prediction.
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.training = False
