"""The carrier takes the Shapley token through the blocks and takes absent players out of them.

A pre-hook on the first block puts the token at index 0 and drops absent players; pre-hooks on all blocks mask the
attention keys of absent players where they are not dropped; a hook on the last block takes the token, and masked
players, out again, so that norms, poolers and heads never see them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from shapadapter.errors import UnsupportedModelError

from .anatomy import Anatomy, original_name
from .attention import kernel_of, seat_token, unseat_token

Removal = Literal["drop", "mask"]

# Kernels seen to honour an additive mask (B, 1, 1, T); others take masks of another kind, or none.
_MASKING_KERNELS = ("sdpa", "eager")


@dataclass
class Pass:
    """One pass of the base model, and what the carrier saw in it.

    Attributes:
        players: N, the players of the full image.
        present: (B, s) int64, ascending indices of the players that are present; None if all are.
        removal: how the others are taken out.
        features: (B, s, D), the present players' features after the last block.
        token: (B, D), the Shapley token after the last block; None if there is none.
        splits: attention calls in which the token was hidden.
    """

    players: int
    present: Tensor | None = None
    removal: Removal = "drop"
    features: Tensor | None = None
    token: Tensor | None = None
    splits: int = 0
    key_mask: Tensor | None = field(default=None, repr=False)


class TokenCarrier:
    """Moves a token through the blocks of one model.

    Hooks are bound methods of this object, which the adapter's layer holds: deepcopy and pickle of the model keep them
    together, where closures would go on pointing at the old model.

    Args:
        anatomy: where the blocks are.
        source: gives the active adapter's token (1, 1, D), or None while there is none.
    """

    def __init__(self, anatomy: Anatomy, source: Callable[[], Tensor | None]) -> None:
        self.anatomy = anatomy
        self.source = source
        self.current: Pass | None = None
        self._handles: list[Any] = []
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
        for handle in self._handles:
            handle.remove()
        for module in self._seats:
            unseat_token(module)
        self._handles, self._seats = [], []

    # -- one pass ------------------------------------------------------------------------------------------------

    @contextmanager
    def passing(self, current: Pass) -> Iterator[Pass]:
        """Everything the base model does inside the context belongs to `current`."""
        before, self.current = self.current, current
        try:
            yield current
        finally:
            self.current = before

    def has_token(self) -> bool:
        """Whether a token travels now.

        This is the adapter's state, not the pass's: gradient checkpointing computes attention again during backward,
        when the pass is over.
        """
        return self.source() is not None

    def count_split(self) -> None:
        """One attention call has hidden the token."""
        if self.current is not None:
            self.current.splits += 1

    def _before_first(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden = args[0]  # (B, P + N, D)
        current = self.current
        token = self.source()
        if current is not None:
            current.splits = 0
            expected = self.anatomy.prefix + current.players
            if hidden.shape[1] != expected:
                raise UnsupportedModelError(
                    f"Expected {self.anatomy.prefix} + {current.players} tokens at the first block, got "
                    f"{hidden.shape[1]}: the model's patch grid is not the one found when it was wrapped."
                )
            if current.present is not None and current.removal == "drop":
                hidden = keep_players(hidden, current.present, self.anatomy.prefix)  # (B, P + s, D)
            elif current.present is not None:
                self._check_kernels()
                current.key_mask = key_mask(hidden, current.present, self.anatomy.prefix, token is not None)
        if hidden.shape[1] == 0:
            # Attention kernels refuse an empty sequence. Nothing reads what this stand-in becomes.
            hidden = hidden.new_zeros(hidden.shape[0], 1, hidden.shape[2])  # (B, 1, D)
        if token is not None:
            token = token.to(hidden.dtype).expand(hidden.shape[0], -1, -1)  # (B, 1, D)
            hidden = torch.cat([token, hidden], dim=1)  # (B, 1 + T, D)
        return (hidden, *args[1:]), kwargs

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
        if self.current is None or self.current.key_mask is None:
            return None
        kwargs.pop("attention_mask", None)
        return (args[0], self.current.key_mask, *args[2:]), kwargs

    def _after_last(self, block: nn.Module, args: tuple[Any, ...], hidden: Tensor) -> Tensor:
        current = self.current
        token = self.source()
        if token is not None:
            token, hidden = hidden[:, 0], hidden[:, 1:]  # (B, D), (B, T, D)
        if current is None:
            return hidden
        if token is not None and current.splits != len(self.anatomy.blocks):
            raise UnsupportedModelError(
                f"The Shapley token was hidden in {current.splits} of {len(self.anatomy.blocks)} attention calls, "
                "so it has changed the base model. Was the model's attention replaced after it was wrapped?"
            )
        prefix = self.anatomy.prefix
        if current.key_mask is not None:
            assert current.present is not None
            hidden = keep_players(hidden, current.present, prefix)  # (B, P + s, D)
        if current.present is not None:
            hidden = hidden[:, : prefix + current.present.shape[1]]  # (B, P + s, D), without a stand-in
        current.token = token
        current.features = hidden[:, prefix:]  # (B, s, D)
        if current.features.shape[1] == 0:
            # The mean over no patches is not a number: a zero feature stands for the empty image.
            empty = hidden.new_zeros(hidden.shape[0], 1, hidden.shape[2])  # (B, 1, D)
            hidden = torch.cat([hidden, empty], dim=1)  # (B, P + 1, D)
        return hidden


def keep_players(hidden: Tensor, present: Tensor, prefix: int) -> Tensor:
    """(B, P + N, D) with the players `present` (B, s) alone: (B, P + s, D), in raster order."""
    index = present[..., None].expand(-1, -1, hidden.shape[-1])  # (B, s, D)
    return torch.cat([hidden[:, :prefix], hidden[:, prefix:].gather(1, index)], dim=1)


def key_mask(hidden: Tensor, present: Tensor, prefix: int, token: bool) -> Tensor:
    """Additive mask (B, 1, 1, [1 +] P + N) that hides absent players from every query.

    Not minus infinity: a row in which everything is masked must not become NaN. exp(-30,000) is 0 in every dtype, and
    the number is finite in fp16 as well.
    """
    absent = hidden.new_full((hidden.shape[0], hidden.shape[1] - prefix), -3e4)  # (B, N)
    players = absent.scatter(1, present, 0.0)
    always = hidden.new_zeros(hidden.shape[0], prefix + int(token))  # (B, [1 +] P)
    return torch.cat([always, players], dim=1)[:, None, None]
