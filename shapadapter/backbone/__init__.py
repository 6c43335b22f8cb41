"""Where a vision model's players are, how they are removed, and how the Shapley token travels.

The only room that knows how models are built.
"""

from shapadapter.backbone.anatomy import Anatomy, evaluating, original_name, reached
from shapadapter.backbone.attention import attention_weights
from shapadapter.backbone.dry_run import configured_size, first_tensor
from shapadapter.backbone.families import Family, register_family
from shapadapter.backbone.forward import (
    base_forward,
    base_is_asked,
    named_fields,
    normalised,
    replace_forward,
    restore_forward,
    score,
)
from shapadapter.backbone.hooks import Carrier, Pass, Removal, cells_first, with_patch_mask
from shapadapter.backbone.pixels import fill_absent, sum_over_tiles
from shapadapter.backbone.selftest import carrier_for, choose_removal, settle
from shapadapter.backbone.targets import default_targets, head_parts, linear_layers, trainable_parts
from shapadapter.backbone.tiling import Tiling, measure_offset, tile
from shapadapter.backbone.view import evaluation_view

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
