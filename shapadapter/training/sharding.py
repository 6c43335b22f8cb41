"""How a wrapped model is split among processes by FSDP."""

from __future__ import annotations

from typing import Any

from torch import nn

from shapadapter.backbone import Anatomy, original_name


def split_by_blocks(plugin: Any, model: nn.Module, anatomy: Anatomy) -> None:
    """Let the transformer blocks be FSDP's units where the user named no others; all else is the root's.

    By default accelerate takes the `_no_split_modules` of transformers. For vision models the embeddings are among
    them, whose weights it then splits a second time, as the model's input embeddings, and fails (accelerate 1.15).
    Token and head belong to the root: they are used in hooks on the model's forward, in which the root's weights are
    gathered.

    Args:
        plugin: accelerate's `FullyShardedDataParallelPlugin`, changed in place.
        model: the base model.
        anatomy: its parts.
    """
    if not anatomy.blocks or getattr(plugin, "transformer_cls_names_to_wrap", None) is not None:
        return
    blocks = {type(module) for name, module in model.named_modules() if original_name(name) in anatomy.blocks}
    plugin.transformer_cls_names_to_wrap = sorted(block.__name__ for block in blocks)
