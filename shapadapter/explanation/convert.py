"""An explanation in the words of others: numpy arrays, maps on the original, json, an `Explanation` of the shap library."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, grid_sample

if TYPE_CHECKING:
    from shapadapter.explanation.explanation import Explanation


Size = tuple[int, int]
Box = tuple[float, float, float, float]
"""Top, left, bottom and right."""


def as_numpy(tensors: dict[str, Tensor]) -> dict[str, NDArray[Any]]:
    """Copies of tensors as arrays, by the same names."""
    return {name: tensor.numpy().copy() for name, tensor in tensors.items()}


def frame_of(one: Explanation, original: bool) -> tuple[Size, Box]:
    """Height and width of a picture of one image, and where on it the maps lie, in its pixels.

    Args:
        one: of one image.
        original: take the image as it came, instead of what the model saw.

    Raises:
        ValueError: that is not known.
    """
    if not original:
        seen = (one.images.shape[1], one.images.shape[2])
        return seen, (0, 0, *seen)
    if one.frames is None:
        raise ValueError("The original image is not known: explain it with an image processor, instead of prepared.")
    height, width, top, left, bottom, right = one.frames[0].tolist()
    if not (height >= 1 and width >= 1 and bottom > top and right > left):  # or NaN
        raise ValueError(
            "It is not known where the original image was seen: its processor does more than resize, crop and pad."
        )
    return (int(height), int(width)), (top, left, bottom, right)


def laid_out(values: ArrayLike, size: Size, box: Box, smooth: bool = False) -> NDArray[np.float32]:
    """A map on an image of which it covers a part.

    Args:
        values: (rows, cols).
        size: height and width of the image.
        box: of the map, in pixels of the image.
        smooth: interpolate bicubically.

    Returns:
        (H, W) float32, NaN outside the box.
    """
    down, across = (
        (torch.arange(count, dtype=torch.float64, device="cpu") + 0.5 - start) / (end - start)
        for count, start, end in zip(size, box[:2], box[2:], strict=True)
    )  # (H,) and (W,), in 0..1 inside the box
    places = torch.stack(torch.meshgrid(across, down, indexing="xy"), dim=-1)  # (H, W, 2)
    given = torch.as_tensor(values, dtype=torch.float64, device="cpu")[None, None]  # (1, 1, rows, cols)
    mode = "bicubic" if smooth else "nearest"
    found = grid_sample(given, 2 * places[None] - 1, mode, "border", align_corners=False)[0, 0]  # (H, W)
    return found.where(((places >= 0) & (places < 1)).all(-1), torch.nan).float().numpy()


def as_dict(explanation: Explanation) -> dict[str, Any]:
    """Numbers, strings, lists and dicts, as json takes them: one entry for each image, without its pixels.

    What is not finite is None.
    """
    return {
        "method": explanation.method,
        "players": list(explanation.attributions.shape[1:3]),
        "sums_to_logits": explanation.sums_to_logits,
        "images": [_image(explanation, index) for index in range(len(explanation))],
    }


def _image(explanation: Explanation, index: int) -> dict[str, Any]:
    one = explanation[index]
    order = one.logits.gather(1, one.classes)[0].argsort(descending=True).tolist()  # (1, K) -> (1, C) -> (C,)
    spent = None if one.evaluations is None else int(one.evaluations[0])
    classes = [_class(one, column) for column in order]
    return {"prediction": one.top(1)[0][0].label, "evaluations": spent, "classes": classes}


def _class(one: Explanation, column: int) -> dict[str, Any]:
    """One shown class of an explanation of one image."""
    index = int(one.classes[0, column])
    values = one.attributions[0, :, :, column]  # (1, rows, cols, C) -> (rows, cols)
    found = {
        "label": one.labels[index],
        "index": index,
        "logit": float(one.logits[0, index]),
        "probability": float(one.probabilities[0, index]),
        "null_value": float(one.null_values[0, index]),
        "sum": float(values.double().sum()),
        "attributions": values.tolist(),
    }
    if one.standard_errors is not None:
        found["standard_errors"] = one.standard_errors[0, :, :, column].tolist()  # (1, rows, cols, C) -> (rows, cols)
    return {name: finite(value) for name, value in found.items()}


def finite(value: Any) -> Any:
    """The same with None for every number that is not finite, which json does not know."""
    if isinstance(value, list):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_shap(explanation: Explanation, label: str | int | None) -> Any:
    """A `shap.Explanation`: of all shown classes for `shap.plots.image`, of one class for the plots of named features.

    Raises:
        ImportError: the shap library is missing.
    """
    try:
        import shap
    except ImportError as error:
        raise ImportError("to_shap() makes an object of the shap library: pip install shap") from error
    if label is None:
        return shap.Explanation(
            # With the axis of colours that shap expects: (B, rows, cols, C) -> (B, rows, cols, 1, C)
            values=explanation.attributions.unsqueeze(3).numpy().copy(),
            base_values=explanation.null_values.gather(1, explanation.classes).numpy(),  # (B, K) -> (B, C)
            data=explanation.images.numpy().copy(),  # (B, H, W, 3)
            output_names=np.array(explanation.labels)[explanation.classes.numpy()],  # (B, C)
        )
    index = explanation.class_index(label)
    errors = explanation.standard_errors
    return shap.Explanation(
        values=_flat(explanation.for_label(index)),
        base_values=explanation.null_values[:, index].numpy().copy(),  # (B, K) -> (B,)
        data=_brightness(explanation),
        feature_names=_players(explanation),
        error_std=None if errors is None else _flat(explanation.column(errors, index)),
    )


def _players(explanation: Explanation) -> list[str]:
    """Names of the N players, in raster order, counted as on the pages."""
    rows, cols = explanation.attributions.shape[1:3]
    return [f"row {row}, column {col}" for row in range(1, rows + 1) for col in range(1, cols + 1)]


def _brightness(explanation: Explanation) -> NDArray[np.float32]:
    """The mean brightness of each player, (B, N), in 0..1: what shap's plots print or colour as a feature's value."""
    rows, cols = explanation.attributions.shape[1:3]
    grey = explanation.images.float().mean(dim=3) / 255  # (B, H, W, 3) -> (B, H, W)
    return _flat(adaptive_avg_pool2d(grey, (rows, cols)))  # (B, H, W) -> (B, rows, cols) -> (B, N)


def _flat(values: Tensor) -> NDArray[np.float32]:
    """Values (B, rows, cols) as an array (B, N)."""
    return values.flatten(1).numpy().copy()  # (B, rows, cols) -> (B, N)
