"""The same model in evaluation mode, without a change to the model itself."""

from __future__ import annotations

import functools
import types
from collections import OrderedDict
from typing import Any, TypeVar

from torch import nn

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

_Model = TypeVar("_Model", bound=nn.Module)

# Attributes that may run a module, such as a forward that accelerate has replaced.
_BOUND = (types.MethodType, functools.partial, nn.Module)


def evaluation_view(model: _Model, private: bool = False) -> _Model:
    """`model` without dropout and drop path: itself if it is in evaluation mode, else other modules around the same weights.

    Modes are state of the modules, which other threads may be training or explaining with; so they are not switched, as
    `eval` and `train` would. A view shares parameters, buffers and all other state with the model and costs some
    microseconds a module. It is for the passes of one call: what is set on the model later, it does not follow.

    Args:
        model: any model, wrapped or not.
        private: make a view of a model in evaluation mode, too, on which hooks may be registered.
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
            _fill(views[id(module)], module, views)
    for view in views.values():
        if type(view).train is not nn.Module.train:
            view.train()  # LeViT forgets only there what it computed once for evaluation
    for view in views.values():
        view.training = False
    return views[id(model)]


def _fill(view: nn.Module, module: nn.Module, views: dict[int, nn.Module]) -> None:
    """Give `view` the state of `module`, and in place of other modules their views."""
    state = view.__dict__
    state.update(module.__dict__, _compiled_call_impl=None)
    for name in _HOOKS:
        hooks = state[name]
        state[name] = (
            OrderedDict((key, _seen_from(hook, views)) for key, hook in hooks.items()) if hooks else OrderedDict()
        )
    state["_modules"] = {name: child if child is None else views[id(child)] for name, child in module._modules.items()}
    for name, value in module.__dict__.items():
        if isinstance(value, _BOUND):
            state[name] = _seen_from(value, views)


def _seen_from(value: Any, views: dict[int, nn.Module]) -> Any:
    """A module, method or partial function with the views in place of the modules it is bound to."""
    if isinstance(value, nn.Module):
        return views.get(id(value), value)
    if isinstance(value, types.MethodType):
        return types.MethodType(_seen_from(value.__func__, views), _seen_from(value.__self__, views))
    if isinstance(value, functools.partial):
        bound = functools.partial(
            _seen_from(value.func, views),
            *(_seen_from(each, views) for each in value.args),
            **{name: _seen_from(each, views) for name, each in value.keywords.items()},
        )
        bound.__dict__.update({name: _seen_from(each, views) for name, each in value.__dict__.items()})
        return bound
    return value
