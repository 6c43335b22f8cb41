"""The explanation methods that are compared, by name or as the user's own functions."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shapadapter.core.errors import ShapleyError
from shapadapter.core.statistics import seed_of
from shapadapter.data.images import IMAGE_INPUTS
from shapadapter.evaluation.localization import SALIENCY
from shapadapter.explanation.api import Predicted
from shapadapter.explanation.explanation import Explanation
from shapadapter.explanation.methods import METHODS, attribute

ONE_PASS = "shapadapter"
ALWAYS = ("random", "centre")
"""What knows nothing of the model stands beside every comparison."""

WITHOUT_UNIT = ("attention", "attention_rollout", "grad_cam", "random", "centre")

Explainer = Callable[..., Any]
"""`explainer(model, images, targets=[class])`, with `images` as `explain` takes them: prepared, in a mapping, that
returns an `Explanation`; or `method(model, inputs, classes)` as `attribute` takes it."""


@dataclass(frozen=True)
class Methods:
    """Methods by the name that stands in the table.

    Attributes:
        explainers: a name that `attribute` knows, or a function.
        seed: of all that they draw.
        options: further keyword arguments of the model's forward.
    """

    explainers: dict[str, str | Explainer]
    seed: int
    options: dict[str, Any]

    @classmethod
    def of(cls, wanted: Sequence[str] | Mapping[str, str | Explainer], seed: int, options: dict[str, Any]) -> Methods:
        """Check what was asked for, and add the references that are always there.

        Raises:
            ShapleyError: there is no such method, or its name is another row's.
        """
        listed = [wanted] if isinstance(wanted, str) else wanted
        explainers = dict(listed) if isinstance(listed, Mapping) else {name: name for name in listed}
        for name, explainer in explainers.items():
            if not callable(explainer) and explainer not in METHODS:
                raise ShapleyError(f"{unknown(explainer)} Your own is a function: methods={{{name!r}: function}}.")
        if SALIENCY in explainers:
            raise ShapleyError(
                f"{SALIENCY!r} is the row of the reference that knows no model; give your method another name."
            )
        rest = {name: name for name in explainers if name not in (ONE_PASS, *ALWAYS)}
        order = [ONE_PASS, *rest, *ALWAYS]
        return cls({name: explainers.get(name, name) for name in order}, seed, options)

    @property
    def names(self) -> list[str]:
        """Of all methods, the one pass first, what knows nothing last."""
        return list(self.explainers)

    def explain(
        self, name: str, model: nn.Module, inputs: dict[str, Tensor], targets: list[int], index: int
    ) -> Explanation:
        """The explanation of one image by one method.

        Args:
            name: of the method.
            model: a wrapped model.
            inputs: the image, as a batch of one.
            targets: the classes to explain.
            index: the image's place in the data set, which seeds what is drawn for it.
        """
        explainer = self.explainers[name]
        if callable(explainer):
            if takes_classes(explainer):
                return attribute(model, inputs, method=explainer, targets=targets, **self.options)
            found = explainer(model, inputs, targets=targets)
            if not isinstance(found, Explanation):
                raise ShapleyError(
                    f"Expected the method {name!r} to return an Explanation, got {type(found).__name__}. A function of "
                    f"model, inputs and classes becomes one by partial(attribute, method=function)."
                )
            return found
        # The same seed for every method, so that a method under two names is the same twice.
        seed = seed_of(self.seed, index, "method")
        return attribute(model, inputs, method=explainer, targets=targets, seed=seed, **self.options)

    def maps(self, model: nn.Module, batch: Predicted, indices: Sequence[int]) -> list[list[Explanation]]:
        """The explanations of B images by every method, one image at a time, so that no image depends on the others."""
        return [
            [self.explain(name, model, image_of(batch.inputs, place), [target], index) for name in self.names]
            for place, (target, index) in enumerate(zip(batch.classes[:, 0].tolist(), indices, strict=True))
        ]


def takes_classes(explainer: Explainer) -> bool:
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


def unknown(name: object) -> str:
    """What to say of a name that is no method's."""
    close = difflib.get_close_matches(str(name), METHODS, n=3)
    hint = f"Did you mean {' or '.join(map(repr, close))}? " if close else ""
    return f"There is no method {name!r}. {hint}The methods are {', '.join(METHODS)}."


def has_unit(explanation: Explanation) -> bool:
    """Whether the map speaks of the model's value."""
    return explanation.method not in WITHOUT_UNIT


def image_of(inputs: Mapping[str, Any], place: int) -> dict[str, Tensor]:
    """What belongs to one image among a batch's inputs, as a batch of one."""
    return {name: value[place : place + 1] for name, value in inputs.items() if name in IMAGE_INPUTS}


def stacked(explanations: list[list[Explanation]], classes: Sequence[int]) -> Tensor:
    """The maps (B, methods, N) float64 of the explained classes (B,)."""
    maps = [
        [one.for_label(target).flatten().double() for one in several]
        for several, target in zip(explanations, classes, strict=True)
    ]
    return torch.stack([torch.stack(several) for several in maps])  # (B, methods, N)


def check_finite(maps: Tensor, names: Sequence[str]) -> None:
    """Refuse maps (B, methods, N) of which no curve can be drawn.

    Raises:
        ShapleyError: a method did not say a finite number of every player.
    """
    finite = maps.isfinite().all(dim=-1).all(dim=0)  # (B, methods, N) -> (methods,)
    if not bool(finite.all()):
        bad = [name for name, whole in zip(names, finite.tolist(), strict=True) if not whole]
        raise ShapleyError(f"The methods {bad} gave attributions that are not finite; no curve can be drawn of them.")
