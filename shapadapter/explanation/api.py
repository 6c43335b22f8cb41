"""Explain images with a wrapped model: one forward pass each, and more evaluations if asked for."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn
from tqdm.auto import tqdm

from shapadapter.backbone import evaluation_view
from shapadapter.backbone.forward import check_options
from shapadapter.explanation.explanation import Explanation
from shapadapter.explanation.game import BatchGame, active_layer
from shapadapter.explanation.passes import embed_texts, join, one_pass, predictions
from shapadapter.explanation.presence import LEVEL, gradient_level, pays_off
from shapadapter.explanation.refine import UNTIL, Plan, refined

__all__ = ["embed_texts", "explain"]


def explain(
    model: nn.Module,
    images: Any,
    processor: Any | None = None,
    *,
    texts: Sequence[str] | str | None = None,
    top_k: int | None = None,
    targets: Sequence[str | int] | str | int | None = None,
    batch_size: int = 32,
    refine: int | Literal["until", "gradient"] = 0,
    relative_error: float | None = None,
    max_refine: int | None = None,
    seed: int = 0,
    **options: Any,
) -> Explanation:
    """Predict and explain images in one forward pass each, or with `refine` in more, which come nearer.

    Args:
        model: a wrapped model; its training mode is left as it was.
        images: one image or many, in a list, generator or data set, as `shapadapter.data.images.open_image` takes them; or,
            without a processor, prepared pixel values (C, H, W) or (B, C, H, W), or all that a processor returned.
        processor: the image processor the model was trained with; with texts, the processor of both.
        texts: for a model that matches images with texts: what takes the place of classes. Logits are similarities then.
        top_k: keep the maps of the k likeliest classes of each image; all classes by default.
        targets: keep the maps of these classes (names or indices) instead.
        batch_size: images in a forward pass; of the coalitions of `refine`, which are smaller, eight times as many.
        refine: "gradient", a backward pass for each shown class: the mean of what the head says and of the gradient by the
            patches' presence (`shapadapter.explanation.presence`). Or further evaluations for each image, an even number, or
            "until" for as many as `relative_error` takes: gradients, a backward pass of which counts as 1.75, and coalitions
            (`shapadapter.core.estimates`), these alone where patches are removed in the pixels or the gradients of all shown
            classes are too dear; from 2^N - 2 on the attributions are exact. All have standard errors.
        relative_error: with "until", the expected relative L2 error of each shown map of an image that is done; default 0.1.
        max_refine: with "until", the most evaluations for an image, 4,096 by default; a warning says how many are not done.
        seed: of the coalitions. They depend on it and on the image's place among the images, not on `batch_size`.
        **options: further keyword arguments of the model's forward, e.g. `interpolate_pos_encoding=True`.

    Raises:
        ImageError: no image, an unreadable one, or one of a kind the model cannot take.
        ClassNotFoundError: a target the model does not have.
        ShapleyError: no adapter is active; texts are missing, too long, or of no use; no gradient reaches the patches.
        ValueError, TypeError: arguments that exclude each other, are out of range, or that nothing here knows.
    """
    layer, plan = active_layer(model), Plan.of(refine, relative_error, max_refine, seed)
    check_options(model, options, explain)
    model, parts = evaluation_view(model), list[Explanation]()
    bar = tqdm(desc="refining", unit=" evaluations", delay=5, leave=False, disable=plan is None)
    graph: Any = True if refine == LEVEL else "try" if plan is not None and pays_off(layer) else False
    # Inference mode forbids gradients, also the caller's.
    with torch.inference_mode(not graph), torch.no_grad(), bar:
        for batch in predictions(model, images, processor, texts, top_k, targets, batch_size, options, graph):
            part = gradient_level(one_pass(batch), batch) if refine == LEVEL else one_pass(batch)
            if plan is not None:
                game = BatchGame(model, batch.inputs, batch.classes, batch_size, bar.update)
                part = refined(part, game, plan, sum(map(len, parts)), batch)
            parts.append(part)
    found = join(parts)
    if plan is not None and refine == UNTIL:
        _warn_of_errors(found, plan)
    return found


def _warn_of_errors(explanation: Explanation, plan: Plan) -> None:
    wanted, most = plan.relative_error, plan.totals[-1]
    assert explanation.relative_errors is not None
    worst = explanation.relative_errors.amax(dim=1)  # (B, C) -> (B,)
    # They have been rounded to float32 since they were compared.
    missed = worst[~(worst <= wanted * (1 + 1e-5))]
    if len(missed):
        warnings.warn(
            f"{len(missed)} of {len(worst)} images are not at relative_error={wanted} after {most} evaluations, the worst "
            f"is at {float(missed.max()):.2g}. Raise max_refine, or show fewer classes with top_k.",
            stacklevel=3,
        )
