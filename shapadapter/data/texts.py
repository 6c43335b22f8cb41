"""Texts as people have them, for models that match images with texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from shapadapter.core.errors import ShapleyError


@dataclass(frozen=True)
class TextRules:
    """What a matching model asks of its texts.

    Attributes:
        limit: the longest text in tokens, None if unknown.
        padded: whether every text is padded to that length: SigLIP reads the padding.
    """

    limit: int | None = None
    padded: bool = False


def text_rules(model: Any) -> TextRules:
    """The rules of a matching model, from its config."""
    config: Any = getattr(model.config, "text_config", None)
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and getattr(config, "model_type", "") == "altclip_text_model":
        limit -= int(config.pad_token_id) + 1  # its positions start behind that of the padding
    return TextRules(limit, padded=getattr(model.config, "model_type", "") in ("siglip", "siglip2"))


def prepare_texts(texts: Sequence[str], processor: Any, rules: TextRules, truncate: bool = False) -> dict[str, Tensor]:
    """Tokenize.

    Args:
        texts: at least one.
        processor: the processor of images and texts the model came with, or its tokenizer.
        rules: of the model.
        truncate: whether to cut texts that are too long.

    Returns:
        What the model's text side takes, `input_ids` (T, L) among it.

    Raises:
        ShapleyError: there is no tokenizer, no text, or a text is longer than the model takes.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    if not callable(tokenizer) or not hasattr(tokenizer, "convert_tokens_to_ids"):
        raise ShapleyError(
            f"Texts need a tokenizer, {type(processor).__name__} has none. Pass the whole processor: "
            "AutoProcessor.from_pretrained(...)."
        )
    listed = [texts] if isinstance(texts, str) else list(texts)
    if not listed or not all(isinstance(text, str) for text in listed):
        raise ShapleyError(f"Expected at least one text, got {listed[:3]!r}.")
    if not truncate:
        _check_lengths(listed, tokenizer, rules)
    cut = {"truncation": True, "max_length": rules.limit} if rules.limit is not None else {}
    encoded = tokenizer(listed, padding="max_length" if rules.padded else True, return_tensors="pt", **cut)
    names = ("input_ids",) if rules.padded else ("input_ids", "attention_mask", "token_type_ids")
    return {name: encoded[name] for name in names if name in encoded}


def _check_lengths(texts: list[str], tokenizer: Any, rules: TextRules) -> None:
    if rules.limit is None:
        return
    for text, ids in zip(texts, tokenizer(texts)["input_ids"], strict=True):
        if len(ids) > rules.limit:
            shown = text if len(text) <= 60 else f"{text[:57]}..."
            raise ShapleyError(f"The text {shown!r} has {len(ids)} tokens, the model takes {rules.limit}. Shorten it.")
