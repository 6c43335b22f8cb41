"""The PEFT tuner: it puts a `ShapleyLayer` beside LoRA on the base model."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftModel
from peft.functional import set_adapter
from peft.tuners.lora import LoraLayer, LoraModel
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from typing_extensions import override

from shapadapter import __version__
from shapadapter.adapter.checks import (
    MIXED,
    check_base,
    check_fits,
    check_loaded,
    check_merge,
    check_modules,
    check_one,
    check_restorable,
    check_wrappable,
)
from shapadapter.adapter.config import ShapleyConfig
from shapadapter.adapter.head import start_from_classifiers
from shapadapter.adapter.layer import CHILD, ShapleyLayer
from shapadapter.adapter.saving import describe
from shapadapter.adapter.tuning import check_batch_independent, check_trainable, resolve_training
from shapadapter.backbone import Anatomy, choose_removal, measure_offset, original_name, settle
from shapadapter.core.errors import CheckpointError, FieldError, ShapleyError, UnsupportedModelError

# What PEFT makes of names and options that are of the right kind and mean nothing to it.
_NO_SENSE = (ValueError, TypeError, LookupError, AttributeError, re.error)


class ShapleyModel(LoraModel):
    """LoRA with a Shapley token and a projection head; made by `get_peft_model(model, ShapleyConfig(...))`.

    Nothing lives on this object: PEFT throws it away on several roads. See `ShapleyLayer`.
    """

    prefix = "lora_"
    tuner_layer_cls = (LoraLayer, ShapleyLayer)  # type: ignore[assignment]

    def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
        before = dict(getattr(model, "peft_config", {}))
        try:
            super().__init__(model, *args, **kwargs)
        except BaseException:
            # Both are written before anything is tried, the second by transformers.
            if hasattr(model, "peft_config"):
                model.peft_config.clear()
                model.peft_config.update(before)
            elif vars(model).get("_hf_peft_config_loaded"):
                model._hf_peft_config_loaded = False
            raise

    def inject_adapter(self, model: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Put adapter `adapter_name` into `model`, in place, and prove that it is harmless.

        Raises:
            UnsupportedModelError: the model's parts or weights were not found, the self-test failed, or other adapters
                are there.
            CheckpointError: the config was saved for another base or class count.
        """
        check_loaded(model)
        with _gathered(model):
            # PEFT hands the user's own object in; what is written here belongs to this model alone.
            config: Any = copy.deepcopy(self.peft_config[adapter_name])
            self.peft_config[adapter_name] = config
            layer = getattr(model, CHILD, None)
            check_wrappable(model, config.tune, {} if layer is None else layer.configs)
            with _without_layer(model, layer):
                anatomy = _prepare(model, config, layer)
                try:
                    with _restored_on_failure(model, adapter_name, layer):
                        super().inject_adapter(model, adapter_name, *args, **kwargs)
                except _NO_SENSE as error:
                    raise UnsupportedModelError(
                        f"PEFT cannot put this adapter on {type(model).__name__}: {' '.join(str(error).split())[:300]}"
                    ) from error
                _show_geometry(model)
            if layer is None:
                # Only now: were a tuner layer there before the first injection, PEFT would not freeze the base.
                layer = ShapleyLayer(anatomy)
                setattr(model, CHILD, layer)
            self._add_to_layer(model, layer, adapter_name, config)

    def _add_to_layer(self, model: PreTrainedModel, layer: ShapleyLayer, name: str, config: ShapleyConfig) -> None:
        anatomy = layer.anatomy
        # On the device where the features come out.
        parameters = (*model.get_submodule(anatomy.source).parameters(), *model.parameters())
        layer.add(name, config, parameters[0].device)
        classifiers = [  # the linear layers that run after the final features
            module
            for path, module in model.named_modules()
            if original_name(path) in anatomy.behind
            and isinstance(module, nn.Linear)
            and ".modules_to_save." not in path
        ]
        nulls: Any = layer.lora_shapley_null
        vote = layer.head(name).vote.weight
        start_from_classifiers(vote, nulls.get(name), classifiers, unit_norm=anatomy.kind == "matching")
        layer.detach(model)
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
        layer = _layer_of(self.model)
        if merge:
            check_merge(self.model, layer.active_adapters, adapter_names, safe_merge)
        if merge and any(layer.rules[name].prediction == "vote" for name in layer.active_adapters):
            warnings.warn(
                "The adapter predicts with its projection head (prediction='vote'), which a plain model does not have: "
                "the merged model predicts with the base model's own classifier, which was not trained. Keep the "
                "adapter, or train with prediction='classifier'.",
                stacklevel=3,
            )
        plain: Any = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        layer.detach(self.model)
        delattr(self.model, CHILD)
        return plain

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Fold LoRA into the base weights, with token and head as they are; `unmerge_adapter` takes it back.

        Raises:
            ShapleyError: another adapter than the active one is named, or a layer computes with other weights than its own.
        """
        check_merge(self.model, _layer_of(self.model).active_adapters, adapter_names, safe_merge)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)
        modules = list(self.model.modules())
        merged = next((m.merged_adapters for m in modules if isinstance(m, LoraLayer) and m.merged), [])
        for module in modules:
            if isinstance(module, AuxiliaryTrainingWrapper):
                module.merged_adapters = merged  # the same list, which unmerging empties

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make one adapter the active one.

        Raises:
            ShapleyError: several are named.
            ValueError: there is no adapter of this name.
        """
        if unknown := set(check_one(adapter_name)) - set(self.peft_config):
            raise ValueError(f"Adapter {sorted(unknown)[0]} does not exist; there are {sorted(self.peft_config)}.")
        super().set_adapter(adapter_name, inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; in place of the active one the first of the others becomes active, in all parts.

        Raises:
            ValueError: there is no adapter of this name, or it is merged.
        """
        others = sorted(set(self.peft_config) - {adapter_name})
        # Left to itself, each layer would choose among the adapters that it has.
        if others and adapter_name in self.active_adapters and not _layer_of(self.model).merged:
            warnings.warn(f"{adapter_name!r} is deleted; {others[0]!r} is the active adapter now.", stacklevel=2)
            self.set_adapter(others[0])
        super().delete_adapter(adapter_name)

    def add_weighted_adapter(self, adapters: list[str], *args: Any, **kwargs: Any) -> None:
        """Not possible.

        Raises:
            ShapleyError: always.
        """
        raise ShapleyError(
            "add_weighted_adapter is not possible with Shapley adapters: LoRA can be added up, but their heads and tokens, "
            f"which are not linear, cannot. Average the outputs of {list(adapters)}, one call for each after "
            "model.set_adapter(name), or train one adapter on all the data."
        )

    @override
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("adapter_names") is not None:
            raise ShapleyError(MIXED)
        return super()._enable_peft_forward_hooks(*args, **kwargs)

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
        # As the module is called, and not as PEFT names it: transformers inserts the adapter's name in front of ".weight".
        dora = f"lora_magnitude_vector.{adapter_name}"
        saved = {f"{key}.weight" if key.endswith(dora) else key: value for key, value in saved.items()}
        layer = _layer_of(model)
        check_restorable(model, layer.anatomy, layer.rules, config, saved)
        active = adapter_name in layer.active_adapters
        if active and config.problem_type is None and layer.anatomy.kind != "matching":
            # Where it was left open, transformers has decided it by the first labels.
            config.problem_type = model.config.problem_type
        describe(model, layer, config, saved)
        return saved

    @classmethod
    @override
    def _convert_state_dict_for_initial_model(cls, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        raise CheckpointError(
            "path_initial_model_for_weight_conversion is for LoRA that has rewritten the base model's weights, which a "
            "Shapley adapter does not. Save without it."
        )

    @classmethod
    @override
    def _remap_adapter_state_dict_for_load(
        cls, model: Any, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        state = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        check_fits(model, adapter_name, state)
        return state


def _layer_of(model: nn.Module) -> ShapleyLayer:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    layer = getattr(base, CHILD, None)
    if not isinstance(layer, ShapleyLayer):
        raise UnsupportedModelError(f"{type(base).__name__} has no Shapley adapter.")
    return layer


@contextmanager
def _gathered(model: nn.Module) -> Iterator[None]:
    """The weights of a model, whole in every process while the context lasts; changes to them are not kept.

    transformers splits them while it loads a model after `TrainingArguments` of ZeRO-3 were made.
    """
    split = [parameter for parameter in model.parameters() if hasattr(parameter, "ds_id")]
    if not split:
        yield
        return
    import deepspeed  # which is there, as it split them

    with deepspeed.zero.GatheredParameters(split):
        yield


@contextmanager
def _without_layer(model: PreTrainedModel, layer: ShapleyLayer | None) -> Iterator[None]:
    """Take an existing layer and its hooks off while PEFT works: it would match target names in it and copy hooks."""
    if layer is None:
        yield
        return
    layer.detach(model)
    delattr(model, CHILD)
    try:
        yield
    finally:
        setattr(model, CHILD, layer)
        layer.attach(model)


@contextmanager
def _restored_on_failure(model: nn.Module, name: str, layer: ShapleyLayer | None) -> Iterator[None]:
    """Take LoRA and copies of modules out again if PEFT comes to a layer that it cannot adapt, or is interrupted."""
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        if layer is None or name not in layer.rules:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # which adapter each layer chooses: see below
                _take_out(model, name)
                if layer is not None:
                    set_adapter(model, layer.active_adapters)
        for parameter, flag in trained:
            parameter.requires_grad = flag
        raise


def _take_out(model: nn.Module, name: str) -> None:
    """Delete adapter `name`, and every layer of PEFT's that holds no other."""
    for path, module in reversed(list(model.named_modules())):  # the inner before the outer
        if isinstance(module, LoraLayer):
            module.delete_adapter(name)
            original = module.base_layer
        elif isinstance(module, AuxiliaryTrainingWrapper):
            module.delete_adapter(name, new_active_adapters=None)
            original = module.original_module
        else:
            continue
        if not module._get_available_adapters():
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, original)


