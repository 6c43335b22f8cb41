"""What is to be measured: the methods that are compared, by name or as the user's functions, and the effort."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from shapadapter.core.errors import ShapleyError
from shapadapter.core.phrases import did_you_mean
from shapadapter.core.shapley import seed_of
from shapadapter.data.images import IMAGE_INPUTS
from shapadapter.evaluation.faithfulness import DRAWS, is_exact, removed_counts, top_count
from shapadapter.explanation.explanation import Explanation
from shapadapter.explanation.game import active_layer
from shapadapter.explanation.methods import METHODS as KNOWN
from shapadapter.explanation.methods import attribute
from shapadapter.explanation.passes import Predicted, base_of, device_of, predictions

METHODS = ("shapadapter", "leave_one_out", "random", "centre")
BUDGETS = (128, 256, 512, 1024, 2048)

ONE_PASS = "shapadapter"
ALWAYS = ("random", "centre")
"""What knows nothing of the model stands beside every comparison."""

SALIENCY = "colour contrast (no model)"
"""A row of the table that is no method: how far the color of each tile is from the image's mean color."""

_WITHOUT_UNIT = ("attention", "attention_rollout", "grad_cam", "random", "centre")

Explainer = Callable[..., Any]
"""`explainer(model, images, targets=[class])`, with `images` as `explain` takes them: prepared, in a mapping, that
returns an `Explanation`; or `method(model, inputs, classes)` as `attribute` takes it."""


@dataclass(frozen=True)
class Plan:
    """The settings of an evaluation, checked.

    Attributes:
        explainers: by the name in the table, a name that `attribute` knows, or a function.
        seed: of all that is drawn.
        options: further keyword arguments of the model's forward.
        images: how many are explained.
        truth_evaluations: of KernelSHAP as the truth.
        budgets: of KernelSHAP to compare with.
        batch_size: images in a forward pass.
        progress: whether to show progress bars.
        thorough: whether sanity, ROAD, montages and cost are measured, too.
        cost_curve: whether errors are measured against cost, with every budget.
    """

    explainers: dict[str, str | Explainer]
    seed: int
    options: dict[str, Any]
    images: int = 32
    truth_evaluations: int = 4096
    budgets: Sequence[int] = BUDGETS
    batch_size: int = 32
    progress: bool = True
    thorough: bool = True
    cost_curve: bool = False

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
        cls, methods: Sequence[str] | Mapping[str, str | Explainer], seed: int, options: dict[str, Any], **effort: Any
    ) -> Plan:
        """From the arguments of `evaluate`: the methods checked, the one pass first, what knows nothing last."""
        listed = [methods] if isinstance(methods, str) else methods
        wanted = dict(listed) if isinstance(listed, Mapping) else {name: name for name in listed}
        for name, explainer in wanted.items():
            if not callable(explainer):
                check_known(explainer, f" Your own is a function: methods={{{name!r}: function}}.")
        if SALIENCY in wanted:
            raise ShapleyError(
                f"{SALIENCY!r} is the row of the reference that knows no model; give your method another name."
            )
        order = [ONE_PASS, *(name for name in wanted if name not in (ONE_PASS, *ALWAYS)), *ALWAYS]
        return cls({name: wanted.get(name, name) for name in order}, seed, options, **effort)

    @property
    def names(self) -> list[str]:
        """Of all methods, in the order of the table."""
        return list(self.explainers)

    def predict(self, model: nn.Module, inputs: dict[str, Tensor]) -> Predicted:
        """The forward pass of some images, with their predicted classes to explain."""
        (batch,) = predictions(model, inputs, None, None, 1, None, len(inputs["pixel_values"]), self.options)
        return batch

    def explain(
        self, name: str, model: nn.Module, inputs: dict[str, Tensor], targets: list[int], index: int
    ) -> Explanation:
        """The explanation of one image by one method; the image's place in the data set seeds what is drawn for it."""
        explainer = self.explainers[name]
        if not callable(explainer):
            # The same seed for every method, so that a method under two names is the same twice.
            seed = seed_of(self.seed, index, "method")
            return attribute(model, inputs, method=explainer, targets=targets, seed=seed, **self.options)
        if _takes_classes(explainer):
            return attribute(model, inputs, method=explainer, targets=targets, **self.options)
        found = explainer(model, inputs, targets=targets)
        if not isinstance(found, Explanation):
            raise ShapleyError(
                f"Expected the method {name!r} to return an Explanation, got {type(found).__name__}. A function of "
                f"model, inputs and classes becomes one by partial(attribute, method=function)."
            )
        return found

    def explanations(self, model: nn.Module, batch: Predicted, indices: Sequence[int]) -> list[list[Explanation]]:
        """Of B images by every method, one image at a time, so that no image depends on the others."""
        return [
            [self.explain(name, model, image_of(batch.inputs, place), [target], index) for name in self.names]
            for place, (target, index) in enumerate(zip(batch.classes[:, 0].tolist(), indices, strict=True))
        ]

    def settings(self, model: nn.Module, masks: str | None) -> dict[str, Any]:
        """What the record of an image depends on, besides the image and the weights."""
        layer = active_layer(model)
        return {
            "model": type(base_of(model)).__name__,
            "adapter": repr(layer.rules[layer.active or ""]),
            "precision": _precision(model),
            "device": device_of(model).type,
            "methods": {name: one if isinstance(one, str) else "own" for name, one in self.explainers.items()},
            "options": {name: repr(value) for name, value in self.options.items()},
            "truth_evaluations": self.truth_evaluations,
            "budgets": list(self.budgets),
            "thorough": self.thorough,
            **({"cost_curve": True} if self.cost_curve else {}),  # without it as before there was one
            "masks": masks is not None,
            "seed": self.seed,
            "versions": versions(),
        }

    def about(self, model: nn.Module, batch: Predicted) -> dict[str, Any]:
        """What a reader must know of a result; `batch` is some images after their forward pass."""
        layer, players = active_layer(model), batch.tiling.count
        rules = layer.rules[layer.active or ""]
        return {
            "model": type(base_of(model)).__name__,
            "methods": self.names,
            "prediction": rules.prediction,
            "removal": rules.removal,
            "players": list(batch.tiling.players),
            "explained": "the class that the model predicts",
            "value": "logit",
            "curves_read": "value" if batch.likelihood == "none" else "probability",
            "truth": "exact" if is_exact(players) else "kernel_shap",
            "truth_evaluations": 2**players if is_exact(players) else self.truth_evaluations,
            "top_k": top_count(players),
            "removed_counts": removed_counts(players),
            "removal_draws": DRAWS,
            "seed": self.seed,
            "precision": _precision(model),
            "device": device_of(model).type,
            "versions": versions(),
        }


