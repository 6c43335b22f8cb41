"""Self-attention with a read-only token: it reads every token, and no other token reads it."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.data2vec.modeling_data2vec_vision import (
    Data2VecVisionSdpaSelfAttention,
    Data2VecVisionSelfAttention,
)
from transformers.models.vit.modeling_vit import eager_attention_forward

from shapadapter.core.errors import UnsupportedModelError


class _Interface:
    """`forward` of both classes, by way of the interface."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        output_attentions: bool = False,
        relative_position_bias: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        resolution: tuple[int, int] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The same attention; `relative_position_bias` may differ from image to image and hide keys."""
        carrier = self._shapadapter_seat.carrier
        token = carrier is not None and carrier.has_token()
        if carrier is not None and not token and (relative_position_bias is None or len(relative_position_bias) == 1):
            # Bit by bit as without an adapter.
            return super().forward(  # type: ignore[misc]
                hidden_states, output_attentions, relative_position_bias, interpolate_pos_encoding, resolution
            )
        mask = relative_position_bias  # (B or 1, heads or 1, T or 1, T)
        if self.has_relative_position_bias:
            assert resolution is not None
            window = (resolution[0] // self.config.patch_size, resolution[1] // self.config.patch_size)
            base_tokens = hidden_states.shape[1] - int(token)
            bias = self.relative_position_bias(window, interpolate_pos_encoding, dim_size=base_tokens)
            mask = bias if mask is None else mask + bias
        shape = (*hidden_states.shape[:-1], -1, self.attention_head_size)  # (B, T, heads, d)
        query, key, value = (
            project(hidden_states).view(shape).transpose(1, 2) for project in (self.query, self.key, self.value)
        )  # (B, heads, T, d)
        attend: Any = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = attend(
            self,
            query,
            key,
            value,
            mask,
            dropout=self.dropout.p if self.training else 0.0,
            scaling=self.attention_head_size**-0.5,
            is_causal=False,
        )
        return output.reshape(*hidden_states.shape[:-1], -1), weights  # (B, T, D)


class InterfaceAttention(_Interface, Data2VecVisionSelfAttention):  # type: ignore[misc]
    """The class loaded with attn_implementation="eager"."""


class InterfaceSdpaAttention(_Interface, Data2VecVisionSdpaSelfAttention):  # type: ignore[misc]
    """The class loaded with attn_implementation="sdpa"."""


ADAPTED = {
    Data2VecVisionSelfAttention: InterfaceAttention,
    Data2VecVisionSdpaSelfAttention: InterfaceSdpaAttention,
}
ORIGINAL = {adapted: original for original, adapted in ADAPTED.items()}


# Less than this, added to an attention score, hides the key.
_HIDDEN = -1e4

NAME = "shapadapter_token"
_PROBE = "shapadapter_probe"

# Attention modules that do not ask transformers' interface, and what they are turned into while they are adapted.
_OWN_ATTENTION = ("Data2VecVisionSelfAttention", "Data2VecVisionSdpaSelfAttention")
_INTERFACE_NAMES = ("InterfaceAttention", "InterfaceSdpaAttention")


class Carrier(Protocol):
    """What the attention function needs to know of the object that moves the token."""

    def has_token(self) -> bool:
        """Whether index 0 of every block's sequence is the Shapley token."""

    def count_split(self) -> None:
        """Note that one attention call has hidden the token, for the check of effects."""


class _Seat:
    """What hangs on an attention module while it is adapted: its carrier and its own config."""

    def __init__(self, carrier: Carrier | None, config: PretrainedConfig, seen: list[nn.Module] | None = None) -> None:
        self.carrier = carrier
        self.config = config
        self.seen = seen


class _Collecting(threading.local):
    """Where this thread's passes leave their attention probabilities, if it asked for them."""

    weights: list[Tensor | None] | None = None


_collecting = _Collecting()


def _base_attention(module: nn.Module, config: PretrainedConfig) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The attention function the model itself asks for, e.g. sdpa, or the eager one of its own source file."""
    return ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, _eager_attention(module))


def attend_with_token(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Attention over (B, heads, 1 + T, d) in which index 0 is the Shapley token.

    All attend to the T base tokens that are not masked, through the model's own kernel. `attention_mask` is None, or the
    base tokens' own: additive or bool, (B or 1, heads or 1, T or 1, T), with position biases, padding and absent players
    in it.
    """
    seat: _Seat = module._shapadapter_seat  # type: ignore[assignment]
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        attention_mask = attention_mask.to(query.dtype)
    if seat.carrier is None or not seat.carrier.has_token():
        return _attend(module, seat, query, key, value, attention_mask, **kwargs)
    seat.carrier.count_split()
    if attention_mask is not None and attention_mask.shape[-1] != key.shape[2] - 1:
        raise UnsupportedModelError(
            f"Expected a mask or position bias for {key.shape[2] - 1} tokens, got {tuple(attention_mask.shape)}. Where "
            "positions are relative, patches are masked, not dropped (removal='mask'), and interpolate_pos_encoding is left "
            "out."
        )
    # The token is one more query, and nobody's key: one call of the model's own kernel, with one row more.
    output, weights = _attend(
        module, seat, query, key[:, :, 1:], value[:, :, 1:], _with_token_row(attention_mask), **kwargs
    )
    return output, weights  # (B, 1 + T, h, d), (B, h, T, T)


