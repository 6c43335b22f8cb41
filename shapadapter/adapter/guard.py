"""Checks on an adapter and its base: at wrapping, at loading, and before saving what could not be restored."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from shapadapter.backbone import Anatomy
from shapadapter.errors import CheckpointError, ShapleyError, UnsupportedModelError

from .config import ShapleyConfig
from .fingerprint import base_fingerprint, same_fingerprint
from .layer import ShapleyLayer
from .origin import commit_of
from .quantised import is_quantised


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
    """
    fingerprint = base_fingerprint(model, anatomy, config)
    if config.num_classes is None:
        config.num_classes, config.base_fingerprint = anatomy.classes, fingerprint
        config.revision = config.revision or commit_of(model)  # what the user says comes first
        if anatomy.kind != "matching":  # where the classes are the texts of each call
            config.id2label = {int(index): str(label) for index, label in (model.config.id2label or {}).items()}
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
    if config.id2label:
        model.config.id2label = dict(config.id2label)
        model.config.label2id = {label: index for index, label in config.id2label.items()}
    if config.problem_type is not None:
        model.config.problem_type = config.problem_type  # type: ignore[assignment]


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
        "or train the classifier with modules_to_save=['classifier']."
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


def check_complete(model: nn.Module, config: ShapleyConfig, name: str, state: dict[str, Tensor]) -> None:
    """Refuse a checkpoint in which part of token, head or LoRA is missing: it would stay random, silently.

    Raises:
        CheckpointError: with the missing names.
    """
    expected = {*config.tensors(), *_lora_keys(model, name)}
    missing = sorted(key for key in expected if not any(own.endswith(key) for own in state))
    if missing:
        raise CheckpointError(
            f"The adapter's weight file lacks {len(missing)} of {len(expected)} tensors of token, head and LoRA, e.g. "
            f"{missing[0]}. It was not written by shapadapter, or not with this configuration."
        )


def _lora_keys(model: nn.Module, name: str) -> list[str]:
    return [
        f"{path}.{part}.weight"
        for path, module in model.named_modules()
        if isinstance(module, LoraLayer) and name in module.lora_A
        for part in ("lora_A", "lora_B")
    ]
