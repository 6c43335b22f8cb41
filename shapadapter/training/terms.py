"""The terms of the loss, and what else is measured at every step, as means since the last log."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from shapadapter.adapter import ShapleyLayer
from shapadapter.errors import ShapleyCollapseWarning
from shapadapter.objective import coalition_fit, warmup_weight

from .arguments import ShapleyTrainingArguments
from .checks import is_constant
from .reading import Skipped

TASK = ("task_loss", "coalition_task_loss")
"""Terms of the loss that are means over the labels that are known; the others are over images."""


class MeasuringTrainer(Trainer):
    """`Trainer` that logs the terms of its loss by name."""

    args: ShapleyTrainingArguments
    layer: ShapleyLayer
    matching: bool
    _skipped: Skipped
    _share: float  # of the images of a batch that could be read
    _known: Tensor | float  # how many labels of a batch are known, each of several for itself

    _counting = True  # whether any image of a batch is not there to fill it up
    _collapsed = False  # of a collapse; once is enough

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._sums: dict[str, dict[str, Tensor]] = {"train": {}, "eval": {}}
        super().__init__(*args, **kwargs)

    def _weights(self, training: bool) -> dict[str, float]:
        """The weights of the terms, by their names in the logs."""
        shapley = self._weight() if training else self.args.shapley_weight
        return {"shapley_loss": shapley, "task_loss": 1.0, "coalition_task_loss": self.args.coalition_task_weight}

    def _weight(self) -> float:
        progress = self.state.global_step / max(1, self.state.max_steps)
        return warmup_weight(self.args.shapley_weight, progress, self.args.shapley_warmup)

    def _measured(self) -> dict[str, float]:
        """What an evaluation has found, with the loss that its terms add up to: images, and labels, count alike in all batches."""
        found = self._gather("eval")
        weights = self._weights(training=False)
        terms = [weights[name] * found[name] for name in weights if name in found]
        return {**found, **({"loss": sum(terms)} if terms else {})}

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with the mean of each term since the last log."""
        if "loss" in logs and self._sums["train"]:
            means = self._gather("train")
            if "logit_spread" in means:
                self._warn_if_collapsed(means.pop("logit_spread"))
            logs = {**logs, **means, "shapley_weight": self._weight()}
        super().log(logs, *args, **kwargs)

    @torch.no_grad()
    def _note(self, outputs: Any, inputs: dict[str, Any], terms: dict[str, Tensor], mode: str) -> None:
        # Sums stay on the device and are read at the next log: reading one here would halt the device every step.
        size = outputs.logits.shape[0]
        for name, term in terms.items():
            count = self._known if name in TASK else size
            self._add(mode, name, count * term, count)
        arguments = (inputs["coalitions"], outputs.coalition_values, outputs.null_values, outputs.logits)
        self._add(mode, "coalition_fit", *coalition_fit(outputs.coalition_attributions, *arguments))
        if mode == "train" and not self.matching:
            # One image has no spread; its weight is 0, so that all processes sum up the same names.
            counted = size if size > 1 else 0
            self._add(mode, "logit_spread", counted * outputs.logits.float().std(dim=0, correction=0).mean(), counted)

    def _add(self, mode: str, name: str, part: Tensor, whole: Tensor | float) -> None:
        # Filled in on the device: a number that is brought there would halt it, too.
        whole = whole if isinstance(whole, Tensor) else part.new_full((), whole, dtype=torch.float32)
        added = torch.stack([part.detach().float(), whole.detach().float()])  # (2,)
        added = added * float(self._share > 0 and self._counting)
        sums = self._sums[mode]
        sums[name] = sums[name] + added if name in sums else added

    def _gather(self, mode: str) -> dict[str, float]:
        """Part / whole of each term over batches and processes, where defined, and a fresh start."""
        sums, self._sums[mode] = self._sums[mode], {}
        if not sums:
            return {}
        names = sorted(sums)
        parts = self.accelerator.reduce(torch.stack([sums[name] for name in names]), reduction="sum").tolist()
        found = {name: part / whole for name, (part, whole) in zip(names, parts, strict=True) if whole > 0}
        skips = self.args.corrupt_images == "skip"
        return {**found, "skipped_images": self._skipped.total(mode, self.accelerator)} if skips else found

    def _warn_if_collapsed(self, spread: float) -> None:
        warmed_up = self.state.global_step >= self.args.shapley_warmup * self.state.max_steps
        if self._collapsed or not (self.args.shapley_weight > 0 and warmed_up):
            return
        self._collapsed = is_constant(spread, self.layer.classes)
        if self._collapsed:
            warnings.warn(
                f"The model says nearly the same about every image: its logits vary by {spread:.1e} between images. "
                "The Shapley loss has a trivial minimum there. Train the task longer before it sets in (shapley_warmup, "
                f"now {self.args.shapley_warmup}), lower shapley_weight (now {self.args.shapley_weight}) or the "
                "learning rate.",
                ShapleyCollapseWarning,
                stacklevel=2,
            )
