"""The carrier of token sequences: it takes the Shapley token through the blocks and absent players out of them.

A pre-hook on the first block puts the token at index 0 and drops absent players; pre-hooks on all blocks mask the
attention keys of absent players where they are not dropped; a hook on the last block takes the token, and masked
players, out again, so that norms, poolers and heads never see them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from shapadapter.backbone.anatomy import Anatomy, original_name
from shapadapter.backbone.attention import kernel_of, seat_token, unseat_token
from shapadapter.backbone.dry_run import first_tensor
from shapadapter.backbone.hooks import Carrier, Pass
from shapadapter.core.errors import UnsupportedModelError

# Kernels seen to honour an additive mask (B, 1, 1, T); others take masks of another kind, or none.
_MASKING_KERNELS = ("sdpa", "eager")

# The argument by which a block takes what is added to its attention scores, in transformers and in timm.
_MASK_ARGUMENTS = ("attention_mask", "relative_position_bias", "attn_mask", "shared_rel_pos_bias", "shared_rel_pos")


class TokenCarrier(Carrier):
    """Moves a token through the blocks of one model.

    Args:
        anatomy: where the blocks are.
        source: gives the active adapter's token (1, 1, D), or None while none travels.
    """

    def __init__(self, anatomy: Anatomy, source: Callable[[], Tensor | None]) -> None:
        super().__init__(anatomy)
        self.source = source
        self._seats: list[nn.Module] = []

    # -- fixing it to a model ------------------------------------------------------------------------------------

    def attach(self, model: nn.Module) -> None:
        """Hook every physical copy of the blocks: `modules_to_save` keeps one for each adapter beside the original."""
        first, last = self.anatomy.blocks[0], self.anatomy.blocks[-1]
        for name, module in model.named_modules():
            own = original_name(name)
            if own in self.anatomy.blocks:
                self._handles.append(module.register_forward_pre_hook(self._before_block, with_kwargs=True))
            if own == first:
                # Registered after the mask's hook and run before it.
                self._handles.append(
                    module.register_forward_pre_hook(self._before_first, with_kwargs=True, prepend=True)
                )
            if own == last:
                self._handles.append(module.register_forward_hook(self._after_last))
            if own in self.anatomy.attentions:
                seat_token(module, self)
                self._seats.append(module)

    def detach(self) -> None:
        """Leave the model as it was before `attach`."""
        super().detach()
        for module in self._seats:
            unseat_token(module)
        self._seats = []

    # -- one pass ------------------------------------------------------------------------------------------------

    def has_token(self) -> bool:
        """Whether a token travels now.

        This is the adapter's state, not the pass's: gradient checkpointing computes attention again during backward,
        when the pass is over. A bare pass has no backward.
        """
        return self._token() is not None

    def _token(self) -> Tensor | None:
        current = self.current
        return None if current is not None and current.bare else self.source()

    def count_split(self) -> None:
        """One attention call has hidden the token."""
        if (current := self.current) is not None:
            current.splits += 1

    def _before_first(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden = args[0] if args else kwargs["hidden_states"]  # (B, P + cells, D)
        current = self.current
        token = self._token()
        prefix = self.anatomy.prefix
        if current is not None:
            current.splits = 0
            if hidden.shape[1] != prefix + current.cells and not self.anatomy.family.patches:
                raise UnsupportedModelError(
                    f"Expected {prefix} + {current.cells} tokens at the first block, got "
                    f"{hidden.shape[1]}: the model's patch grid is not the one found when it was wrapped."
                )
            if current.present is not None and current.removal == "drop":
                hidden = keep_cells(hidden, current.present, prefix)  # (B, P + s, D)
            elif current.present is not None and not current.native:
                self._check_kernels()
                current.key_mask = key_mask(hidden, current.present, prefix)
        if hidden.shape[1] == 0:
            # Attention kernels refuse an empty sequence. Nothing reads what this stand-in becomes.
            hidden = hidden.new_zeros(hidden.shape[0], 1, hidden.shape[2])  # (B, 1, D)
        if token is not None:
            token = token.to(hidden.dtype).expand(hidden.shape[0], -1, -1)  # (B, 1, D)
            hidden = torch.cat([token, hidden], dim=1)  # (B, 1 + T, D)
        return ((hidden, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": hidden})

    def _check_kernels(self) -> None:
        kernels = {kernel_of(module) for module in self._seats}
        if not kernels <= set(_MASKING_KERNELS):
            raise UnsupportedModelError(
                f"removal='mask' needs attention kernels {_MASKING_KERNELS}, the model uses {sorted(map(str, kernels))}. "
                "Call model.set_attn_implementation('sdpa')."
            )

    def _before_block(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        current = self.current
        if current is None or current.key_mask is None:
            return None
        # As an argument, because gradient checkpointing keeps arguments for the second computation.
        return with_mask(block, args, kwargs, current.key_mask)

    def _after_last(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        hidden = first_tensor(output)
        assert hidden is not None
        inner = self._without_token(hidden)
        return (inner, *output[1:]) if isinstance(output, tuple) else inner

    def _without_token(self, hidden: Tensor) -> Tensor:
        current = self.current
        token = self._token()
        if token is not None:
            token, hidden = hidden[:, 0], hidden[:, 1:]  # (B, D), (B, T, D)
        if current is None:
            return hidden
        if token is not None and current.splits != len(self.anatomy.blocks):
            raise UnsupportedModelError(
                f"The Shapley token was hidden in {current.splits} of {len(self.anatomy.blocks)} attention calls, "
                "so it has changed the base model. Was the model's attention replaced after it was wrapped?"
            )
        current.token = token
        if current.native:
            return _keep_length(current, hidden)
        prefix = self.anatomy.prefix
        if current.key_mask is not None:
            assert current.present is not None
            hidden = keep_cells(hidden, current.present, prefix)  # (B, P + s, D)
        kept = current.cells if current.present is None else current.present.shape[1]
        if current.present is not None:
            hidden = hidden[:, : prefix + kept]  # (B, P + s, D)
        # Part of what is returned: FSDP gathers the block's weights when a gradient reaches its output.
        current.features = hidden[:, prefix : prefix + kept]  # (B, s, D), without stand-in and padding
        if kept == 0:
            # The mean over no patches is not a number: a zero feature stands for the empty image.
            empty = hidden.new_zeros(hidden.shape[0], 1, hidden.shape[2])  # (B, 1, D)
            hidden = torch.cat([hidden, empty], dim=1)  # (B, P + 1, D)
        return hidden


def _keep_length(current: Pass, hidden: Tensor) -> Tensor:
    """The model masks by itself and counts on its own length: only an empty coalition needs help."""
    assert current.present is not None
    index = current.present[..., None].expand(-1, -1, hidden.shape[-1])  # (B, s, D)
    current.features = hidden.gather(1, index)  # (B, s, D)
    return hidden if index.shape[1] else torch.zeros_like(hidden)


def keep_cells(hidden: Tensor, present: Tensor, prefix: int) -> Tensor:
    """(B, P + cells, D) with the cells `present` (B, s) alone: (B, P + s, D), in raster order."""
    index = present[..., None].expand(-1, -1, hidden.shape[-1])  # (B, s, D)
    return torch.cat([hidden[:, :prefix], hidden[:, prefix:].gather(1, index)], dim=1)


def key_mask(hidden: Tensor, present: Tensor, prefix: int) -> Tensor:
    """Additive mask (B, 1, 1, P + cells) that hides absent cells from every query.

    Not minus infinity: a row in which everything is masked must not become NaN. exp(-30,000) is 0 in every dtype, and
    the number is finite in fp16 as well.
    """
    absent = hidden.new_full((hidden.shape[0], hidden.shape[1] - prefix), -3e4)  # (B, cells)
    cells = absent.scatter(1, present, 0.0)
    always = hidden.new_zeros(hidden.shape[0], prefix)  # (B, P)
    return torch.cat([always, cells], dim=1)[:, None, None]


def with_mask(
    block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], mask: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The block's arguments with `mask` (B, 1, 1, T) added to what is added to its attention scores already.

    Raises:
        UnsupportedModelError: the block takes no such argument.
    """
    parameters = list(inspect.signature(block.forward).parameters)
    name = next((n for n in _MASK_ARGUMENTS if n in parameters), None)
    if name is None:
        raise UnsupportedModelError(f"{type(block).__name__} takes none of {_MASK_ARGUMENTS}, so nothing is masked.")
    place = parameters.index(name)
    own = args[place] if len(args) > place else kwargs.get(name)
    if own is not None:
        own = torch.zeros_like(own, dtype=mask.dtype).masked_fill(~own, -3e4) if own.dtype == torch.bool else own
        mask = own + mask
    if len(args) > place:
        return (*args[:place], mask, *args[place + 1 :]), kwargs
    return args, {**kwargs, name: mask}
