"""One pass of the base model: who is present in it, and what the hooks on the model saw of it.

A pre-hook on the first block puts the Shapley token at index 0 and drops absent players; pre-hooks on all blocks mask
the attention keys of absent players where they are not dropped; a hook on the last block takes the token, and masked
players, out again, so that norms, poolers and heads never see them. A model without such blocks is only read.

In the soft game a player is present to a degree m in [0, 1]: all tokens are computed, and attention weighs each by m,
as `log m` added to its scores does; where the head averages tokens, the mean weighs them, too.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shapadapter.backbone.anatomy import Anatomy, cells_first, first_tensor
from shapadapter.backbone.attention import patch_attention, restore_attention
from shapadapter.backbone.families import original_name
from shapadapter.core.errors import UnsupportedModelError

Removal = Literal["drop", "mask", "pixels"]

_Arguments = tuple[tuple[Any, ...], dict[str, Any]]

# Kernels seen to honour an additive mask (B, 1, 1, T); others take masks of another kind, or none.
_MASKING_KERNELS = ("sdpa", "eager")

# The argument by which a block takes what is added to its attention scores, in transformers and in timm.
_MASK_ARGUMENTS = ("attention_mask", "relative_position_bias", "attn_mask", "shared_rel_pos_bias", "shared_rel_pos")


@dataclass
class ForwardCall:
    """One pass of the base model, and what the hooks saw in it."""

    cells: int  # of the full image
    present: Tensor | None = None  # (B, s) int64, ascending indices of the cells whose tokens stay; None if all do
    removal: Removal = "drop"  # how the others are taken out
    presence: Tensor | None = (
        None  # (B, cells) in 0..1, to what degree each token is there; with `present` (B, s), of those
    )
    patch_mask: bool = False  # whether the model itself was told which are present, by `with_patch_mask`
    without_token: bool = False  # the pass has no gradient and only values are asked for
    features: Tensor | None = None  # (B, s, D), the present cells'; of a model without places (B, L, D), its latents
    token: Tensor | None = None  # (B, D), the Shapley token after the last block; None if none was in the sequence
    hidden: int = 0  # attention calls in which the token was hidden
    key_mask: Tensor | None = field(default=None, repr=False)  # (B, 1, 1, P + cells), added to attention scores

    def enter(self, hidden: Tensor, prefix: int) -> Tensor:
        """What the blocks are to compute of (B, P + cells, D): (B, P + s, D) where absent cells are dropped."""
        self.hidden = 0
        if self.presence is not None:
            if self.present is not None:
                hidden = keep_cells(hidden, self.present, prefix)  # (B, P + s, D)
            padding = hidden.shape[1] - prefix - self.presence.shape[1]  # which the model itself masks
            soft = F.pad(
                log_presence(self.presence), (prefix, padding)
            )  # (B, P + cells + padding), 0 for what is always there
            self.key_mask = soft.to(hidden.dtype)[:, None, None]
            return hidden
        if self.present is None or self.patch_mask:
            return hidden
        if self.removal == "drop":
            return keep_cells(hidden, self.present, prefix)
        # Not minus infinity: a row in which everything is masked must not become NaN. exp(-30,000) is 0 in every dtype,
        # and the number is finite in fp16 as well.
        absent = hidden.new_full((hidden.shape[0], hidden.shape[1] - prefix), -3e4)  # (B, cells)
        always = hidden.new_zeros(hidden.shape[0], prefix)  # (B, P)
        self.key_mask = torch.cat([always, absent.scatter(1, self.present, 0.0)], dim=1)[:, None, None]
        return hidden

    def leave(self, hidden: Tensor, prefix: int) -> Tensor:
        """Take the features from the blocks' (B, T, D), and return what those behind them are to see."""
        if self.presence is not None:
            # A zero feature stands for the empty image, as below.
            somebody = (self.presence > 0).any(dim=1)[:, None, None]  # (B, 1, 1)
            end = prefix + self.presence.shape[1]
            self.features = torch.where(somebody, hidden[:, prefix:end], 0)  # (B, cells or s, D)
            return torch.cat([hidden[:, :prefix], self.features, hidden[:, end:]], dim=1)
        if self.patch_mask:
            assert self.present is not None
            index = self.present[..., None].expand(-1, -1, hidden.shape[-1])  # (B, s, D)
            self.features = hidden.gather(1, index)  # (B, s, D)
            # The model masks by itself and counts on its own length: only an empty coalition needs help.
            return hidden if index.shape[1] else torch.zeros_like(hidden)
        kept = self.cells
        if self.present is not None:
            kept = self.present.shape[1]
            if self.key_mask is not None:
                hidden = keep_cells(hidden, self.present, prefix)
            hidden = hidden[:, : prefix + kept]  # (B, P + s, D)
        # Part of what is returned: FSDP gathers the block's weights when a gradient reaches its output.
        self.features = hidden[:, prefix : prefix + kept]  # (B, s, D), without stand-in and padding
        if kept == 0:
            # The mean over no patches is not a number: a zero feature stands for the empty image.
            empty = hidden.new_zeros(hidden.shape[0], 1, hidden.shape[2])  # (B, 1, D)
            hidden = torch.cat([hidden, empty], dim=1)  # (B, P + 1, D)
        return hidden

    def weigh(self, tokens: Tensor, prefix: int) -> Tensor:
        """Tokens (B, P + cells, D) so weighed that their plain mean is the one by presence; the prefix as it is."""
        assert self.presence is not None
        total, count = self.presence.sum(dim=1, keepdim=True), self.presence.shape[1]  # (B, 1)
        weights = torch.where(total > 0, self.presence * count / total.clamp(min=1e-12), 1.0)  # (B, cells)
        weights = F.pad(weights, (prefix, tokens.shape[1] - prefix - count), value=1.0)  # (B, P + cells)
        return tokens * weights[..., None].to(tokens.dtype)


