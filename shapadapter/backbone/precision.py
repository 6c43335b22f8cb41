"""Signals that a model's own precision loses, as those of a new network without trained norms: then float64 is asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from shapadapter.core.errors import UnsupportedModelError

# Rounding that a different split of the same sums may cause, relative to the numbers' size.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}

# Less than this share of the largest number may be rounding.
_ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-13}

_Found = TypeVar("_Found")


class FaintSignalError(UnsupportedModelError):
    """What was looked for may be there, but less than the model's own precision can show."""


def exceeds_rounding(part: Tensor, whole: Tensor) -> bool:
    """Whether `part`, a difference of numbers as large as `whole`, is more than their rounding; in half precision, any is."""
    limit = _ROUNDING.get(whole.dtype, 0.0) * whole.abs().max().item()
    return part.abs().max().item() > limit


def same_but_rounding(one: Tensor, other: Tensor, moved: Tensor, tolerance: float | None = None) -> bool:
    """Whether features are equal but for rounding, measured by how far blocks `moved` them.

    By themselves they would hide a difference where the blocks are all but silent, as those of a new model with a
    LayerScale of 1e-5.
    """
    share = 10 * (tolerance or TOLERANCE.get(one.dtype, 5e-3))
    eps = torch.finfo(one.dtype).eps
    one, other, moved = (part.detach().cpu().double() for part in (one, other, moved))  # squares of tiny numbers
    return bool((one - other).norm() <= share * moved.norm() + eps * one.norm())


def refuse_faint(message: str, seen: Tensor) -> UnsupportedModelError:
    """The error for what does not show in the numbers `seen`: it may in float64, if they are not of that precision."""
    return (UnsupportedModelError if seen.dtype == torch.float64 else FaintSignalError)(message)


def in_sufficient_precision(ask: Callable[[], _Found], model: nn.Module) -> _Found:
    """What `ask` finds in the model or, where that is too faint, in the model in float64.

    Raises:
        UnsupportedModelError: it does not show there either, or the model cannot compute in float64.
    """
    try:
        return ask()
    except FaintSignalError as error:
        faint = error
    try:
        with _in_float64(model):
            return ask()
    except UnsupportedModelError as error:
        why = "" if str(faint) in str(error) else f" Tried in float64, because in the model's own precision {faint}."
        raise UnsupportedModelError(f"{error}{why}") from error
    except (RuntimeError, TypeError) as error:  # quantised weights, or a device that knows no float64
        raise UnsupportedModelError(f"{type(model).__name__}: {faint}, as far as its precision shows.") from error


@contextmanager
def _in_float64(model: nn.Module) -> Iterator[None]:
    """Compute in float64. The model itself, not a copy, whose methods may still be bound to the original."""
    tensors = {*model.parameters(), *model.buffers()}
    own = [(tensor, tensor.data) for tensor in tensors if tensor.is_floating_point()]
    try:
        for tensor, data in own:
            tensor.data = data.double()
        yield
    finally:
        for tensor, data in own:
            tensor.data = data
