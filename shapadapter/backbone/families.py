"""What is known of a model before it runs, with a small table of what a dry run cannot find out."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from torch import nn
from transformers import PreTrainedModel

from shapadapter.core.errors import UnsupportedModelError

Kind = Literal["classifier", "headless", "matching"]
"""Whether a model has scores of its own, has none, or compares images with texts."""

Layout = Literal["tokens", "channels_first", "channels_last", "latents"]
"""How features lie in a tensor: (B, prefix + cells, D), (B, D, rows, cols), (B, rows, cols, D), or (B, L, D) latents
that belong to no place in the image."""


@dataclass(frozen=True)
class Family:
    """What is known of a class of models; the arguments of `register_family` say what the fields mean."""

    features: str | None = None
    layout: Layout | None = None
    prefix: int = 0
    scores: str = "logits"
    patches: bool = (
        False  # images come as patches (B, N, 3 * p * p) with spatial_shapes and pixel_attention_mask (NaFlex)
    )
    refused: str = ""  # why the family is not supported


@dataclass(frozen=True)
class Profile:
    """What is known of a model before it runs."""

    kind: Kind  # a dry run may find a "classifier" to be headless
    family: Family
    named_fields: dict[str, bool] = field(
        default_factory=dict, kw_only=True
    )  # return_dict=True, where forward knows that


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

    Call it before a model is wrapped, also in the program that loads the adapter. It holds for subclasses as well.

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


def profile_of(model: Any) -> Profile:
    """What can be said of a model before it runs; refuses what is no vision model, or of a refused family."""
    config = getattr(model, "config", None)
    if not isinstance(model, nn.Module) or config is None or not hasattr(config, "num_labels"):
        raise UnsupportedModelError(
            f"Expected a Hugging Face vision model (AutoModelForImageClassification.from_pretrained(...)), "
            f"got {type(model).__name__}.{_model_inside(model)}"
        )
    family = next((_FAMILIES[base.__name__] for base in type(model).__mro__ if base.__name__ in _FAMILIES), Family())
    refused = family.refused
    if getattr(config, "model_type", "") == "hiera" and config.num_query_pool < len(config.depths) - 1:
        refused = (
            f"with num_query_pool={config.num_query_pool} of {len(config.depths)} stages its features end in the order of "
            "its pooling units, not in that of the image."
        )
    if refused:
        raise UnsupportedModelError(f"{type(model).__name__} is not supported: {refused}")
    parameters = inspect.signature(model.forward).parameters
    if "pixel_values" not in parameters:
        raise UnsupportedModelError(
            f"Expected a vision model, got {type(model).__name__}, whose forward takes no pixel_values."
            f"{_model_inside(model)}"
        )
    matching = "input_ids" in parameters and hasattr(model, "get_image_features")
    if matching and not isinstance(getattr(model, "logit_scale", None), nn.Parameter):
        raise UnsupportedModelError(
            f"Expected a model that matches images with texts by a scaled product of embeddings, as CLIP and SigLIP do; "
            f"{type(model).__name__} has no logit_scale."
        )
    named = "return_dict" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return Profile(
        kind="matching" if matching else "classifier",
        family=family,
        named_fields={"return_dict": True} if named else {},
    )


def _model_inside(model: Any) -> str:
    """Which model to wrap instead of one that is around it."""
    modules = model.named_modules() if isinstance(model, nn.Module) else ()
    inner = next((name for name, module in modules if name and isinstance(module, PreTrainedModel)), None)
    return "" if inner is None else f" Wrap the model inside: get_peft_model({reached('outer', inner)}, ...)."


def reached(model: str, name: str) -> str:
    """What to type for the submodule `name` of what is called `model`."""
    parts = name.split(".")
    return f"{model}.{name}" if all(map(str.isidentifier, parts)) else f"{model}.get_submodule({name!r})"


def original_name(name: str) -> str:
    """A module's name without the wrappers PEFT puts in between (base_layer, modules_to_save)."""
    kept: list[str] = []
    skip = False
    for part in name.split("."):
        if skip:
            skip = False  # the adapter's name, behind modules_to_save
        elif part == "modules_to_save":
            skip = True
        elif part not in ("original_module", "base_layer"):
            kept.append(part)
    return ".".join(kept)


def refused_families() -> dict[str, str]:
    """Class names refused by name, with the reason."""
    return {name: family.refused for name, family in _FAMILIES.items() if family.refused}
