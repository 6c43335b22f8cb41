"""Measure a wrapped model and its explanations on a data set, side by side with other methods."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shapadapter.errors import ShapleyError
from shapadapter.explaining import base_of
from shapadapter.game import active_layer
from shapadapter.labels import LabelRules
from shapadapter.metrics import Interval
from shapadapter.options import check_options

from .data import Rows
from .methods import Explainer
from .plan import BUDGETS, METHODS, Plan
from .result import Evaluation
from .study import study
from .summary import mean_of
from .task import groups_of, task


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
