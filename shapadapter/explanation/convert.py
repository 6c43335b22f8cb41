"""An explanation in the words of others: numpy arrays, maps on the original, json, an `Explanation` of the shap library."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

if TYPE_CHECKING:
    from shapadapter.explanation.explanation import Explanation


def as_numpy(tensors: dict[str, Tensor]) -> dict[str, NDArray[Any]]:
    """Copies of tensors as arrays, by the same names."""
    return {name: tensor.numpy().copy() for name, tensor in tensors.items()}


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
