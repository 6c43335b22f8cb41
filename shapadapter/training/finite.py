"""A training that stops at a loss that is no number, before any weight has followed it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from shapadapter.errors import ShapleyError


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
