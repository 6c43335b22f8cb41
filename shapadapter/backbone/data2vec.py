"""Data2VecVision attends by its own code: while it is adapted, it goes through transformers' attention interface."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.data2vec.modeling_data2vec_vision import (
    Data2VecVisionSdpaSelfAttention,
    Data2VecVisionSelfAttention,
)
from transformers.models.vit.modeling_vit import eager_attention_forward


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
