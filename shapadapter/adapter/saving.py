"""The weights of an adapter, which PEFT and transformers write, take their name when they are complete."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import peft.peft_model
import transformers.modeling_utils
from torch import Tensor

from shapadapter.atomic import whole_file

_WRITER = "safe_save_file"


def install() -> None:
    """Let both write the weights of Shapley adapters as whole files; a second call changes nothing."""
    for module in (peft.peft_model, transformers.modeling_utils):
        theirs = getattr(module, _WRITER, None)
        if theirs is not None and not hasattr(theirs, "_of_shapadapter"):
            setattr(module, _WRITER, _whole(theirs))


def _whole(theirs: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(theirs)
    def save(tensors: dict[str, Tensor], filename: Any, *args: Any, **kwargs: Any) -> None:
        """The wrapped function; a file that cannot be finished leaves the one before it as it was."""
        if not any("lora_shapley" in name for name in tensors):
            theirs(tensors, filename, *args, **kwargs)
            return
        with whole_file(Path(filename)) as temporary:
            theirs(tensors, temporary, *args, **kwargs)

    save._of_shapadapter = True  # type: ignore[attr-defined]
    return save
