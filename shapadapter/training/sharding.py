"""How a wrapped model is split among processes by FSDP."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from accelerate.utils import AutocastKwargs
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import Trainer

from shapadapter.backbone import Anatomy, original_name


def prepare_fsdp(plugin: Any, model: nn.Module, anatomy: Anatomy) -> None:
    """Choose FSDP's units and precision as a wrapped model needs them.

    Transformer blocks become units where the user named no others. By default accelerate takes the `_no_split_modules` of
    transformers. For vision models the embeddings are among them, whose weights it then splits a second time, as the
    model's input embeddings, and fails (accelerate 1.15). Token and head belong to the root: they are used in hooks on
    the model's forward, in which the root's weights are gathered.

    Mixed precision is left to autocast, as without FSDP. FSDP2's own policy would round the head's weights and all that
    the model returns, and attributions would no longer sum to the logits.

    Args:
        plugin: accelerate's `FullyShardedDataParallelPlugin`, changed in place.
        model: the base model.
        anatomy: its parts.
    """
    if anatomy.blocks and getattr(plugin, "transformer_cls_names_to_wrap", None) is None:
        blocks = {type(module) for name, module in model.named_modules() if original_name(name) in anatomy.blocks}
        plugin.transformer_cls_names_to_wrap = sorted(block.__name__ for block in blocks)
    if plugin.fsdp_version == 2:
        plugin.mixed_precision_policy = MixedPrecisionPolicy()


class ShardedTrainer(Trainer):
    """`Trainer` that computes in mixed precision by autocast under FSDP, too."""

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> AbstractContextManager:
        """Autocast around each step, where accelerate puts none around the model's forward."""
        # Without the cache: what it keeps of a weight is of no use once FSDP has given the weight back.
        if self.is_fsdp_enabled:
            return self.accelerator.autocast(AutocastKwargs(cache_enabled=False))
        return super().autocast_smart_context_manager(cache_enabled)
