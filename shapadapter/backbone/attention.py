"""Self-attention with a read-only token: it reads every token, and no other token reads it."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

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

# Less than this, added to an attention score, hides the key.
_HIDDEN = -1e4

_NAME = "shapadapter_token"


@dataclass
class AttentionPatch:
    """What hangs on an attention module while it goes through `attend_with_token`."""

    config: PretrainedConfig  # the module's own, which names the kernel that it asks for
    hooks: Any = None  # the FeatureHooks of its model; None while attention is only recorded
    calls: list[nn.Module] | None = None  # where to note that the module was called, if anybody asks


class _Collecting(threading.local):
    """Where this thread's passes leave their attention probabilities, if it asked for them."""

    weights: list[Tensor | None] | None = None


_collecting = _Collecting()


def attend_with_token(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Attention over (B, heads, 1 + T, d) in which index 0 is the Shapley token.

    All attend to the T base tokens that are not masked, through the model's own kernel. `attention_mask` is None, or the
    base tokens' own: additive or bool, (B or 1, heads or 1, T or 1, T), with position biases, padding and absent players
    in it. Returns (B, 1 + T, heads, d) and, where the kernel tells them, the base tokens' probabilities (B, heads, T, T).
    """
    patch: AttentionPatch = module._shapadapter_patch  # type: ignore[assignment]
    mask = attention_mask
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(query.dtype)
    if patch.calls is not None:
        patch.calls.append(module)
    if patch.hooks is not None and patch.hooks.token_in_sequence():
        patch.hooks.count_hidden()
        if mask is not None and mask.shape[-1] != key.shape[2] - 1:
            raise UnsupportedModelError(
                f"Expected a mask or position bias for {key.shape[2] - 1} tokens, got {tuple(mask.shape)}. Where "
                "positions are relative, patches are masked, not dropped (removal='mask'), and interpolate_pos_encoding "
                "is left out."
            )
        # The token is one more query, and nobody's key: one call of the model's own kernel, with one row more.
        key, value, mask = key[:, :, 1:], value[:, :, 1:], _with_token_row(mask)
    # The eager function of the module's own source file, or one like it.
    attend = getattr(sys.modules[type(module).__module__], "eager_attention_forward", eager_attention_forward)
    collected = _collecting.weights
    if collected is None:
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(patch.config._attn_implementation, attend)
    elif mask is not None and mask.dtype == torch.bool:
        # Of all kernels, the eager one alone tells its probabilities. It adds masks; True is what may be seen.
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
    output, weights = attend(module, query, key, value, mask, **kwargs)
    if weights is not None:
        weights = weights[:, :, -key.shape[2] :]  # (B, h, T, T): keys are the base tokens
    if collected is not None:
        collected.append(weights)
    return output, weights


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


def patch_attention(module: nn.Module, hooks: Any = None, calls: list[nn.Module] | None = None) -> None:
    """Let `module` attend through `attend_with_token`, as `hooks` say."""
    own: PretrainedConfig = module.config  # type: ignore[assignment]
    private = copy.copy(own)
    # The public setter would hand the name on to sub-configs, which the shallow copy shares with the original.
    private._attn_implementation_internal = _NAME
    module._shapadapter_patch = AttentionPatch(own, hooks, calls)  # type: ignore[assignment]
    module.config = private  # type: ignore[assignment]
    if type(module) in _WITH_INTERFACE:
        module.__class__ = _WITH_INTERFACE[type(module)]  # type: ignore[assignment]


def restore_attention(module: nn.Module) -> None:
    """Give `module` its own config and class back."""
    module.config = module.__dict__.pop("_shapadapter_patch").config
    if isinstance(module, _Interface):
        module.__class__ = type(module).__bases__[1]  # type: ignore[assignment]


class _Interface:
    """`forward` of Data2Vec's two classes, which do not ask transformers' attention interface, by way of it."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        output_attentions: bool = False,
        relative_position_bias: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        resolution: tuple[int, int] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The same attention; `relative_position_bias` may differ from image to image and hide keys."""
        hooks = self._shapadapter_patch.hooks
        token = hooks is not None and hooks.token_in_sequence()
        if hooks is not None and not token and (relative_position_bias is None or len(relative_position_bias) == 1):
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
        dropout, scaling = self.dropout.p if self.training else 0.0, self.attention_head_size**-0.5
        output, weights = attend_with_token(
            self, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=False
        )
        return output.reshape(*hidden_states.shape[:-1], -1), weights  # (B, T, D)


class InterfaceAttention(_Interface, Data2VecVisionSelfAttention):  # type: ignore[misc]
    """The class loaded with attn_implementation="eager"."""


class InterfaceSdpaAttention(_Interface, Data2VecVisionSdpaSelfAttention):  # type: ignore[misc]
    """The class loaded with attn_implementation="sdpa"."""


# Classes of this module, not made on the way: what can be imported can be pickled.
_WITH_INTERFACE: dict[type[nn.Module], type[nn.Module]] = {
    Data2VecVisionSelfAttention: InterfaceAttention,
    Data2VecVisionSdpaSelfAttention: InterfaceSdpaAttention,
}


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
    calls: list[nn.Module] = []
    modules = [m for m in model.modules() if not isinstance(m, PreTrainedModel)]
    patched = [m for m in modules if isinstance(getattr(m, "config", None), PretrainedConfig)]
    for module in patched:
        patch_attention(module, calls=calls)
    try:
        yield calls
    finally:
        for module in patched:
            restore_attention(module)


AttentionInterface.register(_NAME, attend_with_token)
