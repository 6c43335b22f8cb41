"""What watches a training: the terms of its loss, and the attribution maps of a few held-out images."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.integrations.integration_utils import TensorBoardCallback, WandbCallback

from shapadapter.core.errors import ShapleyCollapseWarning, ShapleyError
from shapadapter.core.files import atomic_file
from shapadapter.core.losses import coalition_fit
from shapadapter.data.augmentation import seeded
from shapadapter.data.collator import TEXT_COLUMNS, find_column
from shapadapter.data.rows import Skipped, some_rows
from shapadapter.explanation.api import explain
from shapadapter.explanation.explanation import Explanation
from shapadapter.visual import gallery

CLASSES = 3
"""Maps beside each image: those of its likeliest classes."""

TASK = ("task_loss", "coalition_task_loss")
"""Terms of the loss that are means over the labels that are known; the others are over images."""

# A classifier whose logits differ by less than this between images says the same about all of them.
_CONSTANT_SPREAD = 0.05


def is_constant(spread: float, classes: int) -> bool:
    """Whether logits with this standard deviation between images, the mean over classes, are a constant's.

    A single output is a regression, whose unit is the user's.
    """
    return classes > 1 and spread < _CONSTANT_SPREAD


class LossMonitor(TrainerCallback):
    """Sums up what batches say, on the device, and tells whether their losses are finite.

    Nothing is read from the device before a log, or before the backward pass of a step is queued: it would be kept waiting.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.sums: dict[str, dict[str, Tensor]] = {"train": {}, "eval": {}}  # (2,) each: part and whole
        self.skipped = Skipped()
        self._collapse_warned = False
        self._finite: Tensor | None = None  # () bool on the device, of the micro-batches of this step
        self._lost: tuple[Tensor, Any] | None = (
            None  # () how many processes have one that is not, on its way to the CPU
        )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget what an attempt of `auto_find_batch_size` left behind."""
        self.sums["train"], self.skipped, self._finite, self._lost = {}, Skipped(), None, None
        self.trainer.objective.restart("train", "mix")

    @torch.no_grad()
    def add_batch(
        self,
        mode: str,
        outputs: Any,
        coalitions: Tensor,
        terms: dict[str, Tensor],
        labels: Tensor | float,
        counts: bool = True,
    ) -> None:
        """Add the terms of a batch's loss, its coalition fit, and in training the spread of its logits.

        `coalitions` is (B, M, N), `terms` are means by name.
        """
        size = outputs.logits.shape[0]
        for name, term in terms.items():
            count = labels if name in TASK else size
            self._add(mode, name, count * term, count, counts)
        values = (outputs.coalition_values, outputs.null_values, outputs.logits)
        self._add(mode, "coalition_fit", *coalition_fit(outputs.coalition_attributions, coalitions, *values), counts)
        if mode == "train" and not self.trainer.matching:
            # One image has no spread; its weight is 0, so that all processes sum up the same names.
            several = size if size > 1 else 0
            spread = outputs.logits.float().std(dim=0, correction=0).mean()
            self._add(mode, "logit_spread", several * spread, several, counts)

    def _add(self, mode: str, name: str, part: Tensor, whole: Tensor | float, counts: bool) -> None:
        # A plain number is filled in on the device: bringing it there would halt it.
        whole = whole if isinstance(whole, Tensor) else part.new_full((), whole, dtype=torch.float32)
        added = torch.stack([part.detach().float(), whole.detach().float()]) * float(counts)  # (2,)
        sums = self.sums[mode]
        sums[name] = sums[name] + added if name in sums else added

    def means(self, mode: str) -> dict[str, float]:
        """The quotients over batches and processes, where they are defined, and a fresh start."""
        sums, self.sums[mode] = self.sums[mode], {}
        if not sums:
            return {}
        accelerator, names = self.trainer.accelerator, sorted(sums)
        parts = accelerator.reduce(torch.stack([sums[name] for name in names]), reduction="sum").tolist()
        found = {name: part / whole for name, (part, whole) in zip(names, parts, strict=True) if whole > 0}
        if "logit_spread" in found:
            self._warn_of_collapse(found.pop("logit_spread"))
        skips = self.trainer.args.corrupt_images == "skip"
        return {**found, "skipped_images": self.skipped.total(mode, accelerator)} if skips else found

    def _warn_of_collapse(self, spread: float) -> None:
        """Warn once, after the warm-up, if the logits hardly vary between images."""
        args, state = self.trainer.args, self.trainer.state
        warmed_up = args.shapley_weight > 0 and state.global_step >= args.shapley_warmup * state.max_steps
        if self._collapse_warned or not warmed_up or not is_constant(spread, self.trainer.layer.classes):
            return
        self._collapse_warned = True
        warnings.warn(
            f"The model says nearly the same about every image: its logits vary by {spread:.1e} between images. "
            "The Shapley loss has a trivial minimum there. Train the task longer before it sets in (shapley_warmup, "
            f"now {args.shapley_warmup}), lower shapley_weight (now {args.shapley_weight}) or the learning rate.",
            ShapleyCollapseWarning,
            stacklevel=2,
        )

    # -- losses that are not finite --------------------------------------------------------------------------------------

    def add_loss(self, loss: Tensor) -> None:
        """Take note of a micro-batch; at the last one of a step of all processes, so that they stop together."""
        finite = loss.detach().isfinite()
        self._finite = finite if self._finite is None else self._finite & finite
        if not self.trainer.accelerator.sync_gradients:
            return
        count = self.trainer.accelerator.reduce((~self._finite).float(), reduction="sum")
        # Before the backward pass is queued: while it runs, a GPU is not kept waiting for the answer.
        event = torch.cuda.Event() if count.is_cuda else None
        self._lost, self._finite = (count.to("cpu", non_blocking=True), event), None
        if event is not None:
            event.record()

    def check_finite(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        """After the backward pass of a step: stop if any process had a loss that is not finite."""
        if self._lost is None:
            return
        (count, event), self._lost = self._lost, None
        if event is not None:
            event.synchronize()
        if bool(count):
            model.zero_grad()
            raise ShapleyError(
                f"The loss of step {self.trainer.state.global_step + 1} is not finite, {self._cause(model, inputs)} The "
                "weights are those before this step, and nothing was saved after it."
            )

    def _cause(self, model: nn.Module, inputs: dict[str, Any]) -> str:
        """Why the loss may be what it is, and what to do."""
        rate = f"learning_rate (now {self.trainer.args.learning_rate})"
        lost = next((name for name, value in model.named_parameters() if not bool(value.isfinite().all())), None)
        if lost is not None:
            return f"because weights are not: {lost}. An earlier step was too large: lower {rate}, or load an undamaged adapter."
        pixels = inputs.get("pixel_values")
        if isinstance(pixels, Tensor) and not bool(pixels.isfinite().all()):
            return "because pixel_values hold NaN or infinite numbers: look at the transform or the image processor."
        half = " or use bf16 instead of fp16, whose range is small;" if self.trainer.args.fp16 else ""
        return (
            f"while weights and images are: probably the steps are too large. Lower {rate};{half} or look for labels that "
            "are far from all others."
        )


class AttributionMaps(TrainerCallback):
    """Draw the attribution maps of a few held-out images at each evaluation; `log_attributions=4` adds it.

    The images are spread evenly over the evaluation data and always the same, so that their maps can be followed from
    evaluation to evaluation. The picture goes where the trainer reports to: to TensorBoard and Weights & Biases, else to
    `output_dir/attributions/eval-000100.png`. Training goes on as if nothing had been drawn: model and random generators
    are left as they were.

    Every process runs the forward pass, because a sharded model needs them all, and the main process alone writes.
    """

    def __init__(self, trainer: Trainer, images: int) -> None:
        self.trainer = trainer
        self.images = images

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Explain, draw and write."""
        explanation, _ = explained(self.trainer, kwargs["eval_dataloader"].dataset, self.images)
        if not state.is_world_process_zero:
            return
        if not torch.isfinite(explanation.attributions).all():
            warnings.warn(f"No maps are drawn at step {state.global_step}: attributions are not finite.", stacklevel=2)
            return
        # Several evaluation sets have prefixes of their own, which stand nowhere but in the metrics' names.
        name = next(key.removesuffix("_runtime") for key in kwargs["metrics"] if key.endswith("_runtime"))
        file = io.BytesIO()
        gallery(explanation, max_classes=CLASSES).savefig(file, format="png", dpi=100)
        self._write(Image.open(file).convert("RGB"), name, state.global_step, Path(args.output_dir) / "attributions")

    def _write(self, picture: Image.Image, name: str, step: int, folder: Path) -> None:
        taken = False
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                pixels = np.asarray(picture)  # (H, W, 3)
                callback.tb_writer.add_image(f"attributions/{name}", pixels, step, dataformats="HWC")
                taken = True
            elif isinstance(callback, WandbCallback):
                import wandb

                wandb.log({f"attributions/{name}": wandb.Image(picture), "train/global_step": step})
                taken = True
        if not taken:
            folder.mkdir(parents=True, exist_ok=True)
            with atomic_file(folder / f"{name}-{step:06d}.png") as file:
                picture.save(file, format="png")


def explained(trainer: Any, dataset: Any, images: int) -> tuple[Explanation, Any]:
    """Explain some images of a data set as the trainer's model sees them; every process has to call it."""
    with seeded(0), trainer.compute_loss_context_manager():
        rows = list(some_rows(dataset, images))
        texts = None
        if trainer.matching:  # what the images are compared with: their captions, each once
            column = find_column(rows[0], TEXT_COLUMNS)
            assert column is not None, "the collator has refused rows without texts"
            texts = list(dict.fromkeys(row[column] for row in rows))
        batch = trainer.data_collator(rows)
        found = explain(trainer.model, batch, trainer.processing_class, texts=texts, top_k=CLASSES)
        return found, batch.get("labels")
