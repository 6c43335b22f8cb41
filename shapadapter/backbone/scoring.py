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
    if kind == "matching":
        return embed(model, inputs)
    output = _asked(model, inputs)
    scores = getattr(output, family.scores, None)
    return scores if isinstance(scores, Tensor) else None


def reply(model: nn.Module, kind: Kind, family: Family, inputs: dict[str, Any]) -> Tensor | None:
    """What `score` returns; of a model without scores the first tensor in its output, None if there is none."""
    if kind == "matching":
        return embed(model, inputs)
    output = _asked(model, inputs)
    fields = output.values() if isinstance(output, Mapping) else ()
    return next((t for t in (getattr(output, family.scores, None), *fields) if isinstance(t, Tensor)), None)


def _asked(model: nn.Module, inputs: dict[str, Any]) -> Any:
    """The base model's own answer. `forward`, not a call: hooks on the model would hear of a pass they know nothing of."""
    with asking_base():
        return model.forward(**inputs, **named_fields(model))


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
