"""The forward of a model: the base's own, replaced and restored, and asked for scores."""

from __future__ import annotations

import difflib
import functools
import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn

from shapadapter.backbone.anatomy import Kind
from shapadapter.backbone.families import Family

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


def kind_of(model: nn.Module) -> Kind:
    """What kind of model it is, by what it offers; "classifier" may turn out to have no scores."""
    texts = "input_ids" in inspect.signature(model.forward).parameters
    return "matching" if texts and hasattr(model, "get_image_features") else "classifier"


def score(model: nn.Module, kind: Kind, family: Family, inputs: dict[str, Any]) -> Tensor | None:
    """Scores (B, K) of images; with texts, their normalised embeddings (B, P); None from a model without scores.

    Args:
        model: the base model.
        kind: what kind it is.
        family: what is known about it.
        inputs: keyword arguments of its forward.
    """
    return ask(model, kind, family, inputs)[0]


def ask(model: nn.Module, kind: Kind, family: Family, inputs: dict[str, Any]) -> tuple[Tensor | None, Tensor | None]:
    """What `score` returns; and the same again or, of a model without scores, the first tensor in its output, if any."""
    if kind == "matching":
        embedded = embed(model, inputs)
        return embedded, embedded
    with asking_base():  # through `forward`: hooks on a call would hear of a pass they know nothing of
        output = model.forward(**inputs, **named_fields(model))
    scores = getattr(output, family.scores, None)
    if isinstance(scores, Tensor):
        return scores, scores
    fields = output.values() if isinstance(output, Mapping) else ()
    return None, next((field for field in fields if isinstance(field, Tensor)), None)


def embed(model: Any, inputs: dict[str, Any]) -> Tensor:
    """Normalised embeddings (B, P) of images."""
    return normalised(model.get_image_features(**inputs))


def normalised(features: Any) -> Tensor:
    """What `get_image_features` or `get_text_features` returns, as unit vectors (B, P)."""
    return F.normalize(getattr(features, "pooler_output", features), dim=-1)


def named_fields(model: nn.Module) -> dict[str, bool]:
    """`return_dict=True`, where the model knows it."""
    parameters = inspect.signature(model.forward).parameters.values()
    known = any(p.name == "return_dict" or p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    return {"return_dict": True} if known else {}


OURS = ("coalitions", "coalition_grad")
"""What a wrapped model takes beyond the base model."""

PASSED_ON = ("interpolate_pos_encoding", "output_attentions", "output_hidden_states", "return_dict")
"""What models of transformers hand on in `**kwargs` without naming it in the signature of their forward."""

WITH_TEXTS = ("text_embeds",)
"""What a wrapped model that matches images with texts takes as well."""


def check_options(model: nn.Module, options: Iterable[str], function: Callable[..., Any]) -> None:
    """Refuse names that neither a function of this package nor the model's forward knows.

    Args:
        model: a wrapped model.
        options: the names that were left for the model.
        function: the one that was called, whose own arguments are what a misspelled name may have meant.

    Raises:
        TypeError: nobody would look at an argument.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    own, forward = _named(function), _named(base.forward)
    known = {*forward, *OURS, *PASSED_ON, *(WITH_TEXTS if hasattr(base, "get_text_features") else ())}
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(name, [*own, *sorted(known)], n=1)
            hint = f"Did you mean {close[0]}?" if close else f"{function.__name__} takes {', '.join(own)}."
            raise TypeError(f"Neither {function.__name__} nor {type(base).__name__} has an argument {name!r}. {hint}")


def _named(function: Callable[..., Any]) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [one.name for one in parameters if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)]
