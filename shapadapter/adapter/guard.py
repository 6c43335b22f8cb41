"""Checks on an adapter and its base: at wrapping, at loading, and before saving what could not be restored."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from shapadapter.adapter.config import ShapleyConfig
from shapadapter.adapter.fingerprint import base_fingerprint, commit_of, same_fingerprint
from shapadapter.adapter.layer import ShapleyLayer
from shapadapter.adapter.tuning import is_quantised
from shapadapter.adapter.weights import not_finite
from shapadapter.backbone import Anatomy
from shapadapter.core.errors import CheckpointError, ShapleyError, UnsupportedModelError
from shapadapter.data.classes import class_names

_PREFIX = "base_model.model."
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def refuse_stacking(model: nn.Module, known: set[str]) -> None:
    """Refuse a model that holds adapters other than Shapley ones: the checkpoint would not describe them.

    Args:
        model: the base model.
        known: names of the Shapley adapters it may hold.

    Raises:
        UnsupportedModelError: another adapter is there.
    """
    if isinstance(model, PeftModel):
        raise UnsupportedModelError(
            "The model is a PeftModel already. Wrap the bare model, get_peft_model(model.unload(), ShapleyConfig(...)); "
            "ShapleyConfig trains LoRA itself. A second Shapley adapter is added by model.add_adapter(name, config)."
        )
    foreign = sorted(_adapter_names(model) - known)
    if foreign:
        raise UnsupportedModelError(
            f"The model already holds other adapters {foreign}, which the Shapley adapter's checkpoint would not "
            "describe. Merge them first (merge_and_unload) and wrap the result; ShapleyConfig trains LoRA itself."
        )


def refuse_unloaded(model: nn.Module) -> None:
    """Refuse a model whose weights this process does not hold: wrapping tries it on a tiny batch.

    Raises:
        UnsupportedModelError: a weight is on the meta device.
    """
    elsewhere = next((n for n, p in model.named_parameters() if p.is_meta), None)
    if elsewhere is not None:
        raise UnsupportedModelError(
            f"The weights of {type(model).__name__} are not all in this process: {elsewhere} is on the meta device, and "
            "wrapping tries the model on a tiny batch. Load it whole, in every process; offload it after it was wrapped or "
            "its adapter loaded, accelerate.cpu_offload(model); with FSDP set fsdp_cpu_ram_efficient_loading: false in "
            "accelerate's config."
        )


def refuse_mixture(tune: str, others: set[str]) -> None:
    """Refuse LoRA and full training side by side on one model: PEFT would look for LoRA inside the full copies.

    Raises:
        UnsupportedModelError: one adapter trains by LoRA, another the full backbone.
    """
    for other in others:
        if {tune, other} == {"lora", "full"}:
            raise UnsupportedModelError(
                f"The model holds an adapter with tune={other!r}; one with tune={tune!r} cannot be added, because "
                "LoRA and full training of one backbone cannot be saved side by side. Use a second copy of the base model."
            )


def _adapter_names(model: nn.Module) -> set[str]:
    names: set[str] = set()
    for module in model.modules():
        if isinstance(module, BaseTunerLayer) and not isinstance(module, ShapleyLayer):
            names |= module._get_available_adapters()
    return names


def check_base(model: PreTrainedModel, anatomy: Anatomy, config: ShapleyConfig) -> None:
    """Write down what the adapter is made for or, if that is written already, check it against the base model.

    Raises:
        CheckpointError: the adapter was made for another number of classes or another base.
        ShapleyError: the base model's classes are not named by 0..K-1.
    """
    fingerprint = base_fingerprint(model, anatomy, config)
    if config.num_classes is None:
        config.num_classes, config.base_fingerprint = anatomy.classes, fingerprint
        config.revision = config.revision or commit_of(model)  # what the user says comes first
        if anatomy.kind != "matching":  # where the classes are the texts of each call
            config.id2label = dict(enumerate(class_names(model.config.id2label, anatomy.classes)))
            if model.config.id2label != config.id2label:  # in any order, or with indices in letters, as json has them
                model.config.id2label = dict(config.id2label)
            config.problem_type = model.config.problem_type
        return
    own_head = config.prediction == "vote" and anatomy.kind != "matching"  # the adapter brings its classes along
    if config.num_classes != anatomy.classes and not own_head:
        raise CheckpointError(
            f"The adapter predicts {config.num_classes} classes ({_some(config.id2label)}), the base model has "
            f"{anatomy.classes}. Load the base with AutoModelForImageClassification.from_pretrained("
            f"{config.base_model_name_or_path!r}, num_labels={config.num_classes}, ignore_mismatched_sizes=True)."
        )
    if not same_fingerprint(config.base_fingerprint, fingerprint):
        raise CheckpointError(_other_base(model, config))


def _other_base(model: PreTrainedModel, config: ShapleyConfig) -> str:
    name, kind = config.base_model_name_or_path, type(model).__name__
    pinned = f", revision={config.revision!r}" if config.revision else ""
    came, commit = getattr(model, "name_or_path", "") or "a model made from a configuration", commit_of(model)
    return (
        f"The adapter was made for another base model than this {kind}: its weights differ. Expected those of {name!r}"
        f"{f' at revision {config.revision}' if config.revision else ''}, got {came}"
        f"{f' at revision {commit}' if commit else ''}. Load the base it was trained on: "
        f"{kind}.from_pretrained({name!r}{pinned}), then PeftModel.from_pretrained(base, adapter); or both by "
        "shapadapter.load(adapter). If that base has a new, random classifier, save the base once and load it from there, "
        "or train the classifier with ShapleyConfig(train_classifier=True)."
    )


def _some(labels: dict[int, str] | None) -> str:
    names = list((labels or {}).values())
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def check_restorable(model: nn.Module, layer: ShapleyLayer, config: ShapleyConfig, saved: dict[str, Any]) -> None:
    """Refuse to save an adapter from which the model's state could not be restored.

    Args:
        model: the model that is saved, with or without PEFT's wrapper.
        layer: its Shapley layer.
        config: the adapter's config.
        saved: the adapter's state dict as it would be written.

    Raises:
        CheckpointError: base parameters are trained, or changed, or other adapters are stacked on the model; or weights of
            the adapter are offloaded.
    """
    away = next((name for name, tensor in saved.items() if tensor.is_meta), None)
    if away is not None:
        raise CheckpointError(
            f"Not saved: the adapter's weights are offloaded, e.g. {away}. Save it before, or take accelerate's hooks off "
            "first: accelerate.hooks.remove_hook_from_submodules(model)."
        )
    foreign = sorted(_adapter_names(model) - set(layer.rules))
    if foreign:
        raise CheckpointError(
            f"Not saved: the model also holds adapters {foreign} that are no Shapley adapters; loading this "
            "checkpoint would not bring them back. Delete or merge them first."
        )
    auxiliary = tuple(f"{n}." for n, m in model.named_modules() if isinstance(m, AuxiliaryTrainingWrapper))
    loose = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and name not in saved and "lora_" not in name and not name.startswith(auxiliary)
        if config.bias == "none" or not name.endswith(".bias")
    ]
    if loose:
        raise CheckpointError(
            f"Not saved: {len(loose)} parameters of the base model are trainable but would not be in the checkpoint, "
            f"e.g. {loose[0]}. To train the whole backbone wrap the model with ShapleyConfig(tune='full'); to train "
            "parts of it use modules_to_save=[...]; else freeze them."
        )
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    merged = any(m.merged for m in model.modules() if isinstance(m, BaseTunerLayer))
    if not merged and not same_fingerprint(config.base_fingerprint, base_fingerprint(base, layer.anatomy, config)):
        raise CheckpointError(
            "Not saved: the base model's own weights have changed since it was wrapped, and the checkpoint would not "
            "contain them. Train the backbone with ShapleyConfig(tune='full') or modules_to_save=[...]."
        )


def check_mergeable(model: nn.Module) -> None:
    """Refuse to merge LoRA where the sum of the weights does not compute the sum of the layers.

    Raises:
        ShapleyError: a convolution standardises its weights before it uses them, as BiT's and NFNet's do; or the weights
            are quantised, and their sum would be rounded.
    """
    for name, module in model.named_modules():
        base = module.get_base_layer() if isinstance(module, LoraLayer) else None
        if base is not None and any(map(is_quantised, base.parameters())):
            raise ShapleyError(
                f"The weights of {name} are quantised: what is merged into them is rounded, and the model would predict "
                "something else. Load the base in full precision, the adapter on it, and merge there."
            )
        if isinstance(base, nn.Conv2d) and type(base).forward is not nn.Conv2d.forward:
            raise ShapleyError(
                f"{name} is a {type(base).__name__}, which transforms its weights before it uses them: merged, the model "
                "would predict something else. Keep the adapter unmerged, or choose other target_modules."
            )


def check_modules(model: nn.Module, config: ShapleyConfig) -> None:
    """Refuse a weight file without all of the modules that it should bring along, before PEFT looks for them.

    Raises:
        CheckpointError: a tensor of one is missing, or has another shape.
    """
    whole = tuple(config.modules_to_save or ())
    if config.saved is None or not whole:
        return
    for path, module in model.named_modules():
        if not path.endswith(whole):
            continue
        bare = module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module
        for key, value in bare.state_dict().items():
            shape = config.saved.get(f"{_PREFIX}{path}.{key}")
            if shape != tuple(value.shape) and ".original_module." not in f".{path}.{key}":
                came = "lacks it" if shape is None else f"holds one of shape {shape}"
                raise CheckpointError(
                    f"The adapter brings {path} along, with {key} of shape {tuple(value.shape)}, and its weight file {came}: "
                    "it was changed, or made for another base model."
                )


@torch.no_grad()
def check_fits(model: nn.Module, name: str, state: dict[str, Tensor]) -> None:
    """Refuse a weight file that lacks part of token, head or LoRA, which would stay random, or holds what does not fit.

    Args:
        model: with the adapter, before its weights are loaded.
        name: of the adapter.
        state: the tensors by their names in the model.

    Raises:
        CheckpointError: a tensor is missing, has no place in the model, is of another kind or shape, or not finite.
    """
    places: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    if any("_fsdp_wrapped_module" in place or "_flat_param" in place for place in places):
        return  # they have other names and shapes there
    places = {place.removeprefix(_PREFIX): value for place, value in places.items()}
    saved = {key.removeprefix(_PREFIX): value for key, value in state.items()}
    expected = [place for place in places if "lora_" in place and name in place.split(".")]
    missing = sorted(set(expected) - set(saved))
    if missing:
        raise CheckpointError(
            f"The adapter's weight file lacks {len(missing)} of {len(expected)} tensors of token, head and LoRA, e.g. "
            f"{missing[0]}. It was not written by shapadapter, or not with this configuration."
        )
    for key, value in saved.items():
        place = places.get(key)
        if place is None:
            raise CheckpointError(
                f"The adapter's weight file holds {key}, for which the model has no place: it was not saved with this "
                "configuration, or not for this base model."
            )
        shape = tuple(getattr(place, "ds_shape", place.shape))  # DeepSpeed leaves an empty tensor in its place
        if tuple(value.shape) != shape:
            raise CheckpointError(
                f"The adapter's weight file holds {key} of shape {tuple(value.shape)}, the model expects {shape}: it was not "
                "saved with this configuration, or not for this base model."
            )
        if value.dtype != place.dtype and not (value.dtype in _FLOATS and place.is_floating_point()):
            raise CheckpointError(
                f"The adapter's weight file holds {key} as {value.dtype}, and {place.dtype} or another precision of it "
                "was expected."
            )
        if isinstance(place, nn.Parameter) and not value.isfinite().all():
            raise CheckpointError(not_finite("The adapter's weight file", key))
