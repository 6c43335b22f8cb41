"""How a checkpoint meets the world: loaded, pushed to the Hub, with a card, and as a Space."""

from importlib import import_module
from typing import Any

_LAZY = {"push": "upload", "update_card": "card.renewal"}

__all__ = ["push", "update_card"]


def __getattr__(name: str) -> Any:
    # What loads one of the modules here need not load all of them.
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
