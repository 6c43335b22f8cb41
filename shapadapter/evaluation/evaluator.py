"""Measure a wrapped model and its explanations on a data set, side by side with other methods."""

from __future__ import annotations

import copy
import io
import math
import warnings
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
from shapadapter.core.errors import CheckpointError, ImageError, ShapleyError
from shapadapter.core.files import refuse_link, write_together
from shapadapter.core.statistics import Interval
from shapadapter.data.classes import class_names
from shapadapter.data.labels import LabelRules, known_labels
from shapadapter.evaluation.cost import costs
from shapadapter.evaluation.dataset import Rows, choose, labelled_images
from shapadapter.evaluation.equal_cost import CostPoint, cost_points, smoothness
from shapadapter.evaluation.localization import play_montages
from shapadapter.evaluation.measure import Measurer
from shapadapter.evaluation.plan import BUDGETS, METHODS, ONE_PASS, Explainer, Plan, check_known
from shapadapter.evaluation.records import Means, Record, Records
from shapadapter.evaluation.result import Evaluation
from shapadapter.explanation.game import active_layer
from shapadapter.explanation.passes import base_of, predictions

_IMAGES_TIMED = 8
"""How many images the cost of the one pass is measured on."""

_IMAGES_TOGETHER = 32
"""Of so many images in a forward pass, one is measured at a time: it brings thousands of coalitions."""


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
    cost_curve: bool = False,
    seed: int = 0,
    batch_size: int = 32,
    progress: bool = True,
    **options: Any,
) -> Evaluation:
    """Measure a wrapped model and its explanations: task, faithfulness, localization, sanity and cost.

    All methods are measured on one game: the model's own removal operator, and the logit of the class that it predicts.
    Task and efficiency gap are of all the data, everything else of `images` images drawn from it.

    Args:
        model: a wrapped classifier; its training mode is left as it was.
        dataset: rows by index with `image` (or `pixel_values`), and `label` if known, as the trainer takes them. Labels
            of a `ClassLabel` are mapped to the model's classes by name.
        processor: the image processor, or a collator of your own.
        methods: names that `attribute` knows, or your own by name: `explainer(model, images, targets=[class])` that
            returns an `Explanation`, or `method(model, inputs, classes)` as `attribute` takes it. "shapadapter",
            "random" and "centre" are always there.
        images: how many are explained.
        truth_evaluations: of KernelSHAP as the truth, a multiple of 4, better 16 N or more; exact up to N = 16 players.
        budgets: evaluations of KernelSHAP to compare with, even and rising, fewer than the truth's.
        masks: the column of pixel masks (not 0 on the object, as large as the images), "mask" if there is one.
        groups: the column that says which images belong together, for the intervals: one animal, one film.
        cache: a folder for what has been measured; a second run does what is missing. Functions are known by name.
        cost_curve: whether errors are measured against cost as well, with each of the budgets: `Evaluation.cost_curve`.
        seed: of all that is drawn. Results do not depend on `batch_size`, except by rounding.
        batch_size: images in a forward pass; of coalitions, 8 times as many.
        progress: whether to show progress bars.
        **options: further keyword arguments of the model's forward, e.g. `interpolate_pos_encoding=True`.

    Raises:
        ShapleyError: a model, data or a method that cannot be used.
        TypeError: an option that neither this function nor the model's forward knows.
        ImageError: images that the model cannot take, or of several sizes.
        ValueError: numbers of images or evaluations that make no sense.
    """
    effort = {"images": images, "truth_evaluations": truth_evaluations, "batch_size": batch_size, "progress": progress}
    plan = Plan.of(methods, seed, options, budgets=tuple(budgets), cost_curve=cost_curve, **effort)
    check_options(_checked(model), options, evaluate)
    rows = Rows(dataset, processor, *_label_rules(model))
    grouped, masked = rows.groups(groups), rows.masks(masks)
    if any(module.training for module in model.modules()):
        model = copy.deepcopy(model).eval()  # not a view, of which the measures could make no copies of their own
    # Not in the caller's inference mode: some methods ask for gradients.
    with torch.inference_mode(False), torch.no_grad():
        task = _task(model, rows, plan, grouped)
        return replace(_study(model, rows, plan, masked, grouped, cache), task=task)


def _checked(model: nn.Module) -> nn.Module:
    """The model, if it can be evaluated."""
    if active_layer(model).anatomy.kind == "matching":
        raise ShapleyError(
            f"{type(base_of(model)).__name__} matches images with texts; evaluate takes classifiers. For a matching model "
            "there is retrieval_after_deletion(model, images, texts, processor)."
        )
    return model


