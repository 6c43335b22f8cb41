"""Methods that read attention: where the class token looks. They tell no classes apart."""

from __future__ import annotations

import torch
from torch import Tensor

from shapadapter.backbone import attention_weights
from shapadapter.errors import ShapleyError

from .case import Answer, Case


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
    """Attention probabilities (B, T, T) of each block, mean of the heads.

    Raises:
        ShapleyError: the model has no attention from every token to every token.
    """
    seats = len(case.layer.anatomy.attentions)
    with attention_weights() as collected:
        case.model(**case.batch.inputs)
    # With the base model's own classifier, the empty image follows.
    weights = [found.float().mean(dim=1) for found in collected[:seats] if found is not None]
    if not seats or len(weights) != seats:
        raise ShapleyError(
            "This model does not tell the attention between all its patches. Use a method that needs none, e.g. "
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
