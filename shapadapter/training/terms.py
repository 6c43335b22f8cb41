"""The terms of the loss at every step, and a training that stops at a loss that is no number."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from shapadapter.adapter import ShapleyLayer
from shapadapter.core.errors import ShapleyCollapseWarning, ShapleyError
from shapadapter.core.losses import coalition_fit, warmup_weight
from shapadapter.data.rows import Skipped
from shapadapter.training.arguments import ShapleyTrainingArguments
from shapadapter.training.validation import is_constant

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


class FiniteTrainer(Trainer):
    """`Trainer` whose weights never follow a loss that is not finite."""

    _finite: Tensor | None = None  # () bool on the device, of the micro-batches of this step
    _told: tuple[Tensor, Any] | None = None  # () how many processes have one that is not, on its way to the CPU

    def note_finite(self, loss: Tensor) -> None:
        """Take note of the loss of a micro-batch; at the last one of a step of all processes, so that they stop together."""
        finite = loss.detach().isfinite()
        self._finite = finite if self._finite is None else self._finite & finite
        if not self.accelerator.sync_gradients:
            return
        count = self.accelerator.reduce((~self._finite).float(), reduction="sum")
        # Before the backward pass is queued: while it runs, a GPU is not kept waiting for the answer.
        event = torch.cuda.Event() if count.is_cuda else None
        self._told, self._finite = (count.to("cpu", non_blocking=True), event), None
        if event is not None:
            event.record()

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """`Trainer`'s step.

        Raises:
            ShapleyError: the loss is not finite.
        """
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self._told is not None:
            (count, event), self._told = self._told, None
            if event is not None:
                event.synchronize()
            if bool(count):
                model.zero_grad()
                raise ShapleyError(
                    f"The loss of step {self.state.global_step + 1} is not finite, {self._cause(model, inputs)} The weights "
                    "are those before this step, and nothing was saved after it."
                )
        return loss

    def _cause(self, model: nn.Module, inputs: dict[str, Any]) -> str:
        """Why the loss may be what it is, and what to do."""
        lost = next((name for name, value in model.named_parameters() if not bool(value.isfinite().all())), None)
        if lost is not None:
            return (
                f"because weights are not: {lost}. An earlier step was too large: lower learning_rate (now "
                f"{self.args.learning_rate}), or load an adapter that is whole."
            )
        if any(isinstance(one, Tensor) and not bool(one.isfinite().all()) for one in [inputs.get("pixel_values")]):
            return "because pixel_values hold NaN or infinite numbers: look at the transform or the image processor."
        half = " or use bf16 instead of fp16, whose range is small;" if self.args.fp16 else ""
        return (
            f"while weights and images are: probably the steps are too large. Lower learning_rate (now "
            f"{self.args.learning_rate});{half} or look for labels that are far from all others."
        )