def _show_geometry(model: nn.Module) -> None:
    """Let an adapted convolution answer for its size and stride: MobileNet asks for them to pad its input."""
    for module in model.modules():
        if isinstance(module, LoraLayer) and isinstance(base := module.get_base_layer(), nn.Conv2d):
            for name in ("kernel_size", "stride", "dilation", "padding", "groups"):
                setattr(module, name, getattr(base, name))


def _prepare(model: PreTrainedModel, config: ShapleyConfig, layer: ShapleyLayer | None) -> Anatomy:
    """Write into an adapter's config all that it says of this model; nothing is changed yet in a model that is refused."""
    check_batch_independent(model)
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
        raise FieldError(
            f"fill_color needs one number for each of {anatomy.channels} channels, got {list(config.fill_color)}."
        )
    config.mechanism = anatomy.mechanism
    if config.grid is not None and config.cell_offset is None:
        config.cell_offset = measure_offset(model, anatomy)
    resolve_training(model, anatomy, config, CHILD)
    check_trainable(model, config)
    check_base(model, anatomy, config)
    check_modules(model, config)
    config.check()  # what was written into it, too, must be such as can be loaded again
    config.shapadapter_version = __version__
    if config.auto_mapping is None:
        # PEFT writes it for a PeftModel alone; AutoPeftModel needs it for what `model.add_adapter` made, too.
        config.auto_mapping = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
    return anatomy
