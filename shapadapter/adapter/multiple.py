"""Several adapters on one model: LoRA, copies of `modules_to_save` and head have to be of the same one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import onload_layer
from torch import nn

from shapadapter.core.errors import ShapleyError

MIXED = (
    "adapter_names is not possible with Shapley adapters: token and head are one adapter's for the whole batch. Call the "
    "model once for each adapter, after model.set_adapter(name)."
)


def check_one(names: str | Sequence[str]) -> list[str]:
    """The names as a list.

    Raises:
        ShapleyError: there are several.
    """
    names = [names] if isinstance(names, str) else list(names)
    if len(names) > 1:
        raise ShapleyError(
            f"One Shapley adapter can be active at a time, got {names}: the logits are shared out by one head."
        )
    return names


def check_agreement(parts: list[Any], name: str) -> None:
    """Refuse a call in which LoRA, or a copy of `modules_to_save`, is not that of the head.

    Some ways to switch, merge or delete adapters pass the Shapley layer by, or reach it when others have been switched.

    Args:
        parts: the model's LoRA layers and its wrappers of `modules_to_save`.
        name: of the adapter whose head predicts.

    Raises:
        ShapleyError: they are of different adapters.
    """
    for part in parts:
        in_force = part.merged_adapters or part.active_adapters
        if in_force == [name] and not part.disable_adapters:
            continue
        held = part._get_available_adapters()
        came = [] if part.disable_adapters else [other for other in in_force if other in held]
        if came != [name] * (name in held):
            raise ShapleyError(
                f"The head of adapter {name!r} is active with {_said(came)} in another part of the model, which would "
                f"explain something else. Switch all parts together: model.set_adapter({name!r})."
            )


def _said(names: list[str]) -> str:
    return f"the weights of {' and '.join(map(repr, names))}" if names else "no adapter"


def check_merged(active: list[str], names: list[str] | None) -> list[str]:
    """The adapters to merge: the active one.

    Raises:
        ShapleyError: others were named.
    """
    if names is not None and list(names) != active:
        raise ShapleyError(
            f"Only the active adapter {active} can be merged, because its head explains the merged weights; got "
            f"{names}. Switch first: model.set_adapter(name)."
        )
    return active


@torch.no_grad()
def rehearse_merge(model: nn.Module, names: list[str], safe: bool) -> None:
    """Merge each layer and take that back, bit for bit, so that what cannot be merged shows before anything is.

    Args:
        model: the base model.
        names: of the adapters.
        safe: whether weights that are no finite numbers are refused.
    """
    for module in model.modules():
        if not isinstance(module, LoraLayer) or module.merged:
            continue
        with onload_layer(module):
            kept = [(p, p.data, p.data.clone()) for p in module.get_base_layer().parameters()]
            try:
                module.merge(safe_merge=safe, adapter_names=names)
            finally:
                for parameter, data, values in kept:
                    parameter.data = data.copy_(values)
                module.merged_adapters.clear()


class Unpaired:
    """Stands where LoRA layers tell their scaling, which `create_lorafa_optimizer` asks for.

    It takes all parameters whose names have "lora" in them two by two, as A and B.
    """

    def __init__(self, parts: list[Any]) -> None:
        self.parts = parts

    def __contains__(self, name: str) -> bool:
        for part in self.parts:  # it has frozen A before it asks
            for adapter, a in getattr(part, "lora_A", {}).items():
                a.requires_grad_(next(part.lora_B[adapter].parameters()).requires_grad)
        raise ShapleyError(
            "create_lorafa_optimizer cannot train a Shapley adapter: it would take token and head for pairs of LoRA "
            "matrices. Use torch.optim.AdamW, or create_loraplus_optimizer of peft.optimizers."
        )
