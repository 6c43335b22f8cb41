"""What is to be measured, with which effort, and what a reader must know of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from shapadapter.evaluation.agreement import top_count
from shapadapter.evaluation.compared import Explainer, Methods
from shapadapter.evaluation.sensitivity import DRAWS, removed_counts
from shapadapter.evaluation.truth import is_exact
from shapadapter.explanation.api import Predicted, base_of, device_of
from shapadapter.explanation.game import active_layer

METHODS = ("shapadapter", "leave_one_out", "random", "centre")
BUDGETS = (128, 256, 512, 1024, 2048)


@dataclass(frozen=True)
class Plan:
    """The settings of an evaluation, checked.

    Attributes:
        methods: that are compared, with seed and options.
        images: how many are explained.
        truth_evaluations: of KernelSHAP as the truth.
        budgets: of KernelSHAP to compare with.
        batch_size: images in a forward pass.
        progress: whether to show progress bars.
        thorough: whether sanity, ROAD, montages and cost are measured, too.
    """

    methods: Methods
    images: int
    truth_evaluations: int
    budgets: tuple[int, ...]
    batch_size: int
    progress: bool
    thorough: bool = True

    def __post_init__(self) -> None:
        if self.images < 1 or self.batch_size < 1:
            raise ValueError(f"Expected at least one image, got images={self.images}, batch_size={self.batch_size}.")
        if self.truth_evaluations < 4 or self.truth_evaluations % 4:
            raise ValueError(f"truth_evaluations must be a multiple of 4, got {self.truth_evaluations}.")
        rising = all(low < high for low, high in pairwise(self.budgets))
        if not self.budgets or self.budgets[0] < 2 or any(budget % 2 for budget in self.budgets) or not rising:
            raise ValueError(f"budgets must be even numbers of evaluations that rise, got {list(self.budgets)}.")
        if self.budgets[-1] >= self.truth_evaluations:
            raise ValueError(
                f"budgets must stay below the truth's evaluations, which are to be nearer the truth: got "
                f"{list(self.budgets)} and truth_evaluations={self.truth_evaluations}."
            )

    @classmethod
    def of(
        cls,
        methods: Sequence[str] | Mapping[str, str | Explainer],
        seed: int,
        options: dict[str, Any],
        budgets: Sequence[int],
        **settings: Any,
    ) -> Plan:
        """From the arguments of `evaluate`."""
        return cls(methods=Methods.of(methods, seed, options), budgets=tuple(budgets), **settings)

    @property
    def seed(self) -> int:
        """Of all that is drawn."""
        return self.methods.seed


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
