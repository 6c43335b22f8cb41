"""The objective on a micro-batch: what is drawn for it, its terms, how much they count, and what the log says of them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from shapadapter.adapter.answer import ShapleyOutput, task_loss
from shapadapter.core.errors import ImageError, ShapleyCollapseWarning, ShapleyError
from shapadapter.core.shapley import coalition_fit, generator_of, sample_pairs, shapley_loss_of_sums, warmup_weight
from shapadapter.data.augmentation import draw_mix, mix_labels, mix_pictures
from shapadapter.data.rows import readable_rows
from shapadapter.training.arguments import TASK_OPTIONS
from shapadapter.training.validation import SoftTask

# What is drawn, by the number that keeps its random numbers apart from the others'.
_DRAWN = {"eval": 0, "train": 1, "mix": 2}

_TASK = ("task_loss", "coalition_task_loss")
"""Terms of the loss that are means over the labels that are known; the others are over images."""

# A classifier whose logits differ by less than this between images says the same about all of them.
_CONSTANT_SPREAD = 0.05


@dataclass(frozen=True)
class Shares:
    """How much a micro-batch counts, so that each known label, and each image, has the same say.

    Attributes:
        images: share of its images that could be read; in an evaluation whether any could, 0 or 1.
        labels: of its labels in the task loss of the step, 1 on average.
        known: how many labels are known, each of several for itself.
    """

    images: float
    labels: Tensor | float
    known: Tensor | float

    def of(self, term: str) -> Tensor | float:
        """What a term of the loss is multiplied with."""
        return self.labels if term in _TASK else self.images


class Objective:
    """What a trainer's loss is taken of, and what it is made of."""

    def __init__(self, trainer: Any, soft_task: SoftTask | None) -> None:
        self.trainer, self.soft_task = trainer, soft_task
        self._drawn: dict[str, tuple[int, int]] = {}  # by kind: the step, and the number of the last draw in it

    def weights(self, training: bool) -> dict[str, float]:
        """The weights of the terms, by their names in the logs; in an evaluation those after the warm-up."""
        args, state = self.trainer.args, self.trainer.state
        progress = state.global_step / max(1, state.max_steps) if training else 1.0
        shapley = warmup_weight(args.shapley_weight, progress, args.shapley_warmup)
        return {"shapley_loss": shapley, "task_loss": 1.0, "coalition_task_loss": args.coalition_task_weight}

    def prepared(self, inputs: dict[str, Any], training: bool, in_step: Any) -> tuple[dict[str, Any], Shares]:
        """The images of a batch that could be read, in training mixed if that is asked for, and how much they count.

        `in_step` is the mean number of labels of the step's batches; None for this batch's own.
        """
        trainer, labelled = self.trainer, self.trainer.labelled
        read = images = len(inputs["pixel_values"])
        if "readable" in inputs:
            inputs, read, images = readable_rows(inputs)
            if trainer.counting:
                trainer.monitor.add_skipped("train" if training else "eval", read, images)
        # Divided by all images, a batch counts by those it still has, and one without any has no say.
        share: Any = read / images if training else float(read > 0)
        if labelled is None:
            return {"return_loss": True, **inputs}, Shares(share, share, float(read))
        say, known, labels = share, float(read), inputs.get("labels")
        if labels is None and training and labelled.needed(trainer.layer):
            raise labelled.missing([name for name in inputs if name != "coalitions"])
        if labels is not None:
            if getattr(trainer.data_collator, "labels", None) is None:  # of another collator
                inputs = labelled.with_unknown_marked(inputs)
            labels = inputs["labels"]
            if self.soft_task is not None and (labels.ndim != 1 or labels.is_floating_point()):
                raise ShapleyError(
                    f"{', '.join(TASK_OPTIONS)}: expected labels that are the number of a class, one for each image, got "
                    f"{labels.dtype} of shape {tuple(labels.shape)}. Leave them out for regression and several labels."
                )
            known = (read > 0) * labelled.rules.count(inputs)
            if training and trainer.compute_loss_func is None:
                in_all = known + (images - read) * labels[0].numel() if in_step is None else in_step
                say = known / torch.as_tensor(in_all, device=known.device).clamp(min=1e-3)
        if training and max(trainer.args.mixup_alpha, trainer.args.cutmix_alpha) > 0:
            tiling, alphas = trainer.layer.tiling(**inputs), (trainer.args.mixup_alpha, trainer.args.cutmix_alpha)
            mix = draw_mix(len(inputs["pixel_values"]), tiling.players, alphas, self.key("mix"))
            if labels is not None:
                inputs = {**inputs, "labels": mix_labels(labels, mix, trainer.layer.classes)}
            inputs = {**inputs, "pixel_values": mix_pictures(inputs["pixel_values"], mix, tiling)}
        return inputs, Shares(share, say, known)

    def known_labels(self, batches: list[Any], device: torch.device) -> Tensor | None:
        """The mean number (), over all processes, by which the micro-batches of a step divide their task loss.

        So each label has the same say.
        """
        if self.trainer.labelled is None or not batches:
            return None
        rules = self.trainer.labelled.rules
        counts = [rules.count(one).to(device, torch.float32) for one in batches if isinstance(one, Mapping)]
        total = sum(counts, torch.zeros((), device=device))
        return self.trainer.accelerator.reduce(total, reduction="mean") / len(batches)

    def key(self, kind: str) -> tuple[int, ...]:
        """Of the next draw, by seed, step, micro-step and rank alone: a resumed run repeats it."""
        step = 0 if kind == "eval" else self.trainer.state.global_step
        last, number = self._drawn.get(kind, (step, -1))
        self._drawn[kind] = step, number + 1 if last == step else 0
        return self.trainer.args.seed, _DRAWN[kind], *self._drawn[kind], self.trainer.args.process_index

    def restart(self, mode: str) -> None:
        """Begin a training or an evaluation: draws are numbered anew."""
        for kind in ("train", "mix") if mode == "train" else ("eval",):
            self._drawn.pop(kind, None)

    def coalitions(self, inputs: dict[str, Any], training: bool) -> Tensor:
        """Coalitions (B, 2 * pairs, N) of the images of a batch."""
        generator = generator_of(*self.key("train" if training else "eval"))
        players = self.trainer.layer.tiling(**inputs).count
        return sample_pairs(len(inputs["pixel_values"]), players, self.trainer.args.coalition_pairs, generator)

    def terms(self, outputs: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """The terms of the loss, not yet weighted, by their names in the logs."""
        args, labels, values = self.trainer.args, inputs.get("labels"), outputs.coalition_values
        targets = values if args.coalition_gradients else values.detach()
        sums, scale = outputs.coalition_attributions, outputs.expected_square  # (B, M, K), (B,)
        terms = {"shapley_loss": shapley_loss_of_sums(sums, scale, targets, outputs.null_values)}
        if labels is None:
            return terms if outputs.loss is None else {**terms, "task_loss": outputs.loss}
        terms["task_loss"] = self._task_loss(outputs, labels)
        if args.coalition_task_weight > 0:
            flat = values.flatten(0, 1)  # (B * M, K)
            repeated = labels.repeat_interleave(values.shape[1], dim=0)  # (B * M,) or (B * M, K)
            terms["coalition_task_loss"] = self._task_loss(ShapleyOutput(logits=flat), repeated)
        return terms

    def total(self, terms: dict[str, Tensor], shares: Shares, training: bool) -> Tensor:
        """The loss of a micro-batch, of its terms; one without a weight, of a subclass, counts as it is."""
        weights = self.weights(training)
        return torch.stack([shares.of(name) * weights.get(name, 1.0) * term for name, term in terms.items()]).sum()

    def _task_loss(self, outputs: Any, labels: Tensor) -> Tensor:
        trainer = self.trainer
        if trainer.compute_loss_func is not None:
            # Without the number of items: the Trainer divides by the accumulation steps, see `loss_is_scaled_for_ga`.
            return trainer.compute_loss_func(outputs, labels, num_items_in_batch=None)
        if self.soft_task is not None:
            return self.soft_task(outputs.logits, labels)
        if outputs.loss is not None:
            return outputs.loss
        return task_loss(trainer.accelerator.unwrap_model(trainer.model), labels, outputs.logits)


def placed(coalitions: Tensor, device: torch.device) -> dict[str, Any]:
    """Coalitions (B, M, N) on the device, and their sizes where these are the same for all images.

    They are counted before they go there, so that the model need not ask the device.
    """
    sizes = coalitions.sum(dim=2)  # (B, M)
    same = bool((sizes == sizes[:1]).all())
    found = {"coalitions": coalitions.to(device, non_blocking=True)}
    return {**found, **({"coalition_sizes": tuple(sizes[0].tolist())} if same else {})}


def without_repeats(inputs: dict[str, Any], accelerator: Any) -> tuple[dict[str, Any], bool]:
    """This process's part of a batch of an evaluation, without what only fills it up.

    The R of B images that are the data set's, in the order of `gather_for_metrics`, and whether there is any. Where there
    is none, one stays all the same, for every process has to take part in a step.
    """
    state, rows = accelerator.gradient_state, len(inputs["pixel_values"])
    if accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
        return inputs, True
    own = state.remainder - accelerator.process_index * rows
    kept = min(max(own, 1), rows)
    part = {
        name: value[:kept] if isinstance(value, Tensor) and value.ndim and len(value) == rows else value
        for name, value in inputs.items()
    }
    return part, own > 0


def refilled(values: Tensor | None, rows: int) -> Tensor | None:
    """Values (R, ...) with the last one repeated, (B, ...): a gather wants as many from every process."""
    if values is None or len(values) == rows:
        return values
    return values[torch.arange(rows, device=values.device).clamp(max=len(values) - 1)]


class LossMonitor(TrainerCallback):
    """Sums up what batches say, on the device, and tells whether their losses are finite.

    Nothing is read from the device before a log, or before the backward pass of a step is queued: it would be kept waiting.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.sums: dict[str, dict[str, Tensor]] = {"train": {}, "eval": {}}  # (2,) each: part and total
        self._skipped = {"train": [0, 0], "eval": [0, 0]}  # images that could not be read, and all
        self._collapse_warned = False
        self._finite: Tensor | None = None  # () bool on the device, of the micro-batches of this step
        self._lost: tuple[Tensor, Any] | None = None  # () in how many processes not so, on its way to the CPU

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget what an attempt of `auto_find_batch_size` left behind."""
        self._finite = self._lost = None
        self.restart("train")

    def restart(self, mode: str) -> None:
        """Begin a training or an evaluation."""
        self.sums[mode], self._skipped[mode] = {}, [0, 0]
        self.trainer.objective.restart(mode)

    @torch.no_grad()
    def add_batch(
        self, mode: str, outputs: Any, coalitions: Tensor, terms: dict[str, Tensor], labels: Any, counts: bool = True
    ) -> None:
        """Add the terms of a batch's loss, its coalition fit, and in training the spread of its logits.

        `coalitions` is (B, M, N), `terms` are means by name.
        """
        size = outputs.logits.shape[0]
        for name, term in terms.items():
            count = labels if name in _TASK else size
            self._add(mode, name, count * term, count, counts)
        values = (outputs.coalition_values, outputs.null_values, outputs.logits)
        self._add(mode, "coalition_fit", *coalition_fit(outputs.coalition_attributions, coalitions, *values), counts)
        if mode == "train" and not self.trainer.matching:
            # One image has no spread; its weight is 0, so that all processes sum up the same names.
            several = size if size > 1 else 0
            spread = outputs.logits.float().std(dim=0, correction=0).mean()
            self._add(mode, "logit_spread", several * spread, several, counts)

    def _add(self, mode: str, name: str, part: Tensor, total: Tensor | float, counts: bool) -> None:
        # A plain number is filled in on the device: bringing it there would halt it.
        total = total if isinstance(total, Tensor) else part.new_full((), total, dtype=torch.float32)
        added = torch.stack([part.detach().float(), total.detach().float()]) * float(counts)  # (2,)
        sums = self.sums[mode]
        sums[name] = sums[name] + added if name in sums else added

    def means(self, mode: str) -> dict[str, float]:
        """The quotients over batches and processes, where they are defined, and a fresh start."""
        sums, self.sums[mode] = self.sums[mode], {}
        if not sums:
            return {}
        accelerator, names = self.trainer.accelerator, sorted(sums)
        parts = accelerator.reduce(torch.stack([sums[name] for name in names]), reduction="sum").tolist()
        found = {name: part / total for name, (part, total) in zip(names, parts, strict=True) if total > 0}
        if "logit_spread" in found:
            self.warn_of_collapse(found.pop("logit_spread"))
        skips = self.trainer.args.corrupt_images == "skip"
        return {**found, "skipped_images": self._skipped_images(mode)} if skips else found

    def measured(self) -> dict[str, float]:
        """The means of an evaluation, with the loss that its terms add up to: images, and labels, count alike in all batches."""
        found, weights = self.means("eval"), self.trainer.objective.weights(training=False)
        terms = [weight * found[name] for name, weight in weights.items() if name in found]
        return {**found, "loss": sum(terms)} if terms else found

    def add_skipped(self, mode: str, read: int, images: int) -> None:
        """Count a batch of which some images could not be read."""
        self._skipped[mode][0] += images - read
        self._skipped[mode][1] += images

    def _skipped_images(self, mode: str) -> int:
        """How many images of all processes could not be read, and a fresh start."""
        counts = torch.tensor(self._skipped[mode], device=self.trainer.accelerator.device)  # (2,)
        self._skipped[mode] = [0, 0]
        skipped, images = self.trainer.accelerator.reduce(counts, reduction="sum").tolist()
        if images and skipped == images:
            raise ImageError(
                f"None of {images} images could be read. corrupt_images='fail' names the first and its fault."
            )
        return skipped

    def warn_of_collapse(self, spread: float) -> None:
        """Warn once, after the warm-up, if the logits hardly vary between images."""
        args, state = self.trainer.args, self.trainer.state
        warmed_up = args.shapley_weight > 0 and state.global_step >= args.shapley_warmup * state.max_steps
        # A single output is a regression, whose unit is the user's.
        constant = self.trainer.layer.classes > 1 and spread < _CONSTANT_SPREAD
        if self._collapse_warned or not warmed_up or not constant:
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
