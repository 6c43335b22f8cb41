"""The forward of a wrapped model: whose it is, and how the base model's own is asked for."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_OWN = "_base_forward"


class _Asked(threading.local):
    """Whether the next call of a wrapped model's `forward` in this thread is meant for the base model's own."""

    base: bool = False


_asked = _Asked()


def replace_forward(model: nn.Module, forward: Callable[..., Any]) -> functools.partial[Any]:
    """Let `forward(model, *args, **kwargs)` answer `model.forward(*args, **kwargs)`, and return what does so.

    A forward of its own encloses whatever a call does in one frame, where pairs of hooks leave what they have set when a
    `KeyboardInterrupt` comes between them. As accelerate does it, so that the two lie in each other: deepcopy and pickle
    keep model and forward together.
    """
    setattr(model, _OWN, model.forward)
    adapted: Any = functools.partial(forward, model)
    adapted.__wrapped__ = model.forward  # its signature
    adapted.__func__ = forward  # which accelerate binds to the model again when it wraps a method
    model.forward = adapted
    return adapted


def restore_forward(model: nn.Module, adapted: functools.partial[Any] | None) -> bool:
    """Give `model` back the forward it had; False if another wrapper lies over `adapted`, which has to stay then."""
    if adapted is None or model.__dict__.get("forward") is not adapted:
        return adapted is None
    own = model.__dict__.pop(_OWN)
    if getattr(own, "__func__", None) is type(model).forward:
        del model.forward
    else:
        model.forward = own
    return True


def base_forward(model: nn.Module) -> Callable[..., Any]:
    """The forward that `model` had before it was wrapped."""
    return getattr(model, _OWN, None) or model.forward


def base_is_asked() -> bool:
    """Whether this call was made by `asking_base`, which holds for one call."""
    asked, _asked.base = _asked.base, False
    return asked


@contextmanager
def asking_base() -> Iterator[None]:
    """The next call of a wrapped model's `forward` in this thread is the base model's own.

    Asked through `forward` all the same: other wrappers, such as accelerate's that fetches offloaded weights, do their
    work. A call from inside, say by a hook of the user's, is an ordinary one again.
    """
    before = _asked.base
    try:
        _asked.base = True
        yield
    finally:
        _asked.base = before
