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
        coalition_attributions: (B, M, K) fp32, the sum of the attributions of the players present, in place of
            `attributions`, if coalitions were given with `return_attributions=False`: all a training step needs.
        expected_square: (B,) fp32 without gradient, `objective.expected_square` of the attributions; likewise.
        hidden_states: the base model's, if asked for; without the Shapley token.
        attentions: the base model's, if asked for; without the Shapley token.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    attributions: Tensor | None = None
    null_values: Tensor | None = None
    coalition_values: Tensor | None = None
    coalition_attributions: Tensor | None = None
    expected_square: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class MatchingOutput(ShapleyOutput):
    """The same for images and texts: the K classes are the T texts, the logits their similarities before softmax.

    The game is played in the space of embeddings, in which a text is a direction: for the normalised embedding t (P,)
    of any text, `scale * embedding_attributions @ t` are its attributions, with the model's `scale`. Without texts,
    `logits`, `attributions`, `null_values` and `coalition_values` are None. `hidden_states` and `attentions`, of which the
    base model has those of two towers, are always None.

    Attributes:
        image_embeds: (B, P), with `classifier` prediction the model's own, normalised.
        text_embeds: (T, P), normalised.
        embedding_attributions: (B, N, P) fp32, what each player adds to the image's embedding.
        null_embeds: (B, P) fp32, the embedding with no player present.
    """

    image_embeds: Tensor | None = None
    text_embeds: Tensor | None = None
    embedding_attributions: Tensor | None = None
    null_embeds: Tensor | None = None

    @property
    def logits_per_image(self) -> Tensor | None:
        """(B, T), as the base model calls the logits."""
        return self.logits

    @property
    def logits_per_text(self) -> Tensor | None:
        """(T, B)."""
        return None if self.logits is None else self.logits.t()
