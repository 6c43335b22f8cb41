"""What a wrapped model returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.utils.generic import ModelOutput


@dataclass
class ShapleyOutput(ModelOutput):
    """Prediction and explanation of one forward pass: `null_values + attributions.sum(1)` equals `logits`.

    Attributes:
        loss: the task loss, if labels were given.
        logits: (B, K), the prediction, with its usual meaning.
        attributions: (B, N, K) fp32, what each player adds to each class's logit; players in raster order.
        null_values: (B, K) fp32, the logits with no player present.
        coalition_values: (B, M, K) fp32, the logits of each coalition, if coalitions were given.
        hidden_states: the base model's, if asked for; without the Shapley token.
        attentions: the base model's, if asked for; without the Shapley token.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    attributions: Tensor | None = None
    null_values: Tensor | None = None
    coalition_values: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
