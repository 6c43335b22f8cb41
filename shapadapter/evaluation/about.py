"""What a reader of an evaluation must know: model, game, effort, seed and versions."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from typing import Any

import torch
from torch import nn

from shapadapter.explaining import Predicted, base_of, device_of
from shapadapter.game import active_layer

from .agreement import top_count
from .plan import Plan
from .sensitivity import DRAWS, removed_counts
from .truth import is_exact


def settings_of(model: nn.Module, plan: Plan, masks: str | None) -> dict[str, Any]:
    """What the record of an image depends on, besides the image and the weights."""
    layer = active_layer(model)
    device = device_of(model).type
    return {
        "model": type(base_of(model)).__name__,
        "adapter": repr(layer.rules[layer.active or ""]),
        "precision": precision(model),
        "device": device,
        "methods": {
            name: maker if isinstance(maker, str) else "own" for name, maker in plan.methods.explainers.items()
        },
        "options": {name: repr(value) for name, value in plan.methods.options.items()},
        "truth_evaluations": plan.truth_evaluations,
        "budgets": list(plan.budgets),
        "thorough": plan.thorough,
        "masks": masks is not None,
        "seed": plan.seed,
        "versions": versions(),
    }


def about(model: nn.Module, plan: Plan, batch: Predicted, counts: Mapping[str, Any]) -> dict[str, Any]:
    """The head of a result.

    Args:
        model: a wrapped model.
        plan: what was measured.
        batch: some images after their forward pass.
        counts: what else is known: numbers of images and groups, the truth's error.
    """
    layer = active_layer(model)
    rules = layer.rules[layer.active or ""]
    return {
        "model": type(base_of(model)).__name__,
        "methods": plan.methods.names,
        "prediction": rules.prediction,
        "removal": rules.removal,
        "players": list(batch.tiling.players),
        "explained": "the class that the model predicts",
        "value": "logit",
        "curves_read": {"softmax": "probability", "sigmoid": "probability", "none": "value"}[batch.likelihood],
        "truth": "exact" if is_exact(batch.tiling.count) else "kernel_shap",
        "truth_evaluations": 2**batch.tiling.count if is_exact(batch.tiling.count) else plan.truth_evaluations,
        "top_k": top_count(batch.tiling.count),
        "removed_counts": removed_counts(batch.tiling.count),
        "removal_draws": DRAWS,
        "seed": plan.seed,
        "precision": precision(model),
        "device": device_of(model).type,
        "versions": versions(),
        **counts,
    }


def precision(model: nn.Module) -> str:
    """The precision of the parameters, and of autocast where the caller has opened it."""
    parameter = next(model.parameters())
    own = str(parameter.dtype).removeprefix("torch.")
    if not torch.is_autocast_enabled(parameter.device.type):
        return own
    cast = str(torch.get_autocast_dtype(parameter.device.type)).removeprefix("torch.")
    return f"{own}, autocast to {cast}"


def versions() -> dict[str, str]:
    """Of the packages on which the numbers depend."""
    return {name: metadata.version(name) for name in ("shapadapter", "torch", "transformers", "peft")}
