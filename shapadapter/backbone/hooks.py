"""What goes with one pass of the base model, and the carrier that reads the final features in it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from shapadapter.backbone.anatomy import Anatomy, original_name
from shapadapter.backbone.dry_run import first_tensor
from shapadapter.core.errors import UnsupportedModelError

Removal = Literal["drop", "mask", "pixels"]


@dataclass
class Pass:
    """One pass of the base model, and what the carrier saw in it.

    Attributes:
        cells: number of cells of the full image.
        present: (B, s) int64, ascending indices of the cells whose tokens stay; None if all do.
        removal: how the others are taken out.
        native: whether the model itself was told which are present, by its own patch mask.
        bare: whether the Shapley token stays out, because the pass has no gradient and only values are asked for.
        features: (B, s, D), the present cells' features; of a model without places (B, L, D), its latents.
        token: (B, D), the Shapley token after the last block; None if none travels.
        splits: attention calls in which the token was hidden.
    """

    cells: int
    present: Tensor | None = None
    removal: Removal = "drop"
    native: bool = False
    bare: bool = False
    features: Tensor | None = None
    token: Tensor | None = None
    splits: int = 0
    key_mask: Tensor | None = field(default=None, repr=False)


class _Running(threading.local):
    """The pass that this thread is in, with the carrier it belongs to.

    Nothing of a pass lies on the model, which other threads run at the same time. Not a `ContextVar`, which
    `torch.compile` cannot trace.
    """

    found: tuple[Carrier, Pass] | None = None


_running = _Running()


class Carrier:
    """Sees every pass of one model through hooks, and keeps its final features.

    Hooks are bound methods of this object, which the adapter's layer holds: deepcopy and pickle of the model keep them
    together, where closures would go on pointing at the old model.

    Args:
        anatomy: where the features are.
    """

    def __init__(self, anatomy: Anatomy) -> None:
        self.anatomy = anatomy
        self._handles: list[Any] = []

    @property
    def current(self) -> Pass | None:
        """The pass of this carrier's model that the calling thread is in."""
        found = _running.found
        return found[1] if found is not None and found[0] is self else None

    def attach(self, model: nn.Module) -> None:
        """Hook every physical copy of the source: `modules_to_save` keeps one for each adapter beside the original."""
        for name, module in model.named_modules():
            if original_name(name) == self.anatomy.source:
                self._handles.append(module.register_forward_hook(self._after_source))

    def detach(self) -> None:
        """Leave the model as it was before `attach`."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @contextmanager
    def passing(self, current: Pass) -> Iterator[Pass]:
        """Everything the base model does inside the context, in this thread, belongs to `current`."""
        before = _running.found
        try:
            _running.found = (self, current)
            yield current
        finally:
            _running.found = before

    def _after_source(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        current = self.current
        if current is None:
            return
        features = first_tensor(output)
        if features is None:
            raise UnsupportedModelError(f"{self.anatomy.source} returned no tensor; it did when it was wrapped.")
        cells = cells_first(features, self.anatomy)
        if self.anatomy.layout != "latents" and cells.shape[1] != current.cells:
            raise UnsupportedModelError(
                f"Expected a feature map of {current.cells} cells for images of this size, {self.anatomy.source} "
                f"returned {cells.shape[1]}. Send images whose sides are multiples of {self.anatomy.cell} pixels."
            )
        current.features = cells


def cells_first(features: Tensor, anatomy: Anatomy) -> Tensor:
    """Features as (B, cells, D) in raster order, without prefix; latents as they are."""
    if anatomy.layout == "channels_first":
        return features.flatten(2).transpose(1, 2)  # (B, D, rows, cols) -> (B, cells, D)
    if anatomy.layout == "channels_last":
        return features.flatten(1, 2)  # (B, rows, cols, D) -> (B, cells, D)
    return features[:, anatomy.prefix :] if anatomy.layout == "tokens" else features


def with_patch_mask(inputs: dict[str, Any], present: Tensor) -> dict[str, Any]:
    """Inputs of a model that masks patches by itself, with the cells `present` (B, cells) bool alone.

    An empty coalition keeps the mask as it was: attention to nothing is not a number. The carrier then takes the
    features away.
    """
    if not present.any():
        return inputs
    patches = inputs["pixel_values"]
    mask = torch.zeros(patches.shape[:2], dtype=torch.long, device=patches.device)  # (B, N)
    mask[:, : present.shape[1]] = present.long()
    return {**inputs, "pixel_attention_mask": mask}
