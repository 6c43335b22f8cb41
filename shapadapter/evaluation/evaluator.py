"""Measure a wrapped model and its explanations on a data set, side by side with other methods."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from shapadapter.backbone import evaluation_view
from shapadapter.backbone.forward import check_options
from shapadapter.core.errors import ShapleyError
from shapadapter.core.statistics import Interval
from shapadapter.data.labels import LabelRules, known_labels
from shapadapter.evaluation.compared import Explainer
from shapadapter.evaluation.dataset import Batch, Rows
from shapadapter.evaluation.plan import BUDGETS, METHODS, Plan
from shapadapter.evaluation.result import Evaluation
from shapadapter.evaluation.study import study
from shapadapter.evaluation.summary import mean_of
from shapadapter.explanation.api import base_of, predictions
from shapadapter.explanation.game import active_layer


def task(model: nn.Module, rows: Rows, batch_size: int, options: dict[str, Any], progress: bool) -> dict[str, Tensor]:
    """Measures of each image, (R,) float64 each.

    Single label: `accuracy` and `cross_entropy`. Several labels: `accuracy` over the labels, at probability 0.5, and
    `cross_entropy`, the mean over them. Regression: `absolute_error` and `squared_error`. Without labels none of them;
    always `efficiency_gap`, the largest |null + sum of attributions - logit| of any class.
    """
    parts: list[dict[str, Tensor]] = []
    starts = range(0, len(rows), batch_size)
    for start in tqdm(starts, desc="Task", unit="batch", disable=not progress, leave=False):
        found = rows.batch(range(start, min(start + batch_size, len(rows))))
        for batch in predictions(model, found.inputs, None, None, None, None, batch_size, options):
            output = batch.output
            total = output.null_values.double() + output.attributions.double().sum(dim=1)  # (B, N, K) -> (B, K)
            gap = (total - output.logits.double()).abs().amax(dim=1)  # (B, K) -> (B,)
            parts.append({"efficiency_gap": gap.cpu(), **_scores(output.logits, found, batch.likelihood)})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _scores(logits: Tensor, found: Batch, likelihood: str) -> dict[str, Tensor]:
    """What labels say about logits (B, K), (B,) each; NaN where no label of an image is known."""
    if found.labels is None:
        return {}
    logits, labels = logits.double().cpu(), found.labels.cpu()
    known = known_labels(labels, likelihood == "none")  # (B,) or (B, K)
    if likelihood == "softmax":
        wanted = labels.where(known, 0).long()  # (B,)
        right = (logits.argmax(dim=1) == wanted).double()
        measures = {"accuracy": right, "cross_entropy": F.cross_entropy(logits, wanted, reduction="none")}
        return {name: values.where(known, torch.nan) for name, values in measures.items()}
    known, wanted = (values.view(len(labels), -1) for values in (known, labels.double()))  # (B, K) each
    if likelihood == "none":
        off = (logits - wanted).abs()  # (B, K)
        measures = {"absolute_error": off, "squared_error": off.square()}
    else:
        right = ((logits > 0) == (wanted > 0.5)).double()  # (B, K)
        loss = F.binary_cross_entropy_with_logits(logits, wanted.where(known, 0), reduction="none")
        measures = {"accuracy": right, "cross_entropy": loss}
    return {name: values.where(known, torch.nan).nanmean(dim=1) for name, values in measures.items()}


def groups_of(names: Sequence[Any]) -> Tensor:
    """Numbers for the values of a group column, whatever they are: (R,) int64."""
    known = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return torch.tensor([known[name] for name in names], device="cpu")


def evaluate(
    model: nn.Module,
    dataset: Any,
    processor: Any | None = None,
    *,
    methods: Sequence[str] | Mapping[str, str | Explainer] = METHODS,
    images: int = 32,
    truth_evaluations: int = 4096,
    budgets: Sequence[int] = BUDGETS,
    masks: str | None = None,
    groups: str | None = None,
    cache: str | Path | None = None,
    seed: int = 0,
    batch_size: int = 32,
    progress: bool = True,
    **options: Any,
) -> Evaluation:
    """Measure a wrapped model and its explanations: task, faithfulness, localisation, sanity and cost.

    Every method is measured on one game: the model's own removal operator, and as value the logit of the class that the
    model predicts. Task and efficiency gap are of all the data, everything else of `images` images.

    Args:
        model: a wrapped classifier; its training mode is left as it was.
        dataset: rows by index with `image` and `label` columns, or `pixel_values`, as the trainer takes them. Labels may
            be missing; those of a `ClassLabel` are mapped to the model's classes by name.
        processor: the image processor, or a collator of your own.
        methods: names that `attribute` knows, or your own by name: `explainer(model, images, targets=[class])` that
            returns an `Explanation`, e.g. `partial(attribute, method="kernel_shap", evaluations=1024)`, or
            `method(model, inputs, classes)` as `attribute` takes it. "shapadapter", "random" and "centre" are always there.
        images: how many images, drawn from the data, are explained.
        truth_evaluations: model evaluations of KernelSHAP per image as the truth, a multiple of 4. Up to 16 players the
            truth is exact, from all 2^N coalitions, whatever is said here; beyond, 16 N or more should be said.
        budgets: evaluations of KernelSHAP to compare with, even and rising, fewer than the truth's.
        masks: the column of pixel masks, not 0 on the object, as large as the images; by default "mask", if there is one.
        groups: the column that says which images belong together, for the intervals: one animal, one film.
        cache: a folder for what has been measured. A second run, with the same settings, model and images, does what is
            missing only. Your own functions are known by their names.
        seed: of all that is drawn. Results do not depend on `batch_size`, except by rounding.
        batch_size: images in a forward pass; of coalitions, 8 times as many.
        progress: whether to show progress bars.
        **options: further keyword arguments of the model's forward, e.g. `interpolate_pos_encoding=True`.

    Returns:
        The result, with `.table()`, `.metrics()`, `.figure()` and `.save(path)`.

    Raises:
        ShapleyError: the model matches images with texts, the data has no rows by index, a method is unknown or cannot
            be used on the model.
        TypeError: an option that neither this function nor the model's forward knows.
        ImageError: images that the model cannot take, or of several sizes.
        ValueError: numbers of images or evaluations that make no sense.
    """
    effort = {"images": images, "truth_evaluations": truth_evaluations, "batch_size": batch_size, "progress": progress}
    plan = Plan.of(methods, seed, options, budgets, **effort)
    check_model(model)
    check_options(model, options, evaluate)
    rows = Rows(dataset, processor, *label_rules(model))
    belong, found_masks = _groups(rows, groups), rows.masks(masks)
    # Not in the caller's inference mode: some methods ask for gradients.
    if any(module.training for module in model.modules()):
        model = copy.deepcopy(model).eval()  # not a view, of which the measures could make no copies of their own
    with torch.inference_mode(False), torch.no_grad():
        found = task(model, rows, batch_size, options, progress)
        result = study(model, rows, plan, found_masks, belong, cache)
    means = {name: mean_of(values, belong, seed) for name, values in found.items()}
    means = {name: mean for name, mean in means.items() if mean.count}  # none where no label is known
    gaps = found["efficiency_gap"]
    largest = Interval(float(gaps.max()), float("nan"), float("nan"), len(gaps))
    return replace(result, task={**means, "largest_efficiency_gap": largest})


def check_model(model: nn.Module) -> None:
    """Refuse what cannot be evaluated.

    Raises:
        ShapleyError: no wrapped model, or one that matches images with texts.
    """
    if active_layer(model).anatomy.kind == "matching":
        raise ShapleyError(
            f"{type(base_of(model)).__name__} matches images with texts; evaluate takes classifiers. For a matching model "
            "there is retrieval_after_deletion(model, images, texts, processor)."
        )


def label_rules(model: nn.Module) -> tuple[dict[int, str] | None, LabelRules]:
    """The names of the model's classes, by index, if it has any, and what labels may be."""
    config = getattr(base_of(model), "config", None)
    rules = LabelRules(active_layer(model).classes, getattr(config, "problem_type", None))
    return getattr(config, "id2label", None), rules


