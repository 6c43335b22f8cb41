"""How well the model does its task, and whether its attributions add up, on all the data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from shapadapter.explaining import predictions
from shapadapter.labels import known_labels

from .data import Batch, Rows


def task(model: nn.Module, rows: Rows, batch_size: int, options: dict[str, Any], progress: bool) -> dict[str, Tensor]:
    """Measures of each image, (R,) float64 each.

    Single label: `accuracy` and `cross_entropy`. Several labels: `accuracy` over the labels, at probability 0.5, and
    `cross_entropy`, the mean over them. Regression: `absolute_error` and `squared_error`. Without labels none of them;
    always `efficiency_gap`, the largest |null + sum of attributions - logit| of any class.
    """
    parts: list[dict[str, Tensor]] = []
    starts = range(0, len(rows), batch_size)
    for start in tqdm(starts, desc="Task", unit="batch", disable=not progress, leave=False):
        found = rows.batch(range(start, min(start + batch_size, len(rows))))
        for batch in predictions(model, found.inputs, None, None, None, None, batch_size, options):
            output = batch.output
            total = output.null_values.double() + output.attributions.double().sum(dim=1)  # (B, N, K) -> (B, K)
            gap = (total - output.logits.double()).abs().amax(dim=1)  # (B, K) -> (B,)
            parts.append({"efficiency_gap": gap.cpu(), **_scores(output.logits, found, batch.likelihood)})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _scores(logits: Tensor, found: Batch, likelihood: str) -> dict[str, Tensor]:
    """What labels say about logits (B, K), (B,) each; NaN where no label of an image is known."""
    if found.labels is None:
        return {}
    logits, labels = logits.double().cpu(), found.labels.cpu()
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


def groups_of(names: Sequence[Any]) -> Tensor:
    """Numbers for the values of a group column, whatever they are: (R,) int64."""
    known = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return torch.tensor([known[name] for name in names], device="cpu")
