"""The forward of a model: the base's own, replaced and restored, asked for scores, and run in evaluation mode."""

from __future__ import annotations

import functools
import inspect
import threading
import types
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

from shapadapter.backbone.families import Profile
from shapadapter.core.phrases import did_you_mean

_OWN = "_base_forward"

_Model = TypeVar("_Model", bound=nn.Module)


class _BaseRequest(threading.local):
    """Whether the next call of a wrapped model's `forward` in this thread is meant for the base model's own."""

    pending: bool = False


_request = _BaseRequest()


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
    """Whether this call was made by `score`, which holds for one call."""
    pending, _request.pending = _request.pending, False
    return pending


def score(model: nn.Module, profile: Profile, inputs: dict[str, Any]) -> Tensor | None:
    """Scores (B, K) of images; with texts, their normalised embeddings (B, P); None from a model without scores."""
    return scores_and_reply(model, profile, inputs)[0]


def scores_and_reply(model: Any, profile: Profile, inputs: dict[str, Any]) -> tuple[Tensor | None, Tensor | None]:
    """What `score` returns; and the same again or, of a model without scores, the first tensor in its output, if any."""
    if profile.kind == "matching":
        embedded = normalised(model.get_image_features(**inputs))
        return embedded, embedded
    # Through `forward`, so that other wrappers do their work, such as accelerate's that fetches offloaded weights; hooks
    # on a call would hear of a pass they know nothing of. A call from inside, say by a user's hook, is an ordinary one.
    before = _request.pending
    try:
        _request.pending = True
        output = model.forward(**inputs, **profile.named_fields)
    finally:
        _request.pending = before
    scores = getattr(output, profile.family.scores, None)
    if isinstance(scores, Tensor):
        return scores, scores
    fields = output.values() if isinstance(output, Mapping) else ()
    return None, next((field for field in fields if isinstance(field, Tensor)), None)


def normalised(features: Any) -> Tensor:
    """What `get_image_features` or `get_text_features` returns, as unit vectors (B, P)."""
    return F.normalize(getattr(features, "pooler_output", features), dim=-1)


# What a wrapped model takes beyond the base model.
_OURS = ("coalitions", "coalition_grad", "presence")

# What models of transformers hand on in `**kwargs` without naming it in the signature of their forward.
_PASSED_ON = ("interpolate_pos_encoding", "output_attentions", "output_hidden_states", "return_dict")


def check_options(model: nn.Module, options: Iterable[str], function: Callable[..., Any]) -> None:
    """Refuse options that neither a function of this package nor the wrapped model's forward knows."""
    # Not by its class: the import of PEFT is followed by that of the adapter, which is above this room.
    base: Any = getattr(model, "get_base_model", lambda: model)()
    own, forward = _named_parameters(function), _named_parameters(base.forward)
    known = {*forward, *_OURS, *_PASSED_ON, *(("text_embeds",) if hasattr(base, "get_text_features") else ())}
    for name in options:
        if name not in known:
            taken = f"{function.__name__} takes {', '.join(own)}."
            hint = did_you_mean(name, [*own, *sorted(known)], otherwise=taken)
            raise TypeError(f"Neither {function.__name__} nor {type(base).__name__} has an argument {name!r}. {hint}")


def _named_parameters(function: Callable[..., Any]) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [one.name for one in parameters if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run without dropout and drop path, and leave every module's mode as it was found."""
    modes = [(module, module.training) for module in model.modules()]
    training = [module for module, mode in modes if mode]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            if type(module).train is not nn.Module.train:
                module.train()  # LeViT forgets only there what it computed once for evaluation
        for module, mode in modes:
            module.training = mode


# What may be registered on a module; a view has its own, so that a hook on it is not heard by other threads.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)

# Attributes that may run a module, such as a forward that accelerate has replaced.
_BOUND = (types.MethodType, functools.partial, nn.Module)


def evaluation_view(model: _Model, private: bool = False) -> _Model:
    """`model` without dropout and drop path: itself if it is in evaluation mode, else other modules around the same weights.

    Modes are state of the modules, which other threads may be training or explaining with; so they are not switched, as
    `eval` and `train` would. A view shares parameters, buffers and all other state with the model and costs some
    microseconds a module. It is for the passes of one call: what is set on the model later, it does not follow.
    With `private`, a model in evaluation mode gets a view, too, on which hooks may be registered.
    """
    modules = list(model.modules())
    if not private and not any(module.training for module in modules):
        return model
    views: dict[int, Any] = {id(module): object.__new__(type(module)) for module in modules}
    for module in reversed(modules):
        if "_orig_mod" in module._modules:
            views[id(module)] = views[id(module._orig_mod)]  # compiled code runs the modules it was compiled for
    for module in modules:
        if "_orig_mod" not in module._modules:
            _share_state(views[id(module)], module, views)
    for view in views.values():
        if type(view).train is not nn.Module.train:
            view.train()  # LeViT forgets only there what it computed once for evaluation
    for view in views.values():
        view.training = False
    return views[id(model)]


def _share_state(view: nn.Module, module: nn.Module, views: dict[int, nn.Module]) -> None:
    """Give `view` the state of `module`, and in place of other modules their views."""
    state = view.__dict__
    state.update(module.__dict__, _compiled_call_impl=None)
    for name in _HOOKS:
        state[name] = OrderedDict((key, _rebound(hook, views)) for key, hook in (state[name] or {}).items())
    state["_modules"] = {name: child if child is None else views[id(child)] for name, child in module._modules.items()}
    for name, value in module.__dict__.items():
        if isinstance(value, _BOUND):
            state[name] = _rebound(value, views)


def _rebound(value: Any, views: dict[int, nn.Module]) -> Any:
    """A module, method or partial function with the views in place of the modules it is bound to."""
    if isinstance(value, nn.Module):
        return views.get(id(value), value)
    if isinstance(value, types.MethodType):
        return types.MethodType(_rebound(value.__func__, views), _rebound(value.__self__, views))
    if isinstance(value, functools.partial):
        bound = functools.partial(
            _rebound(value.func, views),
            *(_rebound(each, views) for each in value.args),
            **{name: _rebound(each, views) for name, each in value.keywords.items()},
        )
        bound.__dict__.update({name: _rebound(each, views) for name, each in value.__dict__.items()})
        return bound
    return value
