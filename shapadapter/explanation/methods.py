"""Every explanation method through one interface, on the user's own wrapped model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from shapadapter.backbone import evaluation_view
from shapadapter.backbone.forward import check_options
from shapadapter.core.errors import ShapleyError
from shapadapter.core.phrases import did_you_mean
from shapadapter.explanation.api import explain
from shapadapter.explanation.case import (
    Answer,
    Case,
    centre,
    equal,
    exact,
    kernel_shap,
    leave_one_out,
    permutation,
    random,
)
from shapadapter.explanation.explanation import Explanation
from shapadapter.explanation.game import active_layer
from shapadapter.explanation.gradient_methods import (
    attention,
    attention_rollout,
    grad_cam,
    gradient_x_input,
    integrated_gradients,
    presence_gradient,
)
from shapadapter.explanation.passes import join, one_pass, predictions
from shapadapter.explanation.presence import LEVEL
from shapadapter.explanation.refine import in_pairs

__all__ = ["METHODS", "attribute"]

_OURS = ("shapadapter", LEVEL, "refined")
_PAIRED = ("refined", "kernel_shap")
_OTHERS: dict[str, Callable[[Case], Answer]] = {
    "presence_gradient": presence_gradient,
    "kernel_shap": kernel_shap,
    "permutation": permutation,
    "exact": exact,
    "leave_one_out": leave_one_out,
    "attention": attention,
    "attention_rollout": attention_rollout,
    "grad_cam": grad_cam,
    "gradient_x_input": gradient_x_input,
    "integrated_gradients": integrated_gradients,
    "random": random,
    "centre": centre,
    "equal": equal,
}

METHODS: tuple[str, ...] = (*_OURS, *_OTHERS)
"""The names `attribute` takes for `method`."""

OwnMethod = Callable[[nn.Module, dict[str, Any], Tensor], Any]
"""A method of the user's: `method(model, inputs, classes)`, see `attribute`."""


def attribute(
    model: nn.Module,
    images: Any,
    processor: Any | None = None,
    *,
    method: str | OwnMethod = "shapadapter",
    texts: Sequence[str] | str | None = None,
    top_k: int | None = None,
    targets: Sequence[str | int] | str | int | None = None,
    evaluations: int = 512,
    seed: int = 0,
    batch_size: int = 32,
    **options: Any,
) -> Explanation:
    """Explain images by any method, all on the same model, players, removal operator and value.

    Args:
        model: a wrapped model; its training mode is left as it was.
        images: one image or many, as `explain` takes them.
        processor: the image processor the model was trained with; with texts, the processor of both.
        method: one of `METHODS`, or a function `method(model, inputs, classes)` of your own: `model(**inputs).logits` are
            the logits (B, K), `inputs["pixel_values"]` the images (B, 3, H, W), `classes` (B, C) the classes to explain.
            It returns (B, H, W, C), which is summed over the players' tiles, or (B, rows, cols, C), by player.
        texts: for a model that matches images with texts: what to compare the images with.
        top_k: keep the maps of the k likeliest classes of each image; all classes by default.
        targets: keep the maps of these classes (names or indices) instead.
        evaluations: model evaluations for each image, of "refined" and "kernel_shap", an even number, and of "permutation";
            for each shown class the steps of "integrated_gradients".
        seed: of all that is drawn, which depends on it and on the image's place among the images, not on `batch_size`.
        batch_size: images in a forward pass; of coalitions, which are smaller, eight times as many.
        **options: further keyword arguments of the model's forward, e.g. `interpolate_pos_encoding=True`.

    Returns:
        As `explain`, with `method` and `evaluations`, counted beyond the forward pass that predicts; a gradient counts as one,
        by presence as 1.75. Maps of attention, Grad-CAM, "random" and "centre" do not sum to the logits.

    Raises:
        ValueError: there is no such method, or it needs more evaluations or fewer players.
        ShapleyError: the model lacks what the method reads, such as attention between all patches.
        ImportError: the method needs captum.
        ImageError, ClassNotFoundError, TypeError: as `explain`.
    """
    _check(method, evaluations)
    active_layer(model)
    if "refine" in options:
        raise TypeError("attribute refines with method='refined', evaluations=64; refine is an argument of explain.")
    check_options(model, options, attribute)
    if method in ("refined", LEVEL):
        refine: Any = LEVEL if method == LEVEL else evaluations
        wanted: Any = {"texts": texts, "top_k": top_k, "targets": targets, "batch_size": batch_size}
        return explain(model, images, processor, refine=refine, seed=seed, **wanted, **options)
    parts: list[Explanation] = []
    model = evaluation_view(model, private=True)  # for methods that hook modules
    layer, graph = active_layer(model), method == "presence_gradient"
    # The caller's inference mode would forbid the gradients that some methods ask for.
    with torch.inference_mode(False), torch.no_grad():
        for batch in predictions(model, images, processor, texts, top_k, targets, batch_size, options, graph):
            case = Case(model, layer, batch, evaluations, seed, sum(map(len, parts)), batch_size)
            parts.append(_explained(case, method))
    return join(parts)