def _label_rules(model: nn.Module) -> tuple[dict[int, str] | None, LabelRules]:
    """The names of the model's classes, by index, if it has any, and what labels may be."""
    config = getattr(base_of(model), "config", None)
    rules = LabelRules(active_layer(model).classes, getattr(config, "problem_type", None))
    return getattr(config, "id2label", None), rules


# -- the task, on all the data ---------------------------------------------------------------------------------------


def _task(model: nn.Module, rows: Rows, plan: Plan, groups: Tensor | None) -> dict[str, Interval]:
    """The efficiency gap, |null + sum of attributions - logit| of the worst class, and what the labels say."""
    parts: list[dict[str, Tensor]] = []
    starts = range(0, len(rows), plan.batch_size)
    for start in tqdm(starts, desc="Task", unit="batch", disable=not plan.progress, leave=False):
        inputs, labels = rows.batch(range(start, min(start + plan.batch_size, len(rows))))
        (batch,) = predictions(model, inputs, None, None, None, None, plan.batch_size, plan.options)
        output = batch.output
        total = output.null_values.double() + output.attributions.double().sum(dim=1)  # (B, N, K) -> (B, K)
        gap = (total - output.logits.double()).abs().amax(dim=1)  # (B, K) -> (B,)
        parts.append({"efficiency_gap": gap.cpu(), **_scores(output.logits, labels, batch.likelihood)})
    values = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}  # (R,) each
    means = {name: Means(groups, plan.seed).of_columns(column[:, None])[0] for name, column in values.items()}
    gaps = values["efficiency_gap"]
    largest = Interval(float(gaps.max()), math.nan, math.nan, len(gaps))
    known = {name: mean for name, mean in means.items() if mean.count}  # none where no label is known
    return {**known, "largest_efficiency_gap": largest}


def _scores(logits: Tensor, labels: Tensor | None, likelihood: str) -> dict[str, Tensor]:
    """What labels say about logits (B, K), (B,) each; NaN where no label of an image is known.

    Of several labels the mean over them, the accuracy at probability 0.5.
    """
    if labels is None:
        return {}
    logits, labels = logits.double().cpu(), labels.cpu()
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


# -- the explanations, on some of it ---------------------------------------------------------------------------------


def _study(
    model: nn.Module, rows: Rows, plan: Plan, masks: str | None, groups: Tensor | None, cache: str | Path | None
) -> Evaluation:
    """Choose rows, measure each or find its record, and sum up: everything but the task."""
    chosen = choose(len(rows), plan.images, plan.seed)
    kept = Records(cache, plan.settings(model, masks), model)
    records = _measured(Measurer(model, rows, plan, masks), kept, chosen)
    own = None if groups is None else groups[torch.tensor(chosen, device="cpu")]
    means = Means(own, plan.seed)
    methods, notes, points = means.of_methods(records), list[str](), tuple[CostPoint, ...]()
    if plan.thorough:  # what is not measured image by image
        montages, reason = play_montages(model, rows, plan, kept, records)
        few = plan.predict(model, rows.batch(chosen[:_IMAGES_TIMED]).inputs)
        played = Means(None, plan.seed).of_methods([record for record in montages if record["methods"]])
        for name, values in (*played.items(), *costs(model, plan, few).items()):
            methods[name].update(values)
        notes += [] if reason is None else [reason]
        points = cost_points(model, plan, few, records, means) if plan.cost_curve else ()
    truth = sum(record["truth_error"] for record in records) / len(records)
    notes += _doubts(truth, methods[ONE_PASS].get("error"), math.prod(records[0]["players"]))
    equivalents = {name: means.equivalent(records, name, plan.budgets) for name in plan.names}
    counts = {
        "data": len(rows),
        "images": len(chosen),
        "groups": None if own is None else len(own.unique()),
        "truth_error": truth,
        "area": means.of_columns([[one["area"]] for one in records])[0].mean if "area" in records[0] else None,
    }
    return Evaluation(
        about={**plan.about(model, plan.predict(model, rows.batch(chosen[:1]).inputs)), **counts},
        task={},
        methods=methods,
        kernel_shap=means.of_names([dict(zip(plan.budgets, one["kernel_shap"], strict=True)) for one in records]),
        equivalents={name: found for name, found in equivalents.items() if found is not None},
        curves=means.of_curves(records),
        notes=tuple(notes),
        cost_curve=points,
        smoothness=smoothness(records, means),
    )


