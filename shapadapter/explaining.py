"""Explain images with a wrapped model: one forward pass each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .backbone import evaluating
from .errors import ImageError
from .explanation import Explanation, find_class
from .game import active_layer
from .images import prepare_images


def explain(
    model: nn.Module,
    images: Any,
    processor: Any | None = None,
    *,
    top_k: int | None = None,
    targets: Sequence[str | int] | str | int | None = None,
    batch_size: int = 32,
    **options: Any,
) -> Explanation:
    """Predict and explain images in one forward pass each, without gradients.

    Args:
        model: a wrapped model; its training mode is left as it was.
        images: one image or many: PIL images, paths, arrays (H, W, 3), or, without a processor, prepared pixel values
            (C, H, W) or (B, C, H, W).
        processor: the image processor the model was trained with.
        top_k: keep the maps of the k likeliest classes of each image; all classes by default.
        targets: keep the maps of these classes (names or indices) instead.
        batch_size: images in a forward pass.
        **options: further keyword arguments of the model's forward, e.g. `interpolate_pos_encoding=True`.

    Raises:
        ImageError: no image, an unreadable one, or one of a kind the model cannot take.
        ClassNotFoundError: a target the model does not have.
        ShapleyError: the model has no active Shapley adapter.
        ValueError: both `top_k` and `targets` were given, or `top_k` is less than 1.
    """
    layer = active_layer(model)
    config: Any = model.config
    names = config.id2label
    labels = tuple(str(names[index]) for index in range(layer.anatomy.classes))
    if top_k is not None and (targets is not None or top_k < 1):
        raise ValueError(f"Pass either targets or a top_k of at least 1, got top_k={top_k} and targets={targets}.")
    if batch_size < 1 or (isinstance(targets, Sequence) and not targets):
        raise ValueError(f"Expected a batch_size of at least 1 and some targets, got {batch_size} and {targets}.")
    wanted = [targets] if isinstance(targets, str | int) else targets
    chosen = None if wanted is None else [find_class(labels, target) for target in wanted]
    listed = as_list(images)
    parts = []
    parameter = next(model.parameters())
    with torch.inference_mode(), evaluating(model):
        for start in range(0, len(listed), batch_size):
            pixels = prepare(listed[start : start + batch_size], processor)
            grid = layer.anatomy.grid(pixels)
            height, width = grid[0] * layer.anatomy.patch[0], grid[1] * layer.anatomy.patch[1]
            seen = as_pictures(pixels[..., :height, :width], processor)  # what lies beyond the last patch is not seen
            output = model(pixel_values=pixels.to(parameter.device, parameter.dtype), return_dict=True, **options)
            parts.append(_collect(output, seen, grid, columns(output.logits, chosen, top_k), labels, config))
    return join(parts)


def as_list(images: Any) -> list[Any]:
    """One image or many as a list.

    Raises:
        ImageError: there is none.
    """
    if isinstance(images, Tensor | np.ndarray):
        images = [images] if images.ndim <= 3 else list(images)
    listed = list(images) if isinstance(images, Sequence) and not isinstance(images, str) else [images]
    if not listed:
        raise ImageError("Expected at least one image, got an empty list.")
    return listed


def prepare(images: list[Any], processor: Any | None) -> Tensor:
    """Pixel values (B, C, H, W) for the model."""
    if processor is None:
        if not all(isinstance(image, Tensor) for image in images):
            came = sorted({type(image).__name__ for image in images})
            raise ImageError(
                f"Without a processor expected prepared tensors (C, H, W), got {came}. Pass processor=..."
            )
        pixels = _stack(images)
    else:
        pixels = prepare_images(images, processor)
    return pixels


def _stack(images: list[Tensor]) -> Tensor:
    shapes = {tuple(image.shape) for image in images}
    if len(shapes) > 1 or len(next(iter(shapes))) != 3:
        raise ImageError(f"Expected tensors (C, H, W) of one size, got {sorted(shapes)}.")
    return torch.stack(images)  # (B, C, H, W)


def as_pictures(pixels: Tensor, processor: Any | None) -> Tensor:
    """Undo the processor's normalisation, (B, C, H, W) to (B, H, W, 3) uint8; without one, stretch each image."""
    pixels = pixels.float().cpu()
    mean, std = getattr(processor, "image_mean", None), getattr(processor, "image_std", None)
    if processor is not None and getattr(processor, "do_normalize", True) and mean is not None and std is not None:
        shape = (1, -1, 1, 1)
        pixels = pixels * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape)
    elif processor is None:
        low, high = pixels.amin(dim=(1, 2, 3), keepdim=True), pixels.amax(dim=(1, 2, 3), keepdim=True)
        pixels = (pixels - low) / (high - low).clamp(min=1e-12)
    scaled = (pixels * 255).round().clamp(0, 255).to(torch.uint8)  # (B, C, H, W)
    return scaled.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous()  # (B, H, W, 3)


def columns(logits: Tensor, chosen: list[int] | None, top_k: int | None) -> Tensor:
    """Which classes to keep for each image, (B, C) int64."""
    batch, classes = logits.shape
    if top_k is not None:
        return logits.topk(min(top_k, classes), dim=1).indices
    kept = torch.tensor(range(classes) if chosen is None else chosen, device=logits.device)
    return kept.expand(batch, -1)


def _collect(
    output: Any, seen: Tensor, grid: tuple[int, int], kept: Tensor, labels: tuple[str, ...], config: Any
) -> Explanation:
    index = kept[:, None].expand(-1, output.attributions.shape[1], -1)  # (B, N, C)
    attributions = output.attributions.gather(2, index).unflatten(1, grid)  # (B, rows, cols, C)
    logits = output.logits.float()
    several = config.problem_type == "multi_label_classification"
    probabilities = logits.sigmoid() if several else logits.softmax(dim=1)  # (B, K)
    return Explanation(
        attributions=attributions.float().cpu().clone(),
        classes=kept.cpu().clone(),
        logits=logits.cpu().clone(),
        null_values=output.null_values.float().cpu().clone(),
        probabilities=probabilities.cpu().clone(),
        labels=labels,
        images=seen,
    )


def join(parts: Sequence[Explanation]) -> Explanation:
    """One explanation of the images of several.

    Raises:
        ImageError: their images differ in size, so they cannot share one grid.
    """
    sizes = sorted({tuple(part.images.shape[1:3]) for part in parts})
    if len(sizes) > 1:
        raise ImageError(f"Images of different sizes {sizes} cannot share one explanation; explain them separately.")
    fields = ("attributions", "classes", "logits", "null_values", "probabilities", "images")
    return Explanation(labels=parts[0].labels, **{f: torch.cat([getattr(p, f) for p in parts]) for f in fields})