def _check(method: Any, evaluations: int) -> None:
    if not callable(method) and method not in METHODS:
        hint = did_you_mean(str(method), METHODS)
        raise ValueError(
            " ".join(filter(None, [f"There is no method {method!r}.", hint, f"The methods are {', '.join(METHODS)}."]))
        )
    if not isinstance(evaluations, Integral) or evaluations < 2:
        raise ValueError(f"Expected at least 2 evaluations, a whole number, got {evaluations!r}.")
    if method in _PAIRED and not in_pairs(evaluations):
        raise ValueError(
            f"evaluations must be an even number for {method!r}, for its coalitions come in pairs; got {evaluations}."
        )


def _explained(case: Case, method: str | OwnMethod) -> Explanation:
    """The explanation of one batch by one method."""
    ours = one_pass(case.batch)
    if method == "shapadapter":
        answer = Answer(ours.attributions.flatten(1, 2))
    else:
        answer = _own(case, method) if callable(method) else _OTHERS[method](case)
    errors = None if answer.standard_errors is None else _on_grid(case, answer.standard_errors)
    spent = None if answer.evaluations is None else torch.full((case.images,), answer.evaluations, device="cpu")
    name = getattr(method, "__name__", type(method).__name__) if callable(method) else method
    return replace(
        ours, attributions=_on_grid(case, answer.maps), standard_errors=errors, evaluations=spent, method=name
    )


def _on_grid(case: Case, maps: Tensor) -> Tensor:
    """(B, N, C) as an explanation keeps it: (B, rows, cols, C)."""
    return maps.detach().float().cpu().unflatten(1, case.batch.tiling.players).clone()


def _own(case: Case, method: OwnMethod) -> Answer:
    """What a method of the user's says, of pixels or of players."""
    # A copy, so that whoever asks for gradients leaves no mark on the caller's tensor.
    inputs = {**case.batch.inputs, "pixel_values": case.pixel_values.detach().clone()}
    with torch.enable_grad():
        found = method(case.model, inputs, case.batch.classes)
    try:
        maps = found.detach() if isinstance(found, Tensor) else torch.as_tensor(found, device="cpu")
        came = str(tuple(maps.shape))
    except (TypeError, ValueError, RuntimeError):  # no numbers
        maps, came = torch.empty(0, device="cpu"), type(found).__name__
    images, shown = case.batch.classes.shape
    grid = case.batch.tiling.players
    pixels = tuple(case.pixel_values.shape[-2:]) if case.pixel_values.ndim == 4 else tuple(case.batch.seen.shape[1:3])
    if not maps.isfinite().all():
        raise ShapleyError("Expected the method to return finite numbers, but some are NaN or infinite.")
    if tuple(maps.shape) == (images, *grid, shown):
        return Answer(maps.flatten(1, 2), None)
    if tuple(maps.shape) == (images, *pixels, shown):
        return Answer(case.from_pixels(maps), None)
    raise ShapleyError(
        f"Expected the method to return ({images}, {grid[0]}, {grid[1]}, {shown}), a number for each image, player and "
        f"class, or ({images}, {pixels[0]}, {pixels[1]}, {shown}), one for each pixel, got {came}."
    )
