"""Where a vision model's players are, how they are removed, and how the Shapley token travels.

The only room that knows how models are built.
"""

from .anatomy import Anatomy, evaluating, original_name, reached
from .attention import attention_weights
from .carrier import Carrier, Pass, Removal, cells_first, with_patch_mask
from .dryrun import configured_size, first_tensor
from .families import Family, register_family
from .forwards import base_forward, base_is_asked, replace_forward, restore_forward
from .offset import measure_offset
from .pixels import fill_absent, sum_over_tiles
from .scoring import named_fields, normalised, score
from .selftest import carrier_for, choose_removal, settle
from .targets import default_targets, head_parts, linear_layers, trainable_parts
from .tiling import Tiling, tile
from .view import evaluation_view

__all__ = [
    "Anatomy",
    "Carrier",
    "Family",
    "Pass",
    "Removal",
    "Tiling",
    "attention_weights",
    "base_forward",
    "base_is_asked",
    "carrier_for",
    "cells_first",
    "choose_removal",
    "configured_size",
    "default_targets",
    "evaluating",
    "evaluation_view",
    "fill_absent",
    "first_tensor",
    "head_parts",
    "linear_layers",
    "measure_offset",
    "named_fields",
    "normalised",
    "original_name",
    "reached",
    "register_family",
    "replace_forward",
    "restore_forward",
    "score",
    "settle",
    "sum_over_tiles",
    "tile",
    "trainable_parts",
    "with_patch_mask",
]
