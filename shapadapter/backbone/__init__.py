"""Where a vision model's players are, how they are removed, and how the Shapley token travels.

The only room that knows how models are built.
"""

from .anatomy import Anatomy, default_targets, evaluating, examine, linear_layers, original_name
from .carrier import Pass, TokenCarrier
from .selftest import choose_removal

__all__ = [
    "Anatomy",
    "Pass",
    "TokenCarrier",
    "choose_removal",
    "default_targets",
    "evaluating",
    "examine",
    "linear_layers",
    "original_name",
]
