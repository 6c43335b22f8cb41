"""Images that accelerate hands out again to fill the last batch of each process, taken out of an evaluation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def without_repeats(inputs: dict[str, Any], accelerator: Any) -> tuple[dict[str, Any], bool]:
    """This process's part of a batch of an evaluation, without what only fills it up.

    Args:
        inputs: tensors of B images.
        accelerator: accelerate's, whose data loader the batch came from.

    Returns:
        The inputs of the R images that are the data set's, in the order of `gather_for_metrics`, and whether any is.
        Where none is, one stays all the same, for every process has to take part in a step.
    """
    state, rows = accelerator.gradient_state, len(inputs["pixel_values"])
    if accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
        return inputs, True
    own = state.remainder - accelerator.process_index * rows
    kept = min(max(own, 1), rows)
    part = {
        name: value[:kept] if isinstance(value, Tensor) and value.ndim and len(value) == rows else value
        for name, value in inputs.items()
    }
    return part, own > 0


def refilled(values: Tensor | None, rows: int) -> Tensor | None:
    """Values (R, ...) with the last one repeated, (B, ...): a gather wants as many from every process."""
    if values is None or len(values) == rows:
        return values
    return values[torch.arange(rows, device=values.device).clamp(max=len(values) - 1)]