def _measured(measurer: Measurer, kept: Records, chosen: Sequence[int]) -> list[Record]:
    """The record of every chosen row, from the disk or measured now."""
    plan = measurer.plan
    names = {index: measurer.name_of(index) for index in chosen} if kept.folder is not None else {}
    known = {index: kept.find(name) for index, name in names.items()}
    found = {index: record for index, record in known.items() if record is not None}
    missing = [index for index in chosen if index not in found]
    together = max(1, plan.batch_size // _IMAGES_TOGETHER)
    with tqdm(total=len(chosen), initial=len(found), desc="Images", unit="image", disable=not plan.progress) as bar:
        for start in range(0, len(missing), together):
            part = missing[start : start + together]
            for index, record in zip(part, measurer.records(part), strict=True):
                found[index] = record
                kept.keep(names.get(index, ""), record)
            grids = sorted({tuple(record["players"]) for record in found.values()})
            if len(grids) > 1:  # the curves have no mean
                raise ImageError(
                    f"Expected images of one size, got {grids} players. Resize them, or evaluate them apart."
                )
            bar.update(len(part))
    return [found[index] for index in chosen]


def _doubts(truth: float, own: Interval | None, players: int) -> list[str]:
    """Warn of a truth whose error is more than half of the one pass's, the relative L2 errors being `truth` and `own`."""
    if own is None or truth <= own.mean / 2:
        return []
    words = (
        f"The truth's own error, {truth:.2g}, is more than half of the one pass's, {own.mean:.2g}: errors and equivalents "
        f"say little. Pass more truth_evaluations, 16 for each player or more: {16 * players}."
    )
    warnings.warn(words, stacklevel=4)
    return [words]


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
        """Measure a wrapped classifier on rows by index, with the image processor, or a collator.

        Returns:
            `error`, `spearman`, `equivalent_evaluations`, `insertion`, `deletion`, ...: as `Evaluation.metrics`.

        Raises:
            ShapleyError: as `evaluate`.
        """
        rows = Rows(dataset, processor, *_label_rules(_checked(model)))
        effort = {"truth_evaluations": self.truth_evaluations, "budgets": tuple(self.budgets), "images": self.images}
        quick = {"batch_size": self.batch_size, "progress": False, "thorough": False}
        plan = Plan.of((), self.seed, dict(self.options), **effort, **quick)
        with torch.no_grad():
            return _study(evaluation_view(model), rows, plan, rows.masks(self.masks), None, None).metrics()


# -- a folder of images: what the command line does ------------------------------------------------------------------


def check_run(data: Path, masks: Path | None, methods: Sequence[str], output: Path | None, checkpoint: str) -> None:
    """Refuse what `evaluate_folder` cannot do, before a model is loaded: also a folder with another adapter's evaluation."""
    for folder in (data, masks):
        if folder is not None and not folder.is_dir():
            raise ShapleyError(f"There is no folder {folder}.")
    for name in methods:
        check_known(name)
    if output is None:
        return
    file = output / "evaluation.json"
    try:
        other = Evaluation.load(file).about.get("checkpoint") if file.exists() else None
    except CheckpointError as error:
        raise CheckpointError(f"{error} Move it away, or choose another --output.") from error
    if other is not None and Path(other).resolve() != Path(checkpoint).resolve():
        raise ShapleyError(f"{output} holds the evaluation of {other}. Choose another --output for {checkpoint}.")
    refuse_link(output / "records", output)


def evaluate_folder(
    model: nn.Module,
    processor: Any,
    data: Path,
    masks: Path | None,
    methods: Sequence[str],
    output: Path | None,
    about: Mapping[str, Any],
    **settings: Any,
) -> Evaluation:
    """Evaluate on a folder with a subfolder of images for each class, and masks at the same places in another.

    Writes `evaluation.json`, with `about` in it, `table.md`, `curves.png`, `cost_curve.png` if that was measured, and the
    records with which an interrupted run goes on, to `output`; nothing without.
    """
    config: Any = model.config
    rows = labelled_images(data, list(class_names(config.id2label, active_layer(model).classes)), masks)
    cache = None if output is None else output / "records"
    result = evaluate(model, rows, processor, methods=methods or METHODS, cache=cache, **settings)
    result = replace(result, about={**result.about, **about})
    if output is not None:
        figures = {"curves.png": result.figure()}
        if result.cost_curve:
            figures["cost_curve.png"] = result.cost_figure()
        result.save(output / "evaluation.json")
        drawn = {output / name: _png(figure) for name, figure in figures.items()}
        write_together({output / "table.md": result.markdown().encode(), **drawn})
    return result


def _png(figure: Any) -> bytes:
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()
