"""The objective on a micro-batch: what is drawn for it, the task loss with soft labels, and how much a batch counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shapadapter.adapter import ShapleyLayer
from shapadapter.adapter.answer import ShapleyOutput, task_loss
from shapadapter.backbone import Tiling
from shapadapter.core.errors import ShapleyError
from shapadapter.core.losses import shapley_loss_of_sums, warmup_weight
from shapadapter.core.shapley import sample_pairs
from shapadapter.core.statistics import generator_of
from shapadapter.data.labels import LABEL_COLUMNS, LabelRules, known_labels
from shapadapter.data.rows import readable_rows
from shapadapter.training.arguments import ShapleyTrainingArguments
from shapadapter.training.validation import labels_of

# What is drawn, by the number that keeps its random numbers apart from the others'.
_DRAWN = {"eval": 0, "train": 1, "mix": 2}

# Training arguments that say what the task loss is, of one class for each image.
_OPTIONS = ("class_weights", "label_smoothing_factor", "mixup_alpha", "cutmix_alpha")


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
        marked, (inputs, read, images) = "readable" in inputs, readable_rows(inputs)
        if marked and trainer.counting:
            trainer.monitor.skipped.add("train" if training else "eval", read, images)
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
            if self.soft_task is not None:
                check_labels(inputs["labels"])
            known = (read > 0) * labelled.count(inputs)
            if training and trainer.compute_loss_func is None:
                whole = known + (images - read) * inputs["labels"][0].numel() if in_step is None else in_step
                say = known / torch.as_tensor(whole, device=known.device).clamp(min=1e-3)
        if training and max(trainer.args.mixup_alpha, trainer.args.cutmix_alpha) > 0:
            tiling, alphas = trainer.layer.tiling(**inputs), (trainer.args.mixup_alpha, trainer.args.cutmix_alpha)
            mix = draw_mix(len(inputs["pixel_values"]), tiling.players, alphas, self.key("mix"))
            if labels is not None:
                inputs = {**inputs, "labels": mix_labels(inputs["labels"], mix, trainer.layer.classes)}
            inputs = {**inputs, "pixel_values": mix_pictures(inputs["pixel_values"], mix, tiling)}
        return inputs, Shares(share, say, known)

    def key(self, kind: str) -> tuple[int, ...]:
        """Of the next draw, by seed, step, micro-step and rank alone: a resumed run repeats it."""
        step = 0 if kind == "eval" else self.trainer.state.global_step
        last, number = self._drawn.get(kind, (step, -1))
        self._drawn[kind] = step, number + 1 if last == step else 0
        return self.trainer.args.seed, _DRAWN[kind], *self._drawn[kind], self.trainer.args.process_index

    def restart(self, *kinds: str) -> None:
        """Begin a training or an evaluation."""
        for kind in kinds:
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


@dataclass
class SoftTask:
    """Cross-entropy with weighted classes and soft labels.

    It is the sum over images of `-sum_k w_k q_k log p_k`, divided by the number of those whose label is known (a mixed
    image counts for the share whose label is) and not by the sum of their weights: so micro-batches add up to the whole
    batch. With weights of 1 and one class for an image it is the usual cross-entropy.

    Attributes:
        weights: (K,) of the classes, None for 1.
        smoothing: share of each label that is spread evenly over all classes.
    """

    weights: Tensor | None = None
    smoothing: float = 0.0

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of logits (B, K) on class indices (B,) or shares of classes (B, K)."""
        targets = _as_shares(labels, logits.shape[-1])  # (B, K)
        mass = targets.sum(dim=1, keepdim=True)  # (B, 1), 0 for an image without a label
        targets = (1 - self.smoothing) * targets + self.smoothing * mass / logits.shape[-1]
        if self.weights is not None:
            self.weights = self.weights.to(logits.device)
            targets = targets * self.weights
        losses = -(targets * logits.float().log_softmax(dim=-1)).sum(dim=1)  # (B,)
        known = mass.sum()
        return losses.sum() / known.where(known > 0, 1)


def _as_shares(labels: Tensor, classes: int) -> Tensor:
    """Class indices (B,) as shares (B, K) of 0 and 1, all 0 where they are not known; shares as they are."""
    if labels.ndim == 2:
        return labels
    known = known_labels(labels, quantities=False)  # (B,)
    return torch.nn.functional.one_hot(labels.where(known, 0), classes) * known[:, None].float()  # (B, K)


def soft_task(
    args: ShapleyTrainingArguments,
    layer: ShapleyLayer,
    rules: LabelRules | None,
    dataset: Any,
    names: Mapping[int, str] | None,
    own_loss: Any,
) -> SoftTask | None:
    """The task loss where one of `_OPTIONS` is on, None for the base model's; `own_loss` is the user's, or None."""
    asked = [name for name in _OPTIONS if getattr(args, name)]
    if not asked:
        return None
    what, problem, other = " and ".join(asked), rules and rules.problem, None
    if layer.anatomy.kind == "matching":
        other = "a model that matches images with texts"
    elif problem == "multi_label_classification":
        other = "several labels"
    elif problem == "regression" or layer.classes == 1:
        other = "regression"
    if other is not None:
        raise ShapleyError(f"{what}: only for one class for each image, not for {other}. Leave it out.")
    if layer.anatomy.family.patches and max(args.mixup_alpha, args.cutmix_alpha) > 0:
        raise ShapleyError(
            "mixup_alpha and cutmix_alpha: this model takes images of many shapes as patches, which are not mixed. Set them "
            "to 0."
        )
    if own_loss is not None:
        raise ShapleyError(f"{what} and compute_loss_func both say what the task loss is. Leave one of them out.")
    weights = None
    if args.class_weights is not None:
        weights = class_weights(args.class_weights, dataset, layer.classes, names)
    return SoftTask(weights, args.label_smoothing_factor)


