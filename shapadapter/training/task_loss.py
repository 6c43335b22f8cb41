"""The task loss where classes have weights, labels are smoothed or an image has several of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shapadapter.adapter import ShapleyLayer
from shapadapter.core.errors import ShapleyError
from shapadapter.data.labels import LABEL_COLUMNS, LabelRules, known_labels
from shapadapter.training.arguments import ShapleyTrainingArguments
from shapadapter.training.validation import labels_of

# Training arguments that say what the task loss is, of one class for each image.
_OPTIONS = ("class_weights", "label_smoothing_factor", "mixup_alpha", "cutmix_alpha")


@dataclass
class SoftTask:
    """Cross-entropy with weighted classes and soft labels.

    It is the sum over images of `-sum_k w_k q_k log p_k`, divided by the number of those whose label is known (a mixed
    picture counts for the share whose label is) and not by the sum of their weights: so micro-batches add up to the whole
    batch. With weights of 1 and one class for an image it is the usual cross-entropy.

    Attributes:
        weights: (K,) of the classes, None for 1.
        smoothing: share of each label that is spread evenly over all classes.
    """

    weights: Tensor | None = None
    smoothing: float = 0.0

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of logits (B, K) on class indices (B,) or shares of classes (B, K)."""
        targets = as_shares(labels, logits.shape[-1])  # (B, K)
        mass = targets.sum(dim=1, keepdim=True)  # (B, 1), 0 for an image without a label
        targets = (1 - self.smoothing) * targets + self.smoothing * mass / logits.shape[-1]
        if self.weights is not None:
            self.weights = self.weights.to(logits.device)
            targets = targets * self.weights
        losses = -(targets * logits.float().log_softmax(dim=-1)).sum(dim=1)  # (B,)
        known = mass.sum()
        return losses.sum() / known.where(known > 0, 1)


def as_shares(labels: Tensor, classes: int) -> Tensor:
    """Class indices (B,) as shares (B, K) of 0 and 1, all 0 where they are not known; shares as they are."""
    if labels.ndim == 2:
        return labels
    known = known_labels(labels, quantities=False)  # (B,)
    return torch.nn.functional.one_hot(labels.where(known, 0), classes) * known[:, None].float()  # (B, K)


def soft_task(
    args: ShapleyTrainingArguments,
    layer: ShapleyLayer,
    problem: str | None,
    dataset: Any,
    names: Mapping[int, str] | None,
    own_loss: Any,
) -> SoftTask | None:
    """The task loss of a training with weighted classes, smoothed labels or mixed images; else None: the base model's.

    Args:
        args: of the training.
        layer: of the wrapped model.
        problem: the base model's `problem_type`.
        dataset: the training data.
        names: of the classes, by index.
        own_loss: the user's `compute_loss_func`, or None.

    Raises:
        ShapleyError: the task is not one class for each image, or its loss is the user's; and as `class_weights`.
    """
    asked = [name for name in _OPTIONS if getattr(args, name)]
    if not asked:
        return None
    what = " and ".join(asked)
    several = problem in ("regression", "multi_label_classification") or layer.classes == 1
    if several or layer.anatomy.kind == "matching":
        raise ShapleyError(
            f"{what}: only for one class for each image, not for {_other(layer, problem)}. Leave it out."
        )
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


def _other(layer: ShapleyLayer, problem: str | None) -> str:
    if layer.anatomy.kind == "matching":
        return "a model that matches images with texts"
    return "several labels" if problem == "multi_label_classification" else "regression"


def check_labels(labels: Tensor) -> None:
    """Refuse labels that are not one class for each image.

    Raises:
        ShapleyError: they are quantities or several labels.
    """
    if labels.ndim != 1 or labels.is_floating_point():
        raise ShapleyError(
            f"{', '.join(_OPTIONS)}: expected labels that are the number of a class, one for each image, got "
            f"{labels.dtype} of shape {tuple(labels.shape)}. Leave them out for regression and several labels."
        )


def class_weights(
    wanted: Sequence[float] | str, dataset: Any, classes: int, names: Mapping[int, str] | None
) -> Tensor:
    """The weights (K,) of the classes, as given or by the labels of the training data.

    Balanced ones are `n / (K * n_k)` for `n_k` of `n` images in class k (King & Zeng 2001; as in scikit-learn), so that
    their mean over the images is 1.

    Raises:
        ShapleyError: another number of weights than classes; or labels that cannot be counted, or not of all classes.
    """
    if not isinstance(wanted, str):
        if len(wanted) != classes:
            raise ShapleyError(f"class_weights has {len(wanted)} numbers; the model has {classes} classes.")
        return torch.tensor(wanted, dtype=torch.float32, device="cpu")
    counts = _counts(dataset, classes)
    missing = np.flatnonzero(counts[:classes] == 0).tolist()
    if missing:
        shown = ", ".join(str((names or {}).get(index, index)) for index in missing[:10])
        raise ShapleyError(
            f"class_weights='balanced' divides by the images of each class, and {len(missing)} of {classes} classes have "
            f"none in the training data: {shown}. Pass class_weights as a list of {classes} numbers."
        )
    return torch.from_numpy(counts.sum() / (classes * counts)).float()


def _counts(dataset: Any, classes: int) -> np.ndarray:
    """How many images of each class a data set has, (K,), without reading them."""
    found = labels_of(dataset, LABEL_COLUMNS)
    if found is None or LabelRules(classes).kind(np.ndim(found[1]) > 1) != "class":
        raise ShapleyError(
            "class_weights='balanced' counts the labels of a datasets.Dataset, or a list of rows, with a column of class "
            f"numbers named one of {LABEL_COLUMNS}; got {type(dataset).__name__}. Pass class_weights as a list of numbers."
        )
    column, values = found
    rows: list[Any] = [{}] * len(values)
    labels = LabelRules(classes, "single_label_classification").collated(values, column, rows)  # (n,)
    return np.bincount(labels[labels >= 0].numpy(), minlength=classes)
