"""The small table of what a dry run cannot find out, and the call that adds a family to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import nn

from shapadapter.core.errors import UnsupportedModelError

Layout = Literal["tokens", "channels_first", "channels_last", "latents"]
"""How features lie in a tensor: (B, prefix + cells, D), (B, D, rows, cols), (B, rows, cols, D), or (B, L, D) latents
that belong to no place in the image."""


@dataclass(frozen=True)
class Family:
    """What is known beforehand about a class of models; everything left out is found by a dry run.

    Attributes:
        features: name of the module whose output holds the final feature map.
        layout: how the features lie in it.
        prefix: tokens before the cells, with layout "tokens".
        scores: field of the model's output that holds the scores (B, K).
        patches: whether images come cut in patches (B, N, 3 * p * p), with `spatial_shapes` and a
            `pixel_attention_mask` (NaFlex).
        refused: why the family is not supported.
    """

    features: str | None = None
    layout: Layout | None = None
    prefix: int = 0
    scores: str = "logits"
    patches: bool = False
    refused: str = ""


_NAFLEX = Family(patches=True)
_PERCEIVER = Family(features="perceiver.encoder", layout="latents")
_FAMILIES = {
    "PPLCNetForImageClassification": Family(scores="last_hidden_state"),
    "Siglip2ForImageClassification": _NAFLEX,
    "Siglip2Model": _NAFLEX,
    "PerceiverForImageClassificationLearned": _PERCEIVER,
    "PerceiverForImageClassificationFourier": _PERCEIVER,
    "PerceiverForImageClassificationConvProcessing": _PERCEIVER,
    "DinatForImageClassification": Family(
        refused="it needs natten, and its attention fails in the versions of transformers this was written for."
    ),
    "ImageGPTForImageClassification": Family(
        refused="it reads colour clusters, one token a pixel, each seeing only those before it; there are no patches "
        "to remove."
    ),
    "ShieldGemma2ForImageClassification": Family(
        refused="it is a language model that answers yes or no about an image; it has no classes."
    ),
}


def register_family(
    model_class: type[nn.Module] | str,
    *,
    features: str | None = None,
    layout: Layout | None = None,
    prefix: int = 0,
    scores: str = "logits",
) -> None:
    """Say about a class of models what the dry run got wrong or refused; all else is still found and tested.

    Call it before a model is wrapped, also in the program that loads the adapter. Subclasses are meant as well.

    Args:
        model_class: the class, or its name.
        features: name, as in `model.named_modules()`, of the module that returns the final feature map.
        layout: how the features lie in it: "tokens" (B, prefix + cells, D) in raster order, "channels_first"
            (B, D, rows, cols), "channels_last" (B, rows, cols, D), or "latents" (B, L, D) without a place.
        prefix: tokens before the cells, with layout "tokens".
        scores: field of the model's output that holds the scores (B, K).

    Raises:
        ValueError: the layout is none of these, or something is said of features that are not named.
    """
    if layout is not None and layout not in get_args(Layout):
        raise ValueError(f"layout must be one of {list(get_args(Layout))}, got {layout!r}.")
    if features is None and (layout is not None or prefix):
        raise ValueError(
            "layout and prefix say how features lie in a module's output: name the module, features='...'."
        )
    if prefix < 0 or (prefix and layout not in (None, "tokens")):
        raise ValueError(f"prefix counts tokens before the cells, with layout='tokens'; got {prefix} with {layout!r}.")
    layout = "tokens" if prefix else layout
    name = model_class if isinstance(model_class, str) else model_class.__name__
    patches = _FAMILIES.get(name, Family()).patches
    _FAMILIES[name] = Family(features=features, layout=layout, prefix=prefix, scores=scores, patches=patches)


def family_of(model: nn.Module) -> Family:
    """What is known about the model's class.

    Raises:
        UnsupportedModelError: the family is refused by name.
    """
    known = (_FAMILIES[base.__name__] for base in type(model).__mro__ if base.__name__ in _FAMILIES)
    family = next(known, Family())
    refused = _refusal(model, family)
    if refused:
        raise UnsupportedModelError(f"{type(model).__name__} is not supported: {refused}")
    return family


def _refusal(model: nn.Module, family: Family) -> str:
    config: Any = getattr(model, "config", None)
    if getattr(config, "model_type", "") == "hiera" and config.num_query_pool < len(config.depths) - 1:
        return (
            f"with num_query_pool={config.num_query_pool} of {len(config.depths)} stages its features end in the order of "
            "its pooling units, not in that of the image."
        )
    return family.refused


def refused_families() -> dict[str, str]:
    """Class names refused by name, with the reason."""
    return {name: family.refused for name, family in _FAMILIES.items() if family.refused}
