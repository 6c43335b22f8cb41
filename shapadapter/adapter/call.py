"""One call of a wrapped model: its arguments sorted out and checked, and its coalitions grouped in rectangles."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shapadapter.backbone import Anatomy, evaluating
from shapadapter.errors import ImageError

_OURS = ("coalitions", "coalition_grad")
_EXTRAS = ("output_hidden_states", "output_attentions")


@dataclass(frozen=True)
class ModelCall:
    """What a wrapped model was called with.

    Attributes:
        pixel_values: (B, C, H, W).
        players: N.
        tokens: T, the base model's sequence length.
        labels: the task's labels or None.
        coalitions: (B, M, N) bool, True = present, or None.
        coalition_grad: whether gradients flow through the coalitions' values.
        return_dict: whether the caller wants named fields.
        options: further keyword arguments of the base model, for coalitions as well.
        extras: those that ask for more outputs, for the full image alone.
    """

    pixel_values: Tensor
    players: int
    tokens: int
    labels: Tensor | None
    coalitions: Tensor | None
    coalition_grad: bool
    return_dict: bool
    options: dict[str, Any]
    extras: dict[str, Any]

    @classmethod
    def of(cls, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], anatomy: Anatomy) -> ModelCall:
        """Sort out the arguments of `model(*args, **kwargs)`.

        Raises:
            TypeError: positional arguments beyond the images.
            ImageError: images, or coalitions, of another shape than expected.
            ValueError: an argument that removes players in another way.
        """
        options = dict(kwargs)
        pixel_values = options.pop("pixel_values", args[0] if args else None)
        if len(args) > 1 or (args and "pixel_values" in kwargs):
            raise TypeError("Pass pixel_values alone by position and everything else, such as labels, by keyword.")
        if not isinstance(pixel_values, Tensor):
            raise ImageError(f"Expected pixel_values as a tensor, got {type(pixel_values).__name__}.")
        for name in ("attention_mask", "bool_masked_pos"):
            if options.pop(name, None) is not None:
                raise ValueError(f"A wrapped model takes no {name}: remove patches with coalitions=(B, M, N) bool.")
        rows, cols = anatomy.grid(pixel_values)
        coalitions = _checked(options.pop("coalitions", None), pixel_values.shape[0], rows, cols)
        return_dict = options.pop("return_dict", None)
        return cls(
            pixel_values=pixel_values,
            players=rows * cols,
            tokens=anatomy.prefix + rows * cols,
            labels=options.pop("labels", None),
            coalitions=coalitions,
            coalition_grad=options.pop("coalition_grad", False),
            return_dict=bool(model.config.return_dict if return_dict is None else return_dict),
            extras={"return_dict": True, **{name: options.pop(name) for name in _EXTRAS if name in options}},
            options=options,
        )

    def base_states(self, states: tuple[Tensor, ...] | None) -> tuple[Tensor, ...] | None:
        """Hidden states (B, T, D) without the Shapley token, which stands at index 0 inside the blocks."""
        if states is None:
            return None
        return tuple(state[:, 1:] if state.shape[1] == self.tokens + 1 else state for state in states)

    @contextmanager
    def targets(self, model: nn.Module, gradient: bool) -> Iterator[None]:
        """Run coalitions as targets: without gradients, dropout and drop path, unless gradients are asked for."""
        with ExitStack() as stack:
            if not gradient:
                stack.enter_context(torch.no_grad())
                stack.enter_context(evaluating(model))
            yield


def without_token(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments for the bare base model.

    Raises:
        ValueError: coalitions were given, which nothing would look at.
    """
    if kwargs.get("coalitions") is not None:
        raise ValueError("coalitions were given but no Shapley adapter is active. Enable it, or leave them out.")
    return {name: value for name, value in kwargs.items() if name not in _OURS}


def _checked(coalitions: Any, images: int, rows: int, cols: int) -> Tensor | None:
    if coalitions is None:
        return None
    if not isinstance(coalitions, Tensor) or coalitions.dtype != torch.bool or coalitions.ndim != 3:
        came = f"{coalitions.dtype} {tuple(coalitions.shape)}" if isinstance(coalitions, Tensor) else type(coalitions)
        raise ImageError(f"Expected coalitions as a bool tensor (batch, coalitions, players), got {came}.")
    if coalitions.shape[0] != images or coalitions.shape[2] != rows * cols:
        raise ImageError(
            f"Expected coalitions ({images}, M, {rows * cols}) for {images} images of {rows} x {cols} players, got "
            f"{tuple(coalitions.shape)}."
        )
    return coalitions


def coalition_runs(coalitions: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Group coalitions (B, M, N) by size, so that each group is a rectangular batch without padding.

    Yields:
        rows: (R,) positions in the flattened (B * M) coalitions.
        images: (R,) the image each belongs to.
        present: (R, s) ascending indices of the players present.
    """
    flat = coalitions.flatten(0, 1)  # (B * M, N)
    sizes = flat.sum(dim=1)  # (B * M,)
    for size in sizes.unique().tolist():
        rows = (sizes == size).nonzero()[:, 0]  # (R,)
        present = flat[rows].nonzero()[:, 1].view(len(rows), size)  # (R, s)
        yield rows, rows // coalitions.shape[1], present
