"""The level of the explanations that people meet first: with gradients, where the model has them and they cost little."""

from __future__ import annotations

from collections.abc import Callable, Sized
from typing import Any

from shapadapter.core.errors import UnsupportedModelError
from shapadapter.core.phrases import one_line
from shapadapter.explanation.api import explain
from shapadapter.explanation.explanation import Explanation
from shapadapter.explanation.game import active_layer
from shapadapter.explanation.presence import pays_off

MOST_CLASSES = 10
"""Classes shown of an image, each of which takes a backward pass; with more, one forward pass is the default."""


class Explainer:
    """`explain` at the level that was asked for, or at the best one that costs about as much as the prediction.

    That is a forward and a backward pass where presence is a matter of the model's attention and at most
    `MOST_CLASSES` classes of an image are shown, else one forward pass; why is told once.

    Args:
        refine: as `explain` takes it; None for the default.
        tell: takes the one line that says why the default is one forward pass.
    """

    def __init__(self, refine: Any = None, tell: Callable[[str], object] = lambda _: None) -> None:
        self.refine, self.tell = refine, tell
        self.reasons: dict[str, bool] = {}  # why it was one forward pass, and whether that is a matter of the model

    def __call__(self, model: Any, images: Any, processor: Any = None, **options: Any) -> Explanation:
        """Explain images; options and errors are those of `explain`."""
        if self.refine is not None:
            return explain(model, images, processor, refine=self.refine, **options)
        if any(self.reasons.values()):
            return explain(model, images, processor, **options)
        count = _shown(model, **options)
        of_model, reason = False, f"{count} classes are shown, each of which would take a backward pass."
        if not pays_off(active_layer(model)):
            of_model, reason = True, "patches are removed in the pixels, where a gradient tells little more."
        elif count <= MOST_CLASSES:
            try:
                return explain(model, images, processor, refine="gradient", **options)
            except UnsupportedModelError as error:
                of_model, reason = True, one_line(error)
        found = explain(model, images, processor, **options)
        if reason not in self.reasons:
            self.tell(f"One forward pass, without gradients: {reason}")
        self.reasons[reason] = of_model
        return found


def _shown(model: Any, texts: Any = None, top_k: int | None = None, targets: Any = None, **_: Any) -> int:
    """How many classes of an image are shown."""
    if targets is not None:
        return len(targets) if isinstance(targets, Sized) and not isinstance(targets, str) else 1
    listed = (texts,) if isinstance(texts, str) else texts
    classes = active_layer(model).classes if listed is None else len(listed)
    return classes if top_k is None else min(top_k, classes)
