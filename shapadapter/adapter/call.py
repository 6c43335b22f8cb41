"""One call of a wrapped model: its arguments sorted out and checked, and its coalitions grouped in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shapadapter.adapter.matching import Texts
from shapadapter.backbone import Anatomy, Tiling
from shapadapter.core.errors import ImageError

_OURS = ("coalitions", "coalition_sizes", "coalition_grad", "return_attributions")
_EXTRAS = ("output_hidden_states", "output_attentions")


@dataclass(frozen=True)
class ModelCall:
    """What a wrapped model was called with.

    Attributes:
        pixel_values: (B, C, H, W), or patches (B, N, 3 * p * p).
        tiling: how the players lie on the images.
        tokens: T, the length of the base model's token sequence, if it has one.
        labels: the task's labels or None.
        texts: what a matching model compares the images with, else None.
        coalitions: (B, M, N) bool, True = present, or None.
        coalition_sizes: (M,) players in each coalition, where the caller knows them to be the same for all images.
        coalition_grad: whether gradients flow through the coalitions' values.
        return_attributions: whether every player's are wanted, or with coalitions their sums alone.
        return_dict: whether the caller wants named fields.
        options: further keyword arguments of the base model, for coalitions as well.
        extras: those that ask for more outputs, for the full image alone.
    """

    pixel_values: Tensor
    tiling: Tiling
    tokens: int
    labels: Tensor | None
    texts: Texts | None
    coalitions: Tensor | None
    coalition_sizes: tuple[int, ...] | None
    coalition_grad: bool
    return_attributions: bool
    return_dict: bool
    options: dict[str, Any]
    extras: dict[str, Any]

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        anatomy: Anatomy,
        tile: Callable[..., Tiling],
    ) -> ModelCall:
        """Sort out the arguments of `model(*args, **kwargs)`.

        Raises:
            TypeError: positional arguments beyond the images.
            ImageError: images, or coalitions, of another shape than expected.
            ValueError: an argument that removes players in another way.
            ShapleyError: texts that do not fit the model.
        """
        options = dict(kwargs)
        # Perceiver's own name for images, which people pass by habit.
        images = options.pop("inputs", None) if options.get("pixel_values") is None else None
        pixel_values = options.pop("pixel_values", None)
        pixel_values = images if pixel_values is None else pixel_values
        if len(args) > 1 or (args and (pixel_values is not None or anatomy.kind == "matching")):
            raise TypeError("Pass pixel_values alone by position and everything else, such as labels, by keyword.")
        pixel_values = args[0] if args else pixel_values
        if not isinstance(pixel_values, Tensor):
            raise ImageError(f"Expected pixel_values as a tensor, got {type(pixel_values).__name__}.")
        texts = Texts.taken_from(options) if anatomy.kind == "matching" else None
        if texts is not None:
            texts.check_length(model)
        for name in ("attention_mask", "bool_masked_pos"):
            if options.pop(name, None) is not None:
                raise ValueError(f"A wrapped model takes no {name}: remove patches with coalitions=(B, M, N) bool.")
        tiling = tile(pixel_values, **options)
        return_dict = options.pop("return_dict", None)
        coalitions = _checked(options.pop("coalitions", None), pixel_values.shape[0], tiling.players)
        return cls(
            pixel_values=pixel_values,
            tiling=tiling,
            tokens=anatomy.prefix + tiling.cells[0] * tiling.cells[1],
            labels=options.pop("labels", None),
            texts=texts,
            coalitions=coalitions,
            coalition_sizes=_checked_sizes(options.pop("coalition_sizes", None), coalitions),
            coalition_grad=options.pop("coalition_grad", False),
            return_attributions=options.pop("return_attributions", True) or coalitions is None,
            return_dict=bool(model.config.return_dict if return_dict is None else return_dict),
            extras={name: options.pop(name) for name in _EXTRAS if name in options},
            options=options,
        )

    def inputs(self, images: Tensor | None = None) -> dict[str, Any]:
        """Keyword arguments of the base model for the images of this index (R,), or for all."""
        named = {"pixel_values": self.pixel_values, **self.options}
        if images is None:
            return named
        size = self.pixel_values.shape[0]
        return {
            name: value[images] if isinstance(value, Tensor) and value.ndim and value.shape[0] == size else value
            for name, value in named.items()
        }

    def base_states(self, states: tuple[Tensor, ...] | None, travelled: bool) -> tuple[Tensor, ...] | None:
        """Hidden states (B, T, D) without the Shapley token, which stands at index 0 inside the blocks if it travelled."""
        if states is None or not travelled:
            return states
        tokens = self.tokens if self.pixel_values.ndim == 4 else self.pixel_values.shape[1]
        return tuple(state[:, 1:] if state.ndim == 3 and state.shape[1] == tokens + 1 else state for state in states)


def without_token(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments for the bare base model.

    Raises:
        ValueError: coalitions were given, which nothing would look at.
    """
    if kwargs.get("coalitions") is not None:
        raise ValueError("coalitions were given but no Shapley adapter is active. Enable it, or leave them out.")
    return {name: value for name, value in kwargs.items() if name not in _OURS}


def _checked(coalitions: Any, images: int, players: tuple[int, int]) -> Tensor | None:
    if coalitions is None:
        return None
    if not isinstance(coalitions, Tensor) or coalitions.dtype != torch.bool or coalitions.ndim != 3:
        came = f"{coalitions.dtype} {tuple(coalitions.shape)}" if isinstance(coalitions, Tensor) else type(coalitions)
        raise ImageError(f"Expected coalitions as a bool tensor (batch, coalitions, players), got {came}.")
    rows, cols = players
    if coalitions.shape[0] != images or coalitions.shape[2] != rows * cols:
        raise ImageError(
            f"Expected coalitions ({images}, M, {rows * cols}) for {images} images of {rows} x {cols} players, got "
            f"{tuple(coalitions.shape)}."
        )
    return coalitions


def _checked_sizes(sizes: Any, coalitions: Tensor | None) -> tuple[int, ...] | None:
    if sizes is None:
        return None
    sizes = tuple(sizes)
    if coalitions is None or len(sizes) != coalitions.shape[1]:
        came = "no coalitions" if coalitions is None else f"{coalitions.shape[1]} coalitions for each image"
        raise ImageError(
            f"Expected one of coalition_sizes for each coalition of an image, got {len(sizes)} and {came}."
        )
    counted = coalitions.sum(dim=2)  # (B, M)
    for m, size in enumerate(sizes):
        # Compared on the device, where the coalitions are: reading them here would halt it in every step.
        torch._assert_async((counted[:, m] == size).all(), "Coalitions have other sizes than coalition_sizes says.")
    return sizes


def runs_by_size(coalitions: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor, int]]:
    """Group coalitions (B, M, N) by size, so that the tokens of a batch are a rectangle without padding.

    Yields:
        rows: (R,) positions in the flattened (B * M) coalitions.
        images: (R,) the image each belongs to.
        present: (R, N) bool, True = present.
        size: players present in each.
    """
    flat = coalitions.flatten(0, 1)  # (B * M, N)
    sizes = flat.sum(dim=1)  # (B * M,)
    for size in sizes.unique().tolist():
        rows = (sizes == size).nonzero()[:, 0]  # (R,)
        yield rows, rows // coalitions.shape[1], flat[rows], size