def _precision(model: nn.Module) -> str:
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


def check_known(name: object, hint: str = "") -> None:
    """Refuse a name that is no method's; `hint` says what else there is."""
    if name not in KNOWN:
        meant = did_you_mean(str(name), KNOWN)
        listed = f"The methods are {', '.join(KNOWN)}.{hint}"
        raise ShapleyError(f"There is no method {name!r}. {meant}{' ' if meant else ''}{listed}")


def _takes_classes(explainer: Explainer) -> bool:
    """Whether a function is a method as `attribute` takes them, `method(model, inputs, classes)`, by its signature."""
    try:
        given = inspect.signature(explainer)
    except (TypeError, ValueError):  # of what is built in
        return False
    if "targets" in given.parameters or any(one.kind is one.VAR_KEYWORD for one in given.parameters.values()):
        return False
    try:
        given.bind("model", "inputs", "classes")
    except TypeError:
        return False
    return True


def has_unit(explanation: Explanation) -> bool:
    """Whether the map speaks of the model's value."""
    return explanation.method not in _WITHOUT_UNIT


def images_of(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """What belongs to images among a batch's inputs."""
    return {name: value for name, value in inputs.items() if name in IMAGE_INPUTS}


def image_of(inputs: Mapping[str, Any], place: int) -> dict[str, Tensor]:
    """What belongs to one image, as a batch of one."""
    return {name: value[place : place + 1] for name, value in images_of(inputs).items()}


def stacked(explanations: list[list[Explanation]], classes: Tensor) -> Tensor:
    """The maps (B, methods, N) float64 of the explained classes (B, 1)."""
    maps = [
        torch.stack([one.for_label(target).flatten().double() for one in several])
        for several, target in zip(explanations, classes[:, 0].tolist(), strict=True)
    ]
    return torch.stack(maps)