def check_labels(labels: Tensor) -> None:
    """Refuse labels that are quantities, or several for an image, where `_OPTIONS` want one class for each."""
    if labels.ndim != 1 or labels.is_floating_point():
        raise ShapleyError(
            f"{', '.join(_OPTIONS)}: expected labels that are the number of a class, one for each image, got "
            f"{labels.dtype} of shape {tuple(labels.shape)}. Leave them out for regression and several labels."
        )


def class_weights(
    wanted: Sequence[float] | str, dataset: Any, classes: int, names: Mapping[int, str] | None
) -> Tensor:
    """The weights (K,) of the classes, as given, or `n / (K * n_k)` for `n_k` of `n` training images in class k.

    So their mean over the images is 1 (King & Zeng 2001; as in scikit-learn).
    """
    if not isinstance(wanted, str):
        if len(wanted) != classes:
            raise ShapleyError(f"class_weights has {len(wanted)} numbers; the model has {classes} classes.")
        return torch.tensor(wanted, dtype=torch.float32, device="cpu")
    found = labels_of(dataset, LABEL_COLUMNS)
    if found is None or LabelRules(classes).kind(np.ndim(found[1]) > 1) != "class":
        raise ShapleyError(
            "class_weights='balanced' counts the labels of a datasets.Dataset, or a list of rows, with a column of class "
            f"numbers named one of {LABEL_COLUMNS}; got {type(dataset).__name__}. Pass class_weights as a list of numbers."
        )
    column, values = found
    rows: list[Any] = [{}] * len(values)
    labels = LabelRules(classes, "single_label_classification").collated(values, column, rows)  # (n,)
    counts = np.bincount(labels[labels >= 0].numpy(), minlength=classes)  # (K,)
    missing = np.flatnonzero(counts[:classes] == 0).tolist()
    if missing:
        shown = ", ".join(str((names or {}).get(index, index)) for index in missing[:10])
        raise ShapleyError(
            f"class_weights='balanced' divides by the images of each class, and {len(missing)} of {classes} classes have "
            f"none in the training data: {shown}. Pass class_weights as a list of {classes} numbers."
        )
    return torch.from_numpy(counts.sum() / (classes * counts)).float()


@dataclass(frozen=True)
class Mix:
    """How the images of one micro-batch are mixed.

    Attributes:
        partners: (B,) which image is mixed in.
        share: of the own image, 0 to 1.
        box: (top, left, height, width) in players of the part that is the partner's; None to blend all pixels.
    """

    partners: Tensor
    share: float
    box: tuple[int, int, int, int] | None


def draw_mix(images: int, players: tuple[int, int], alphas: tuple[float, float], key: tuple[int, ...]) -> Mix:
    """Draw a mix of B images: the share from Beta(alpha, alpha), mixup or cutmix with equal chances where both are on.

    A cutmix box has about the share of players (rows, cols) that Beta says, and the label's share is the one it really has.
    """
    generator = np.random.default_rng(np.random.SeedSequence(key))
    cuts = bool(generator.integers(2)) if min(alphas) > 0 else alphas[1] > 0
    share = float(generator.beta(alphas[cuts], alphas[cuts]))
    partners = torch.from_numpy(generator.permutation(images))  # (B,)
    if not cuts:
        return Mix(partners, share, None)
    side = (1 - share) ** 0.5
    height, width = (round(side * length) for length in players)
    top, left = (
        int(generator.integers(0, length - part + 1)) for length, part in zip(players, (height, width), strict=True)
    )
    return Mix(partners, 1 - height * width / (players[0] * players[1]), (top, left, height, width))


def mix_pictures(pixels: Tensor, mix: Mix, tiling: Tiling) -> Tensor:
    """The mixed images (B, C, H, W): mixup (Zhang et al. 2018) blends, cutmix (Yun et al. 2019) puts in whole players."""
    others = pixels[mix.partners.to(pixels.device, non_blocking=True)]  # (B, C, H, W)
    if mix.box is None:
        return mix.share * pixels + (1 - mix.share) * others
    (top, left, height, width), (rows, cols) = mix.box, tiling.players
    down, up = (round(row * tiling.seen[0] / rows) for row in (top, top + height))
    start, end = (round(col * tiling.seen[1] / cols) for col in (left, left + width))
    mixed = pixels.clone()
    mixed[..., down:up, start:end] = others[..., down:up, start:end]
    return mixed


def mix_labels(labels: Tensor, mix: Mix, classes: int) -> Tensor:
    """What is in the mixed images: class indices (B,) to shares (B, K)."""
    shares = _as_shares(labels, classes)  # (B, K)
    return mix.share * shares + (1 - mix.share) * shares[mix.partners.to(labels.device, non_blocking=True)]
