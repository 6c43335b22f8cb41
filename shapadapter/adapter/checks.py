"""What an adapter is checked for: at wrapping, loading, switching and merging, and before it is saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer, onload_layer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from shapadapter.adapter.weights import base_commit, base_fingerprint, is_quantised, not_finite, same_fingerprint
from shapadapter.backbone import Anatomy
from shapadapter.core.errors import CheckpointError, ShapleyError, UnsupportedModelError
from shapadapter.data.classes import class_names

if TYPE_CHECKING:
    from shapadapter.adapter.config import ShapleyConfig

MIXED = (
    "adapter_names is not possible with Shapley adapters: token and head are one adapter's for the whole batch. Call the "
    "model once for each adapter, after model.set_adapter(name)."
)

_PREFIX = "base_model.model."
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


# -- wrapping ----------------------------------------------------------------------------------------------------------


def check_wrappable(model: nn.Module, tune: str, others: Mapping[str, ShapleyConfig]) -> None:
    """Refuse a base model that holds what the new adapter's checkpoint could not describe; `others` are its Shapley adapters."""
    if isinstance(model, PeftModel):
        raise UnsupportedModelError(
            "The model is a PeftModel already. Wrap the base model instead: get_peft_model(model.unload(), ShapleyConfig(...)); "
            "ShapleyConfig trains LoRA itself. A second Shapley adapter is added by model.add_adapter(name, config)."
        )
    if foreign := _foreign_adapters(model, others):
        raise UnsupportedModelError(
            f"The model already holds other adapters {foreign}, which the Shapley adapter's checkpoint would not "
            "describe. Merge them first (merge_and_unload) and wrap the result; ShapleyConfig trains LoRA itself."
        )
    for other in {config.tune for config in others.values()}:
        if {tune, other} == {"lora", "full"}:  # PEFT would look for LoRA inside the full copies
            raise UnsupportedModelError(
                f"The model holds an adapter with tune={other!r}; one with tune={tune!r} cannot be added, because "
                "LoRA and full training of one backbone cannot be saved side by side. Use a second copy of the base model."
            )


def check_loaded(model: nn.Module) -> None:
    """Refuse a model whose weights this process does not hold: wrapping tries it on a tiny batch."""
    elsewhere = next((n for n, p in model.named_parameters() if p.is_meta), None)
    if elsewhere is not None:
        raise UnsupportedModelError(
            f"The weights of {type(model).__name__} are not all in this process: {elsewhere} is on the meta device, and "
            "wrapping tries the model on a tiny batch. Load all of them in every process, and offload the model after it was "
            "wrapped or its adapter loaded, accelerate.cpu_offload(model); with FSDP set fsdp_cpu_ram_efficient_loading: false in "
            "accelerate's config."
        )


def _foreign_adapters(model: nn.Module, own: Mapping[str, Any]) -> list[str]:
    """Names of adapters that are not among the model's Shapley adapters."""
    layers = (module for module in model.modules() if isinstance(module, BaseTunerLayer))
    return sorted({name for layer in layers for name in layer._get_available_adapters()} - set(own))


def check_base(model: PreTrainedModel, anatomy: Anatomy, config: ShapleyConfig) -> None:
    """Write down what the adapter is made for or, if that is written already, check it against the base model."""
    fingerprint = base_fingerprint(model, anatomy, config)
    if config.num_classes is None:
        config.num_classes, config.base_fingerprint = anatomy.classes, fingerprint
        config.revision = config.revision or base_commit(model)  # what the user says comes first
        if anatomy.kind != "matching":  # where the classes are the texts of each call
            config.id2label = dict(enumerate(class_names(model.config.id2label, anatomy.classes)))
            if model.config.id2label != config.id2label:  # in any order, or with indices in letters, as json has them
                model.config.id2label = dict(config.id2label)
            config.problem_type = model.config.problem_type
        return
    own_head = config.prediction == "vote" and anatomy.kind != "matching"  # the adapter brings its classes along
    if config.num_classes != anatomy.classes and not own_head:
        labels = list((config.id2label or {}).values())
        some = ", ".join(labels[:3]) + (", ..." if len(labels) > 3 else "")
        raise CheckpointError(
            f"The adapter predicts {config.num_classes} classes ({some}), the base model has "
            f"{anatomy.classes}. Load the base with AutoModelForImageClassification.from_pretrained("
            f"{config.base_model_name_or_path!r}, num_labels={config.num_classes}, ignore_mismatched_sizes=True)."
        )
    if not same_fingerprint(config.base_fingerprint, fingerprint):
        raise CheckpointError(_other_base(model, config))


def _other_base(model: PreTrainedModel, config: ShapleyConfig) -> str:
    name, kind = config.base_model_name_or_path, type(model).__name__
    pinned = f", revision={config.revision!r}" if config.revision else ""
    came, commit = getattr(model, "name_or_path", "") or "a model made from a configuration", base_commit(model)
    return (
        f"The adapter was made for another base model than this {kind}: its weights differ. Expected those of {name!r}"
        f"{f' at revision {config.revision}' if config.revision else ''}, got {came}"
        f"{f' at revision {commit}' if commit else ''}. Load the base it was trained on: "
        f"{kind}.from_pretrained({name!r}{pinned}), then PeftModel.from_pretrained(base, adapter); or both by "
        "shapadapter.load(adapter). If that base has a new, random classifier, save the base once and load it from there, "
        "or train the classifier with ShapleyConfig(train_classifier=True)."
    )