def _attend(
    module: nn.Module, seat: _Seat, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The model's own attention; its probabilities, without those of the token, are noted where they are collected."""
    collected = _collecting.weights
    if collected is None:
        output, weights = _base_attention(module, seat.config)(module, query, key, value, mask, **kwargs)
    else:
        # Of all kernels, the eager one alone tells its probabilities.
        output, weights = _eager_attention(module)(module, query, key, value, _added(mask, query), **kwargs)
    if weights is not None:
        weights = weights[:, :, -key.shape[2] :]  # (B, h, T, T): keys are the base tokens
    if collected is not None:
        collected.append(weights)
    return output, weights


def _eager_attention(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The eager attention function of the module's own source file, or one like it."""
    return getattr(sys.modules[type(module).__module__], "eager_attention_forward", eager_attention_forward)


def _added(mask: Tensor | None, query: Tensor) -> Tensor | None:
    """A mask as the eager kernel takes it, added to the scores: True, in a bool mask, is what may be seen."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)


def _with_token_row(mask: Tensor | None) -> Tensor | None:
    """A mask (B or 1, h or 1, T or 1, T) with the token's row in front, in which it sees what the first base token does.

    Absent players and padding are hidden from every query alike, and no position bias is as low as what hides a key.
    """
    if mask is None or mask.shape[2] == 1:
        return mask
    row = mask[:, :, :1]  # (B or 1, h or 1, 1, T)
    if row.dtype != torch.bool:
        row = torch.where(row > _HIDDEN, 0.0, row)
    return torch.cat([row, mask], dim=2)  # (B or 1, h or 1, 1 + T, T)


def _probe(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """Note which module called, then do what it asked for."""
    seat: _Seat = module._shapadapter_seat  # type: ignore[assignment]
    assert seat.seen is not None
    seat.seen.append(module)
    return _base_attention(module, seat.config)(module, *args, **kwargs)


def seat_token(module: nn.Module, carrier: Carrier) -> None:
    """Let `module` attend through `attend_with_token`, with the state of `carrier`."""
    _seat(module, NAME, carrier=carrier)


def kernel_of(module: nn.Module) -> str | None:
    """Name of the attention function the base tokens of a seated module go through."""
    seat: _Seat = module._shapadapter_seat  # type: ignore[assignment]
    return seat.config._attn_implementation


def unseat_token(module: nn.Module) -> None:
    """Give `module` its own config back."""
    module.config = module.__dict__.pop("_shapadapter_seat").config
    if type(module).__name__ in _INTERFACE_NAMES:
        module.__class__ = ORIGINAL[type(module)]  # type: ignore[index]


def _seat(module: nn.Module, name: str, carrier: Carrier | None = None, seen: list[nn.Module] | None = None) -> None:
    own: PretrainedConfig = module.config  # type: ignore[assignment]
    private = copy.copy(own)
    # The public setter would hand the name on to sub-configs, which the shallow copy shares with the original.
    private._attn_implementation_internal = name
    module._shapadapter_seat = _Seat(carrier, own, seen)  # type: ignore[assignment]
    module.config = private  # type: ignore[assignment]
    if type(module).__name__ in _OWN_ATTENTION:
        # Imported only for a model that has it already; a class that can be imported can be pickled.

        module.__class__ = ADAPTED[type(module)]  # type: ignore[index]


@contextmanager
def attention_weights() -> Iterator[list[Tensor | None]]:
    """Collect the attention probabilities (B, heads, T, T) of what this thread runs, without the token, in call order.

    They are of the adapted attention modules of whatever model runs, which meanwhile go through the eager kernel.
    """
    before = _collecting.weights
    collected: list[Tensor | None] = []
    try:
        _collecting.weights = collected
        yield collected
    finally:
        _collecting.weights = before


@contextmanager
def recorded_attention(model: nn.Module) -> Iterator[list[nn.Module]]:
    """Collect the modules that really call transformers' attention interface, in call order.

    Asking the classes would not do: several families accept a custom attention function and never call it.
    """
    seen: list[nn.Module] = []
    seated = [
        m
        for m in model.modules()
        if not isinstance(m, PreTrainedModel) and isinstance(getattr(m, "config", None), PretrainedConfig)
    ]
    for module in seated:
        _seat(module, _PROBE, seen=seen)
    try:
        yield seen
    finally:
        for module in seated:
            unseat_token(module)


AttentionInterface.register(NAME, attend_with_token)
AttentionInterface.register(_PROBE, _probe)
