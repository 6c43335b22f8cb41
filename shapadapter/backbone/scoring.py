"""Ask the base model itself for its scores of images."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .anatomy import Kind
from .families import Family
from .forwards import asking_base


def kind_of(model: nn.Module) -> Kind:
    """What kind of model it is, by what it offers; "classifier" may turn out to have no scores."""
    texts = "input_ids" in inspect.signature(model.forward).parameters
    return "matching" if texts and hasattr(model, "get_image_features") else "classifier"


def score(model: nn.Module, kind: Kind, family: Family, inputs: dict[str, Any]) -> Tensor | None:
    """Scores (B, K) of images; with texts, their normalised embeddings (B, P); None from a model without scores.

    Args:
        model: the base model.
        kind: what kind it is.
        family: what is known about it.
        inputs: keyword arguments of its forward.
    """
    return ask(model, kind, family, inputs)[0]


def ask(model: nn.Module, kind: Kind, family: Family, inputs: dict[str, Any]) -> tuple[Tensor | None, Tensor | None]:
    """What `score` returns; and the same again or, of a model without scores, the first tensor in its output, if any."""
    if kind == "matching":
        embedded = embed(model, inputs)
        return embedded, embedded
    with asking_base():  # through `forward`: hooks on a call would hear of a pass they know nothing of
        output = model.forward(**inputs, **named_fields(model))
    scores = getattr(output, family.scores, None)
    if isinstance(scores, Tensor):
        return scores, scores
    fields = output.values() if isinstance(output, Mapping) else ()
    return None, next((field for field in fields if isinstance(field, Tensor)), None)


def embed(model: Any, inputs: dict[str, Any]) -> Tensor:
    """Normalised embeddings (B, P) of images."""
    return normalised(model.get_image_features(**inputs))


def normalised(features: Any) -> Tensor:
    """What `get_image_features` or `get_text_features` returns, as unit vectors (B, P)."""
    return F.normalize(getattr(features, "pooler_output", features), dim=-1)


def named_fields(model: nn.Module) -> dict[str, bool]:
    """`return_dict=True`, where the model knows it."""
    parameters = inspect.signature(model.forward).parameters.values()
    known = any(p.name == "return_dict" or p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    return {"return_dict": True} if known else {}