def log_presence(presence: Tensor) -> Tensor:
    """The logarithm of (B, cells) in 0..1, for scores of attention; at 0 so low that nothing of the token is left.

    Its gradient is 1 / m down to the floor, where it stays finite: there, too, the product with the token's attention,
    about m, is the derivative by m.
    """
    floor = 1e-20  # which half precision does not know
    presence = presence.to(torch.promote_types(presence.dtype, torch.float32))
    return (presence + (presence.clamp(min=floor) - presence).detach()).log()


class _Running(threading.local):
    """The call that this thread is in, with the hooks it belongs to.

    Nothing of a call lies on the model, which other threads run at the same time. Not a `ContextVar`, which
    `torch.compile` cannot trace.
    """

    found: tuple[FeatureHooks, ForwardCall] | None = None


_running = _Running()


class FeatureHooks:
    """The hooks on one model: they hand each pass to the `ForwardCall` that the thread is in.

    Hooks are bound methods of this object, which the adapter's layer holds: deepcopy and pickle of the model keep them
    together, where closures would go on pointing at the old model.
    """

    def __init__(self, anatomy: Anatomy, token: Callable[[], Tensor | None] | None = None) -> None:
        self.anatomy = anatomy
        # Where no attention can hide it, the token stays out of the sequence.
        self._active_token = token if anatomy.attentions else None
        self._handles: list[Any] = []
        self._attentions: list[Any] = []
        self._mask_argument: tuple[int, str] | None = None

    @property
    def call(self) -> ForwardCall | None:
        """The call of these hooks' model that the calling thread is in."""
        found = _running.found
        return found[1] if found is not None and found[0] is self else None

    @contextmanager
    def during(self, call: ForwardCall) -> Iterator[ForwardCall]:
        """Everything the base model does inside the context, in this thread, belongs to `call`."""
        before = _running.found
        try:
            _running.found = (self, call)
            yield call
        finally:
            _running.found = before

    def attach(self, model: nn.Module) -> None:
        """Hook every physical copy of the parts: `modules_to_save` keeps one for each adapter beside the original."""
        for name, module in model.named_modules():
            own = original_name(name)
            if own in self.anatomy.blocks:
                parameters = list(inspect.signature(module.forward).parameters)
                known = (each for each in _MASK_ARGUMENTS if each in parameters)
                self._mask_argument = next(((parameters.index(each), each) for each in known), None)
                self._handles.append(module.register_forward_pre_hook(self._before_block, with_kwargs=True))
            if own in self.anatomy.blocks[:1]:
                # Registered after the mask's hook and run before it.
                first = module.register_forward_pre_hook(self._before_first, with_kwargs=True, prepend=True)
                self._handles.append(first)
            if own == self.anatomy.source:
                self._handles.append(module.register_forward_hook(self._after_source))
            if own == self.anatomy.pooled:
                if isinstance(module, nn.MultiheadAttention):
                    handle = module.register_forward_pre_hook(self._before_attention_pooling, with_kwargs=True)
                else:
                    handle = module.register_forward_hook(self._before_mean_pooling)
                self._handles.append(handle)
            if own in self.anatomy.attentions:
                patch_attention(module, self)
                self._attentions.append(module)

    def detach(self) -> None:
        """Leave the model as it was before `attach`."""
        for handle in self._handles:
            handle.remove()
        for module in self._attentions:
            restore_attention(module)
        self._handles, self._attentions = [], []

    def token_in_sequence(self) -> bool:
        """Whether a token is at index 0 now.

        This is the adapter's state, not the call's: gradient checkpointing computes attention again during backward,
        when the call is over. A call without the token has no backward.
        """
        return self._token() is not None

    def count_hidden(self) -> None:
        """One attention call has hidden the token."""
        if (call := self.call) is not None:
            call.hidden += 1

    def _token(self) -> Tensor | None:
        call = self.call
        without = self._active_token is None or (call is not None and call.without_token)
        return None if without else self._active_token()  # type: ignore[misc]

    def _before_first(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Arguments:
        hidden = args[0] if args else kwargs["hidden_states"]  # (B, P + cells, D)
        token, call, prefix = self._token(), self.call, self.anatomy.prefix
        if call is not None:
            if hidden.shape[1] != prefix + call.cells and not self.anatomy.family.patches:
                raise UnsupportedModelError(
                    f"Expected {prefix} + {call.cells} tokens at the first block, got "
                    f"{hidden.shape[1]}: the model's patch grid is not the one found when it was wrapped."
                )
            hidden = call.enter(hidden, prefix)
            if call.key_mask is not None:
                self._check_kernels()
        if hidden.shape[1] == 0:
            # Attention kernels refuse an empty sequence. Nothing reads what this stand-in becomes.
            hidden = hidden.new_zeros(hidden.shape[0], 1, hidden.shape[2])  # (B, 1, D)
        if token is not None:
            token = token.to(hidden.dtype).expand(hidden.shape[0], -1, -1)  # (B, 1, D)
            hidden = torch.cat([token, hidden], dim=1)  # (B, 1 + T, D)
        return ((hidden, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": hidden})

    def _check_kernels(self) -> None:
        kernels = {module._shapadapter_patch.config._attn_implementation for module in self._attentions}
        if not kernels <= set(_MASKING_KERNELS):
            raise UnsupportedModelError(
                f"Masked patches need attention kernels {_MASKING_KERNELS}, the model uses {sorted(map(str, kernels))}. "
                "Call model.set_attn_implementation('sdpa')."
            )

    def _before_block(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Arguments | None:
        """Add the call's mask (B, 1, 1, T) to what is added to the block's attention scores already."""
        call = self.call
        if call is None or call.key_mask is None:
            return None
        if self._mask_argument is None:
            raise UnsupportedModelError(
                f"{type(block).__name__} takes none of {_MASK_ARGUMENTS}, so nothing is masked."
            )
        # As an argument, because gradient checkpointing keeps arguments for the second computation.
        place, name = self._mask_argument
        mask, own = call.key_mask, args[place] if len(args) > place else kwargs.get(name)
        if own is not None:
            own = torch.zeros_like(own, dtype=mask.dtype).masked_fill(~own, -3e4) if own.dtype == torch.bool else own
            mask = own + mask
        if len(args) > place:
            return (*args[:place], mask, *args[place + 1 :]), kwargs
        return args, {**kwargs, name: mask}

    def _after_source(self, source: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        hidden, call = first_tensor(output), self.call
        if self.anatomy.blocks:
            assert hidden is not None
            inner = self._after_blocks(hidden, call)
            return (inner, *output[1:]) if isinstance(output, tuple) else inner
        if call is None:
            return None
        if hidden is None:
            raise UnsupportedModelError(f"{self.anatomy.source} returned no tensor; it did when it was wrapped.")
        call.features = cells_first(hidden, self.anatomy)  # (B, cells, D), or latents
        if self.anatomy.layout != "latents" and call.features.shape[1] != call.cells:
            raise UnsupportedModelError(
                f"Expected a feature map of {call.cells} cells for images of this size, {self.anatomy.source} "
                f"returned {call.features.shape[1]}. Send images whose sides are multiples of {self.anatomy.cell} pixels."
            )
        return None

    def _before_attention_pooling(
        self, module: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> _Arguments | None:
        """Add the call's mask where a probe attends to all tokens."""
        call = self.call
        if call is None or call.presence is None or call.key_mask is None:
            return None
        mask, own = (
            call.key_mask[:, 0].repeat_interleave(module.num_heads, 0),
            kwargs.get("attn_mask"),
        )  # (B * h, 1, T)
        if own is not None:
            own = torch.zeros_like(own, dtype=mask.dtype).masked_fill(own, -3e4) if own.dtype == torch.bool else own
            mask = own + mask
        return args, {**kwargs, "attn_mask": mask.to(args[0].dtype)}

    def _before_mean_pooling(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Registered after `_after_source`, and so run after it where both are on one module."""
        call = self.call
        if call is None or call.presence is None or call.key_mask is None:
            return None
        weighed = call.weigh(
            output[0] if isinstance(output, tuple) else output, self.anatomy.prefix
        )  # (B, P + cells, D)
        return (weighed, *output[1:]) if isinstance(output, tuple) else weighed

    def _after_blocks(self, hidden: Tensor, call: ForwardCall | None) -> Tensor:
        """Take the token, and masked players, out of (B, T, D)."""
        token = None
        if self.token_in_sequence():
            token, hidden = hidden[:, 0], hidden[:, 1:]  # (B, D), (B, T, D)
        if call is None:
            return hidden
        if token is not None and call.hidden != len(self.anatomy.blocks):
            raise UnsupportedModelError(
                f"The Shapley token was hidden in {call.hidden} of {len(self.anatomy.blocks)} attention calls, "
                "so it has changed the base model. Was the model's attention replaced after it was wrapped?"
            )
        call.token = token
        return call.leave(hidden, self.anatomy.prefix)


def keep_cells(hidden: Tensor, present: Tensor, prefix: int) -> Tensor:
    """(B, P + cells, D) with the cells `present` (B, s) alone: (B, P + s, D), in raster order."""
    index = present[..., None].expand(-1, -1, hidden.shape[-1])  # (B, s, D)
    return torch.cat([hidden[:, :prefix], hidden[:, prefix:].gather(1, index)], dim=1)


def with_patch_mask(inputs: dict[str, Any], present: Tensor) -> dict[str, Any]:
    """Inputs of a model that masks patches by itself, with the cells `present` (B, cells) bool alone.

    An empty coalition keeps the mask as it was: attention to nothing is not a number. The call then takes the features
    away.
    """
    if not present.any():
        return inputs
    patches = inputs["pixel_values"]
    mask = torch.zeros(patches.shape[:2], dtype=torch.long, device=patches.device)  # (B, N)
    mask[:, : present.shape[1]] = present.long()
    return {**inputs, "pixel_attention_mask": mask}
