"""The arguments of a call of a wrapped model: sorted out and checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from shapadapter.backbone import Anatomy, Tiling
from shapadapter.core.errors import ImageError, ShapleyError
from shapadapter.core.shapley import contrastive_loss, pairwise_sigmoid_loss
from shapadapter.data.collator import text_rules

_OURS = ("coalitions", "coalition_sizes", "coalition_grad", "presence", "return_attributions")
_EXTRAS = ("output_hidden_states", "output_attentions")
_TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")


@dataclass(frozen=True)
class Texts:
    """What a matching model was asked to compare images with."""

    inputs: dict[str, Any]  # of its text tower
    embeds: Tensor | None  # (T, P) normalised embeddings, given in place of texts
    loss: bool  # whether the contrastive loss was asked for

    @classmethod
    def taken_from(cls, options: dict[str, Any], model: PreTrainedModel) -> Texts:
        """Take the text side out of a call's keyword arguments, and check it."""
        given = {name: options.pop(name, None) for name in _TEXT_INPUTS}
        inputs = {name: value for name, value in given.items() if value is not None}
        embeds = options.pop("text_embeds", None)
        if embeds is not None:
            embeds = F.normalize(embeds, dim=-1)  # (T, P)
        if inputs and embeds is not None:
            raise ValueError("Pass either input_ids or text_embeds, not both.")
        limit, ids = text_rules(model).limit, inputs.get("input_ids")
        if ids is not None and limit is not None and ids.shape[-1] > limit:
            raise ShapleyError(
                f"A text of {ids.shape[-1]} tokens is longer than the {limit} this model takes. Shorten it, or let the "
                f"tokenizer cut it: truncation=True, max_length={limit}."
            )
        return cls(inputs, embeds, bool(options.pop("return_loss", None)))

    @property
    def given(self) -> bool:
        """Whether there are any."""
        return "input_ids" in self.inputs or self.embeds is not None

    def for_base(self, device: torch.device) -> dict[str, Any]:
        """What the base model's forward gets, which refuses to run without a text."""
        if "input_ids" in self.inputs:
            return self.inputs
        return {"input_ids": torch.zeros(1, 1, dtype=torch.long, device=device)}

    def loss_of(self, model: Any, similarity: Tensor) -> Tensor | None:
        """The model's contrastive loss on `similarity` (B, B), if asked for; equal texts are matches of each other."""
        if not self.loss:
            return None
        ids = self.inputs.get("input_ids")
        if ids is None or similarity.shape[0] != similarity.shape[1]:
            raise ShapleyError(
                f"return_loss=True needs one text for each image, in order; got {tuple(similarity.shape)} images and texts."
            )
        matches = (ids[:, None] == ids[None]).all(dim=-1)  # (B, B)
        loss = pairwise_sigmoid_loss if hasattr(model, "logit_bias") else contrastive_loss
        return loss(similarity, matches)


@dataclass(frozen=True)
class ModelCall:
    """What a wrapped model was called with."""

    pixel_values: Tensor  # (B, C, H, W), or patches (B, N, 3 * p * p)
    tiling: Tiling  # how the players lie on the images
    labels: Tensor | None
    texts: Texts | None  # what a matching model compares the images with
    coalitions: Tensor | None  # (B, M, N) bool, True = present; or in 0..1, present to a degree
    coalition_sizes: tuple[int, ...] | None  # (M,) players in each, where the caller knows it is so for all images
    coalition_grad: bool | str  # whether gradients flow through the coalitions' values; "present": not to those at 0
    presence: Tensor | None  # (B, N) in 0..1, to what degree players are present in the prediction itself
    return_attributions: bool  # of every player, or with coalitions their sums alone
    return_dict: bool
    options: dict[str, Any]  # further keyword arguments of the base model, for coalitions as well
    extras: dict[str, Any]  # those that ask for more outputs, for the full image alone

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        anatomy: Anatomy,
        tile: Callable[..., Tiling],
    ) -> ModelCall:
        """The arguments of `model(*args, **kwargs)`; `tile` says how players lie on images, given the options."""
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
        texts = Texts.taken_from(options, model) if anatomy.kind == "matching" else None
        for name in ("attention_mask", "bool_masked_pos"):
            if options.pop(name, None) is not None:
                raise ValueError(f"A wrapped model takes no {name}: remove patches with coalitions=(B, M, N) bool.")
        tiling = tile(pixel_values, **options)
        return_dict = options.pop("return_dict", None)
        coalitions = options.pop("coalitions", None)
        if coalitions is not None:
            _check_coalitions(coalitions, pixel_values.shape[0], tiling.players)
        presence = options.pop("presence", None)
        if presence is not None:
            _check_presence(presence, pixel_values.shape[0], tiling.players)
        return cls(
            pixel_values=pixel_values,
            tiling=tiling,
            labels=options.pop("labels", None),
            texts=texts,
            coalitions=coalitions,
            coalition_sizes=_checked_sizes(options.pop("coalition_sizes", None), coalitions),
            coalition_grad=options.pop("coalition_grad", False),
            presence=presence,
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


def without_ours(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments for the base model alone; coalitions, which nothing would look at, are refused."""
    for name in ("coalitions", "presence"):
        if kwargs.get(name) is not None:
            raise ValueError(f"{name} was given but no Shapley adapter is active. Enable it, or leave it out.")
    return {name: value for name, value in kwargs.items() if name not in _OURS}


def _check_coalitions(coalitions: Any, images: int, players: tuple[int, int]) -> None:
    kind = isinstance(coalitions, Tensor) and (coalitions.dtype == torch.bool or coalitions.is_floating_point())
    if not kind or coalitions.ndim != 3:
        came = f"{coalitions.dtype} {tuple(coalitions.shape)}" if isinstance(coalitions, Tensor) else type(coalitions)
        raise ImageError(
            "Expected coalitions (batch, coalitions, players) as a bool tensor, True = present, or as a float tensor, "
            f"present to a degree from 0 to 1, got {came}."
        )
    rows, cols = players
    if coalitions.shape[0] != images or coalitions.shape[2] != rows * cols:
        raise ImageError(
            f"Expected coalitions ({images}, M, {rows * cols}) for {images} images of {rows} x {cols} players, got "
            f"{tuple(coalitions.shape)}."
        )
    _check_degrees(coalitions)


def _check_presence(presence: Any, images: int, players: tuple[int, int]) -> None:
    rows, cols = players
    kind = isinstance(presence, Tensor) and (presence.dtype == torch.bool or presence.is_floating_point())
    if not kind or tuple(presence.shape) != (images, rows * cols):
        came = f"{presence.dtype} {tuple(presence.shape)}" if isinstance(presence, Tensor) else type(presence).__name__
        raise ImageError(
            f"Expected presence ({images}, {rows * cols}) as a float tensor from 0 to 1, for {images} images of {rows} x "
            f"{cols} players, got {came}."
        )
    _check_degrees(presence)


def _check_degrees(presence: Tensor) -> None:
    """Refuse degrees of presence that are not from 0 to 1."""
    if not presence.is_floating_point() or torch.compiler.is_compiling():
        return
    within = ((presence >= 0) & (presence <= 1)).all()
    if presence.device.type != "cpu":
        # On the device, where they are: reading them here would halt it.
        torch._assert_async(within, "Presence must be from 0 to 1.")
    elif not within:
        low, high = presence.detach().aminmax()
        raise ImageError(f"Expected players to be present to a degree from 0 to 1, got {low:.4g} to {high:.4g}.")


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
