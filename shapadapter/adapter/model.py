"""The PEFT tuner: it puts a `ShapleyLayer` beside LoRA on the base model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer, LoraModel
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import Tensor, nn
from transformers import PreTrainedModel
from typing_extensions import override

from shapadapter import __version__
from shapadapter.backbone import (
    Anatomy,
    choose_removal,
    default_targets,
    linear_layers,
    measure_offset,
    settle,
    trainable_parts,
)
from shapadapter.errors import UnsupportedModelError

from .cards import note
from .config import ShapleyConfig
from .guard import (
    check_base,
    check_complete,
    check_mergeable,
    check_restorable,
    refuse_mixture,
    refuse_stacking,
    refuse_unloaded,
)
from .layer import ShapleyLayer
from .quantised import check_apart, check_trainable
from .start import start_from_classifier
from .zero import whole

CHILD = "shapley"

# Ways to initialise LoRA that take part of the base weights into the adapter.
_REWRITING = ("pissa", "olora", "corda", "loftq")


class ShapleyModel(LoraModel):
    """LoRA with a Shapley token and a projection head; made by `get_peft_model(model, ShapleyConfig(...))`.

    Nothing lives on this object: PEFT throws it away on several roads. See `ShapleyLayer`.
    """

    prefix = "lora_"
    tuner_layer_cls = (LoraLayer, ShapleyLayer)  # type: ignore[assignment]

    def inject_adapter(self, model: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Put adapter `adapter_name` into `model`, in place, and prove that it is harmless.

        Raises:
            UnsupportedModelError: the model's parts or weights were not found, the self-test failed, or other adapters
                are there.
            CheckpointError: the config was saved for another base or class count.
        """
        refuse_unloaded(model)
        with whole(model):
            self._inject(model, adapter_name, *args, **kwargs)

    def _inject(self, model: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        # PEFT hands the user's own object in; what is written here belongs to this model alone.
        config: Any = copy.deepcopy(self.peft_config[adapter_name])
        self.peft_config[adapter_name] = config
        layer = getattr(model, CHILD, None)
        refuse_stacking(model, set(layer.rules) if layer is not None else set())
        refuse_mixture(config.tune, set(layer.tunes.values()) if layer is not None else set())
        with _without_layer(model, layer):
            # Before anything is changed, so that a refused model is as it was.
            check_apart(model)
            anatomy = _fit(model, config, layer)
            _resolve_training(model, anatomy, config)
            check_trainable(model, config)
            check_base(model, anatomy, config)
            config.shapadapter_version = __version__
            if config.auto_mapping is None:
                # PEFT writes it for a PeftModel alone; AutoPeftModel needs it for what `model.add_adapter` made, too.
                config.auto_mapping = {
                    "base_model_class": type(model).__name__,
                    "parent_library": type(model).__module__,
                }
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            _show_geometry(model)
        if layer is None:
            # Only now: were a tuner layer there before the first injection, PEFT would not freeze the base.
            layer = ShapleyLayer(anatomy)
            setattr(model, CHILD, layer)
        self._add_to_layer(model, layer, adapter_name, config)

    def _add_to_layer(self, model: PreTrainedModel, layer: ShapleyLayer, name: str, config: ShapleyConfig) -> None:
        layer.add(name, config, _last_device(model, layer.anatomy))
        start_from_classifier(model, layer, name)
        layer.detach()
        layer.attach(model)
        layer.set_adapter([a for a in self.active_adapters if a in layer.rules], inference_mode=config.inference_mode)
        layer.train(model.training)

    @override
    def _unload_and_optionally_merge(  # type: ignore[override]
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        layer = getattr(self.model, CHILD)
        if merge:
            check_mergeable(self.model)
        if merge and layer.active is not None and layer.rules[layer.active].prediction == "vote":
            warnings.warn(
                "The adapter predicts with its projection head (prediction='vote'), which a plain model does not have: "
                "the merged model predicts with the base model's own classifier, which was not trained. Keep the "
                "adapter, or train with prediction='classifier'.",
                stacklevel=3,
            )
        layer.detach()
        delattr(self.model, CHILD)
        bare: Any = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        return bare

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Fold LoRA into the base weights, with token and head as they are; `unmerge_adapter` takes it back.

        Raises:
            ShapleyError: a convolution computes with other weights than its own.
        """
        check_mergeable(self.model)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    @classmethod
    @override
    def _get_adapter_state_dict(
        cls,
        model: Any,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        saved = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        layer = _layer_of(model)
        check_restorable(model, layer, config, saved)
        if config.problem_type is None and layer.anatomy.kind != "matching":
            # Where it was left open, transformers has settled it by the first labels.
            config.problem_type = model.config.problem_type
        note(model, layer, config, saved)
        return saved

    @classmethod
    @override
    def _remap_adapter_state_dict_for_load(
        cls, model: Any, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        check_complete(model, config, adapter_name, state_dict)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


def _layer_of(model: nn.Module) -> ShapleyLayer:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    layer = getattr(base, CHILD, None)
    if not isinstance(layer, ShapleyLayer):
        raise UnsupportedModelError(f"{type(base).__name__} has no Shapley adapter.")
    return layer


@contextmanager
def _without_layer(model: PreTrainedModel, layer: ShapleyLayer | None) -> Iterator[None]:
    """Take an existing layer and its hooks off while PEFT works: it would match target names in it and copy hooks."""
    if layer is None:
        yield
        return
    layer.detach()
    delattr(model, CHILD)
    try:
        yield
    finally:
        setattr(model, CHILD, layer)
        layer.attach(model)


def _show_geometry(model: nn.Module) -> None:
    """Let an adapted convolution answer for its size and stride: MobileNet asks for them to pad its input."""
    for module in model.modules():
        if isinstance(module, LoraLayer) and isinstance(base := module.get_base_layer(), nn.Conv2d):
            for name in ("kernel_size", "stride", "dilation", "padding", "groups"):
                setattr(module, name, getattr(base, name))


def _fit(model: nn.Module, config: ShapleyConfig, layer: ShapleyLayer | None) -> Anatomy:
    """Find the parts of the model and settle how this adapter's game is played on it."""
    if layer is None:
        anatomy, config.removal = settle(model, config.removal, config.grid, config.shapley_token)
    else:
        anatomy = layer.anatomy
        config.removal = choose_removal(model, anatomy, config.removal, config.grid, config.shapley_token)
    if anatomy.kind == "headless" and config.prediction == "classifier":
        raise UnsupportedModelError(
            f"{type(model).__name__} has no classifier to predict with. Use ShapleyConfig(prediction='vote'), which brings "
            "a head of its own, or load the model with AutoModelForImageClassification."
        )
    if config.fill_color is not None and len(config.fill_color) != anatomy.channels:
        raise ValueError(
            f"fill_color needs one number for each of {anatomy.channels} channels, got {list(config.fill_color)}."
        )
    config.mechanism = anatomy.mechanism
    if config.grid is not None and config.cell_offset is None:
        config.cell_offset = measure_offset(model, anatomy)
    return anatomy


def _resolve_training(model: nn.Module, anatomy: Anatomy, config: ShapleyConfig) -> None:
    """Say in PEFT's words what `tune` means for this model."""
    if str(config.init_lora_weights).lower().startswith(_REWRITING):
        raise ValueError(
            f"init_lora_weights={config.init_lora_weights!r} rewrites the base model's weights, which the checkpoint "
            "would not contain. Use True, 'gaussian' or 'orthogonal'."
        )
    if config.tune != "lora":
        if config.target_modules not in (None, set(), []) and not _is_dummy(config.target_modules):
            raise ValueError(f"tune={config.tune!r} trains no LoRA; leave target_modules empty or use tune='lora'.")
        config.target_modules = DUMMY_TARGET_MODULES
    elif config.target_modules is None:
        config.target_modules = default_targets(model, anatomy)
    elif config.target_modules == "all-linear":
        # PEFT's own meaning would include the classifier.
        config.target_modules = linear_layers(model, anatomy)
    if config.tune == "full":
        parts = trainable_parts(model, anatomy, config.prediction, CHILD)
        config.modules_to_save = sorted({*(config.modules_to_save or []), *parts})


def _is_dummy(targets: Any) -> bool:
    return targets == DUMMY_TARGET_MODULES or targets == {DUMMY_TARGET_MODULES}


def _last_device(model: nn.Module, anatomy: Anatomy) -> torch.device:
    """Where the features come out."""
    parameters = (*model.get_submodule(anatomy.source).parameters(), *model.parameters())
    return parameters[0].device
