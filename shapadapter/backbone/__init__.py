"""Where a vision model's players are, how they are removed, and how the Shapley token travels.

The only room that knows how models are built.
"""

from shapadapter.backbone.anatomy import Anatomy, cells_first, first_tensor
from shapadapter.backbone.attention import attention_weights
from shapadapter.backbone.dry_run import configured_size
from shapadapter.backbone.families import Family, original_name, reached, register_family
from shapadapter.backbone.forward import (
    base_forward,
    base_is_asked,
    check_options,
    evaluating,
    evaluation_view,
    normalised,
    replace_forward,
    restore_forward,
    score,
)
from shapadapter.backbone.hooks import FeatureHooks, ForwardCall, Removal, with_patch_mask
from shapadapter.backbone.selftest import choose_removal, settle
from shapadapter.backbone.targets import default_targets, head_parts, linear_layers, trainable_parts
from shapadapter.backbone.tiling import Tiling, fill_absent, measure_offset, sum_over_tiles, tile

__all__ = [
    "Anatomy",
    "Family",
    "FeatureHooks",
    "ForwardCall",
    "Removal",
    "Tiling",
    "attention_weights",
    "base_forward",
    "base_is_asked",
    "cells_first",
    "check_options",
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
