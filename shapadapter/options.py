"""Further keyword arguments of a model's forward, checked: transformers' models take any name and ignore it."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable
from typing import Any

from peft import PeftModel
from torch import nn

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
