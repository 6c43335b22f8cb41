"""Where the vote starts from: the base model's own classifier, applied to every cell."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shapadapter.adapter.layer import ShapleyLayer
from shapadapter.adapter.tuning import plain_weight
from shapadapter.backbone import original_name


@torch.no_grad()
def start_from_classifier(model: nn.Module, layer: ShapleyLayer, name: str) -> None:
    """Copy the base model's classifier into the vote of a new adapter, where the shapes allow it.

    A model that classifies the mean of its normalised features then predicts by vote what it predicted before; others
    start nearer to that than from random numbers. A classifier that is itself new is as good a start as any.
    With texts, the projection to the space of embeddings is copied, scaled to embeddings of about unit length.

    Args:
        model: the base model.
        layer: its Shapley layer.
        name: of the adapter.
    """
    votes, nulls = layer.lora_shapley_vote, layer.lora_shapley_null
    vote: Tensor = votes[name].weight  # type: ignore[union-attr,index,assignment]  # (K, D)
    heads = [
        (head, weight)
        for head in _classifiers(model, layer)
        if not head.weight.is_meta and (weight := plain_weight(head)).shape == vote.shape
    ]
    if not heads or vote.is_meta:
        return
    weight = torch.stack([weight.to(vote) for _, weight in heads]).mean(dim=0)  # several heads are averaged
    vote.copy_(weight / weight.norm() if layer.anatomy.kind == "matching" else weight)
    biases = [head.bias for head, _ in heads if head.bias is not None]
    if name in nulls and len(biases) == len(heads):  # type: ignore[operator]
        null: Tensor = nulls[name]  # type: ignore[index,assignment]  # (K,)
        null.copy_(torch.stack([bias.to(null) for bias in biases]).mean(dim=0))


def _classifiers(model: nn.Module, layer: ShapleyLayer) -> list[nn.Linear]:
    """The linear layers that run after the final features."""
    behind = set(layer.anatomy.behind)
    return [
        module
        for path, module in model.named_modules()
        if original_name(path) in behind and isinstance(module, nn.Linear) and ".modules_to_save." not in path
    ]