# -- loading -----------------------------------------------------------------------------------------------------------


def check_modules(model: nn.Module, config: ShapleyConfig) -> None:
    """Refuse a weight file that lacks part of a module it should bring along, before PEFT looks for it."""
    names = tuple(config.modules_to_save or ())
    if config.saved is None or not names:
        return
    for path, module in model.named_modules():
        if not path.endswith(names):
            continue
        original = module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module
        for key, value in original.state_dict().items():
            shape = config.saved.get(f"{_PREFIX}{path}.{key}")
            if shape != tuple(value.shape) and ".original_module." not in f".{path}.{key}":
                came = "lacks it" if shape is None else f"holds one of shape {shape}"
                raise CheckpointError(
                    f"The adapter brings {path} along, with {key} of shape {tuple(value.shape)}, and its weight file {came}: "
                    "it was changed, or made for another base model."
                )


@torch.no_grad()
def check_fits(model: nn.Module, name: str, state: dict[str, Tensor]) -> None:
    """Refuse weights that lack part of adapter `name`, which would stay random, or that do not fit into the model."""
    places: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    if any("_fsdp_wrapped_module" in place or "_flat_param" in place for place in places):
        return  # they have other names and shapes there
    places = {place.removeprefix(_PREFIX): value for place, value in places.items()}
    saved = {key.removeprefix(_PREFIX): value for key, value in state.items()}
    expected = [place for place in places if "lora_" in place and name in place.split(".")]
    if missing := sorted(set(expected) - set(saved)):
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


# -- saving ------------------------------------------------------------------------------------------------------------


def check_restorable(
    model: nn.Module, anatomy: Anatomy, own: Mapping[str, Any], config: ShapleyConfig, saved: dict[str, Any]
) -> None:
    """Refuse to save an adapter, with the state dict `saved`, from which the model could not be restored.

    `own` are the model's Shapley adapters by name, `config` is of the one that is saved.
    """
    away = next((name for name, tensor in saved.items() if tensor.is_meta), None)
    if away is not None:
        raise CheckpointError(
            f"Not saved: the adapter's weights are offloaded, e.g. {away}. Save it before, or take accelerate's hooks off "
            "first: accelerate.hooks.remove_hook_from_submodules(model)."
        )
    if foreign := _foreign_adapters(model, own):
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
    if not merged and not same_fingerprint(config.base_fingerprint, base_fingerprint(base, anatomy, config)):
        raise CheckpointError(
            "Not saved: the base model's own weights have changed since it was wrapped, and the checkpoint would not "
            "contain them. Train the backbone with ShapleyConfig(tune='full') or modules_to_save=[...]."
        )


# -- several adapters: LoRA, copies of `modules_to_save` and head have to be of the same one ---------------------------


def check_one(names: str | Sequence[str]) -> list[str]:
    """The names as a list; refuses several."""
    names = [names] if isinstance(names, str) else list(names)
    if len(names) > 1:
        raise ShapleyError(
            f"One Shapley adapter can be active at a time, got {names}: the logits are shared out by one head."
        )
    return names


def check_agreement(parts: list[Any], name: str) -> None:
    """Refuse a call in which LoRA, or a copy of `modules_to_save`, in `parts` is not of adapter `name`, the head's.

    Some ways to switch, merge or delete adapters pass the Shapley layer by, or reach it when others have been switched.
    """
    for part in parts:
        in_force = part.merged_adapters or part.active_adapters
        if in_force == [name] and not part.disable_adapters:
            continue
        held = part._get_available_adapters()
        came = [] if part.disable_adapters else [other for other in in_force if other in held]
        if came != [name] * (name in held):
            others = f"the weights of {' and '.join(map(repr, came))}" if came else "no adapter"
            raise ShapleyError(
                f"The head of adapter {name!r} is active with {others} in another part of the model, which would "
                f"explain something else. Switch all parts together: model.set_adapter({name!r})."
            )


# -- merging -----------------------------------------------------------------------------------------------------------


def check_mergeable(model: nn.Module) -> None:
    """Refuse to merge LoRA where the sum of the weights does not compute the sum of the layers.

    A convolution may standardise its weights before it uses them, as BiT's and NFNet's do; sums of quantised ones are rounded.
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


@torch.no_grad()
def check_merge(model: nn.Module, active: list[str], asked: list[str] | None, safe: bool) -> None:
    """Refuse what cannot be merged before anything is; `asked` has to be the active adapter, the default.

    Each layer is merged and that taken back, bit for bit.
    """
    check_mergeable(model)
    if asked is not None and list(asked) != active:
        raise ShapleyError(
            f"Only the active adapter {active} can be merged, because its head explains the merged weights; got {asked}. "
            "Switch first: model.set_adapter(name)."
        )
    for module in model.modules():
        if not isinstance(module, LoraLayer) or module.merged:
            continue
        with onload_layer(module):
            kept = [(p, p.data, p.data.clone()) for p in module.get_base_layer().parameters()]
            try:
                module.merge(safe_merge=safe, adapter_names=active)
            finally:
                for parameter, data, values in kept:
                    parameter.data = data.copy_(values)
                module.merged_adapters.clear()
