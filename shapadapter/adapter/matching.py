"""The text side of a matching model: texts as directions in the space of embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shapadapter.core.errors import ShapleyError
from shapadapter.core.losses import contrastive_loss, pairwise_sigmoid_loss
from shapadapter.data.collator import text_rules

TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")


@dataclass(frozen=True)
class Texts:
    """What a matching model was asked to compare images with.

    Attributes:
        inputs: what its text tower gets.
        embeds: (T, P) normalised embeddings given in place of texts, or None.
        loss: whether the contrastive loss was asked for.
    """

    inputs: dict[str, Any]
    embeds: Tensor | None
    loss: bool

    @classmethod
    def taken_from(cls, options: dict[str, Any]) -> Texts:
        """Take the text side out of a call's keyword arguments.

        Raises:
            ValueError: texts and embeddings of texts at once.
        """
        inputs = {name: options.pop(name) for name in TEXT_INPUTS if options.get(name) is not None}
        for name in TEXT_INPUTS:
            options.pop(name, None)
        embeds = options.pop("text_embeds", None)
        if embeds is not None:
            embeds = F.normalize(embeds, dim=-1)  # (T, P)
        if inputs and embeds is not None:
            raise ValueError("Pass either input_ids or text_embeds, not both.")
        return cls(inputs, embeds, bool(options.pop("return_loss", None)))

    @property
    def given(self) -> bool:
        """Whether there are any."""
        return "input_ids" in self.inputs or self.embeds is not None

    def for_base(self, device: torch.device) -> dict[str, Any]:
        """What the base model's forward gets, which refuses to run without a text."""
        return (
            self.inputs
            if "input_ids" in self.inputs
            else {"input_ids": torch.zeros(1, 1, dtype=torch.long, device=device)}
        )

    def check_length(self, model: nn.Module) -> None:
        """Refuse texts that do not fit the model.

        Raises:
            ShapleyError: they are longer than its position table.
        """
        limit = text_rules(model).limit
        ids = self.inputs.get("input_ids")
        if ids is not None and limit is not None and ids.shape[-1] > limit:
            raise ShapleyError(
                f"A text of {ids.shape[-1]} tokens is longer than the {limit} this model takes. Shorten it, or let the "
                f"tokenizer cut it: truncation=True, max_length={limit}."
            )

    def loss_of(self, model: Any, similarity: Tensor) -> Tensor | None:
        """The model's contrastive loss on `similarity` (B, B); texts that are the same are matches of each other.

        Raises:
            ShapleyError: there is not one text for each image.
        """
        if not self.loss:
            return None
        ids = self.inputs.get("input_ids")
        if ids is None or similarity.shape[0] != similarity.shape[1]:
            raise ShapleyError(
                f"return_loss=True needs one text for each image, in order; got {tuple(similarity.shape)} images and texts."
            )
        matches = (ids[:, None] == ids[None]).all(dim=-1)  # (B, B)
        loss = pairwise_sigmoid_loss if hasattr(model, "logit_bias") else contrastive_loss
        return loss(similarity, matches)


def similarity(model: Any, embeds: Tensor, text_embeds: Tensor, difference: bool = False) -> Tensor:
    """Similarity before softmax of embeddings (..., P) and normalised texts (T, P): (..., T) fp32.

    Args:
        model: the base model, which knows scale and bias.
        embeds: embeddings of images, or what players add to them.
        text_embeds: normalised embeddings of texts.
        difference: whether `embeds` are differences of embeddings, for which the bias cancels out.
    """
    with torch.autocast(embeds.device.type, enabled=False):
        scaled = embeds.float() @ text_embeds.float().t() * model.logit_scale.float().exp()
    bias = getattr(model, "logit_bias", None)
    return scaled if difference or bias is None else scaled + bias.float()