def _groups(rows: Rows, column: str | None) -> Tensor | None:
    if column is None:
        return None
    if not rows.has(column):
        raise ShapleyError(f"The data has no column {column!r} for groups.")
    return groups_of(rows.column(column, range(len(rows))))


@dataclass(frozen=True)
class Evaluator:
    """Faithfulness of the one-pass attributions as plain numbers: `ShapleyTrainer(..., evaluator=Evaluator(images=16))`.

    The trainer calls it at the end of each evaluation and puts its numbers among the `eval_*`. So
    `metric_for_best_model="eval_error", greater_is_better=False` keeps the checkpoint that explains best. Task measures
    are the trainer's; sanity, ROAD, montages and cost are left to `evaluate`.

    Attributes:
        images: how many images are explained, always the same ones.
        truth_evaluations: as for `evaluate`; up to 16 players the truth is exact.
        budgets: as for `evaluate`.
        masks: as for `evaluate`.
        seed: as for `evaluate`.
        batch_size: as for `evaluate`.
        options: further keyword arguments of the model's forward.
    """

    images: int = 16
    truth_evaluations: int = 2048
    budgets: Sequence[int] = (128, 256, 512, 1024)
    masks: str | None = None
    seed: int = 0
    batch_size: int = 32
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, model: nn.Module, dataset: Any, processor: Any | None = None) -> dict[str, float]:
        """Measure.

        Args:
            model: a wrapped classifier.
            dataset: rows by index.
            processor: the image processor, or a collator.

        Returns:
            `error`, `spearman`, `equivalent_evaluations`, `insertion`, `deletion`, ...: as `Evaluation.metrics`.

        Raises:
            ShapleyError: as `evaluate`.
        """
        check_model(model)
        plan = Plan.of(
            (),
            self.seed,
            dict(self.options),
            self.budgets,
            images=self.images,
            truth_evaluations=self.truth_evaluations,
            batch_size=self.batch_size,
            progress=False,
            thorough=False,
        )
        rows = Rows(dataset, processor, *label_rules(model))
        with torch.no_grad():
            return study(evaluation_view(model), rows, plan, rows.masks(self.masks), None, None).metrics()
