"""Methods that read gradients of the logits, feature maps or attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from shapadapter.backbone import attention_weights, cells_first, first_tensor, original_name
from shapadapter.core.errors import ShapleyError
from shapadapter.core.shapley import project_on_efficiency
from shapadapter.data.images import unpatchify
from shapadapter.explanation.case import Answer, Case
from shapadapter.explanation.game import GRADIENT_COST
from shapadapter.explanation.passes import base_of
from shapadapter.explanation.presence import full_gradients


def attention(case: Case) -> Answer:
    """Attention of the class token in the last block, mean of the heads."""
    return _read(case, _blocks(case)[-1])


def attention_rollout(case: Case) -> Answer:
    """Attention through all blocks, with half of it for the residual path (Abnar & Zuidema 2020)."""
    blocks = _blocks(case)
    identity = torch.eye(blocks[0].shape[-1], device=blocks[0].device)  # (T, T)
    joint = identity
    for weights in blocks:
        mixed = 0.5 * weights + 0.5 * identity  # (B, T, T)
        joint = mixed / mixed.sum(dim=-1, keepdim=True) @ joint  # (B, T, T)
    return _read(case, joint)


def _blocks(case: Case) -> list[Tensor]:
    """Attention probabilities (B, T, T) of each block, mean of the heads."""
    blocks = len(case.layer.anatomy.attentions)
    with attention_weights() as collected:
        case.model(**case.batch.inputs)
    # With the base model's own classifier, the empty image follows.
    weights = [found.float().mean(dim=1) for found in collected[:blocks] if found is not None]
    if not blocks or len(weights) != blocks:
        raise ShapleyError(
            "This model does not expose attention weights between all its patches. Use a method that needs none, e.g. "
            "'kernel_shap', 'leave_one_out', 'grad_cam' or 'integrated_gradients'."
        )
    return weights


def _read(case: Case, weights: Tensor) -> Answer:
    """The cells' columns of (B, T, T): in the class token's row, or the mean of the cells' rows where there is none."""
    prefix, (rows, cols) = case.layer.anatomy.prefix, case.batch.tiling.cells
    cells = slice(prefix, prefix + rows * cols)  # neither class token and registers nor padding
    row = weights[:, 0, cells] if prefix else weights[:, cells, cells].mean(dim=1)  # (B, cells)
    maps = case.from_cells(row[..., None])  # (B, N, 1)
    return Answer(maps.expand(-1, -1, case.batch.classes.shape[1]))


def presence_gradient(case: Case) -> Answer:
    """The gradient by the players' presence, of the pass that predicted, moved to the sum of the logits.

    It needs no training: the head has no say in it.
    """
    gradients = full_gradients(case.batch)  # (B, N, C)
    null, full = case.ends  # (B, C) each
    cost = math.ceil(GRADIENT_COST * gradients.shape[-1])
    return Answer(project_on_efficiency(gradients, full.double(), null.double()), cost)


def gradient_x_input(case: Case) -> Answer:
    """Gradient times pixel values, summed over each player's tile (captum's InputXGradient)."""
    method = _captum().InputXGradient(case.logits)
    pixels = case.pixel_values.detach().clone().requires_grad_()
    return _per_class(case, lambda target: method.attribute(pixels, target=target), 1)


def integrated_gradients(case: Case) -> Answer:
    """Gradients on the straight way from the fill colour to the image (Sundararajan et al. 2017; captum's).

    For each shown class, `case.evaluations` steps.
    """
    method, pixels = _captum().IntegratedGradients(case.logits), case.pixel_values
    baseline = torch.zeros_like(pixels)
    if pixels.ndim == 4:
        baseline = baseline + case.layer.fill_color().to(pixels).view(1, -1, 1, 1)

    def of_class(target: Tensor) -> Tensor:
        return method.attribute(
            pixels,
            baselines=baseline,
            target=target,
            n_steps=case.evaluations,
            internal_batch_size=max(case.batch_size, case.images),
        )

    return _per_class(case, of_class, case.evaluations)


def _per_class(case: Case, method: Callable[[Tensor], Tensor], gradients: int) -> Answer:
    """Maps of a method that gives pixels' worth, in the shape of `pixel_values`, for one class (B,) at a time."""
    maps = []
    with torch.enable_grad():
        for target in case.batch.classes.unbind(dim=1):
            pixels = method(target).detach().float()
            if pixels.ndim == 3:
                pixels = unpatchify(pixels, case.batch.tiling.cells)  # (B, L, p * p * C) -> (B, C, H, W)
            maps.append(case.from_pixels(pixels.sum(dim=1)[..., None]))  # (B, N, 1)
    return Answer(torch.cat(maps, dim=-1), gradients * len(maps))


def grad_cam(case: Case) -> Answer:
    """relu(sum_d w_d F_d) of the features F of the cells, w_d the mean gradient of feature d (Selvaraju et al. 2017).

    F are the final features. Where a class token predicts, these have no part in it: then they are those that enter the
    last block.
    """
    pixels = case.pixel_values.detach().clone().requires_grad_()
    with torch.enable_grad(), _caught_features(case) as caught:
        scores = case.shown(case.logits(pixels)).sum(dim=0)  # (C,): an image's scores are its own features' alone
        # Of the first pass: with the base model's own classifier, one of the empty image follows.
        gradients = [torch.autograd.grad(score, caught[0], retain_graph=True)[0] for score in scores]
    features = _cells(case, caught[0].detach())  # (B, cells, D)
    weights = torch.stack([_cells(case, gradient).mean(dim=1) for gradient in gradients], dim=-1)  # (B, D, C)
    return Answer(case.from_cells((features @ weights).relu()), len(gradients))


@contextmanager
def _caught_features(case: Case) -> Iterator[list[Tensor]]:
    """Collect the features that Grad-CAM weighs, as they lie in the model, in each pass inside the context."""
    anatomy, by_token, caught = case.layer.anatomy, _class_token_predicts(case), list[Any]()
    if anatomy.layout == "latents" or (by_token and not anatomy.blocks):
        raise ShapleyError(
            "Grad-CAM needs features of places in the image that the prediction is made of, and this model has none that "
            "are known. Use another method, e.g. 'integrated_gradients' or 'kernel_shap'."
        )

    def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any = None) -> None:
        if by_token:
            caught.append(args[0] if args else kwargs["hidden_states"])
        else:
            caught.append(first_tensor(output))

    modules = base_of(case.model).named_modules()
    sources = [module for name, module in modules if original_name(name) == anatomy.source]
    handles = [
        (one.register_forward_pre_hook if by_token else one.register_forward_hook)(catch, with_kwargs=True)
        for one in sources
    ]
    try:
        yield caught
    finally:
        for handle in handles:
            handle.remove()


def _class_token_predicts(case: Case) -> bool:
    active = case.layer.active
    assert active is not None
    return bool(case.layer.anatomy.prefix) and case.layer.rules[active].prediction == "classifier"


def _cells(case: Case, features: Tensor) -> Tensor:
    """The features (B, cells, D) of the cells, without class token, Shapley token, registers and padding."""
    count = math.prod(case.batch.tiling.cells)
    found = cells_first(features, case.layer.anatomy)
    token = int(_class_token_predicts(case) and case.layer.token_in_sequence)
    return found[:, token : token + count].float()


def _captum() -> Any:
    try:
        from captum import attr
    except ImportError as error:
        raise ImportError('This method needs captum: pip install "shapadapter[compare]"') from error
    return attr
