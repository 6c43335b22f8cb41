"""What an adapter trains: layers that LoRA adapts, modules trained in full, and what bases in 8 or 4 bits allow."""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn

from shapadapter.adapter.config import ShapleyConfig
from shapadapter.adapter.weights import float_dtype, is_quantised
from shapadapter.backbone import Anatomy, default_targets, head_parts, linear_layers, original_name, trainable_parts
from shapadapter.core.errors import FieldError, UnsupportedModelError

_log = logging.getLogger(__name__)

# What to start LoRA from that leaves the base model's weights alone; others take part of them into the adapter.
_STARTS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
# Options of LoRA that speak of tokens, or of layers, of language models.
_FOR_TEXTS = ("alora_invocation_tokens", "arrow_config", "layer_replication", "megatron_config")


def resolve_training(model: nn.Module, anatomy: Anatomy, config: ShapleyConfig, own: str) -> None:
    """Say in `target_modules` and `modules_to_save` what `tune` and `train_classifier` mean for this model.

    `own` is the name of the adapter's own child of the model.
    """
    _check_lora(config)
    if config.tune != "lora":
        if config.target_modules not in (None, set(), [], DUMMY_TARGET_MODULES, {DUMMY_TARGET_MODULES}):
            raise FieldError(f"tune={config.tune!r} trains no LoRA; leave target_modules empty or use tune='lora'.")
        config.target_modules = DUMMY_TARGET_MODULES
    elif config.target_modules is None:
        config.target_modules = _in_chosen_layers(default_targets(model, anatomy), config)
    elif config.target_modules == "all-linear":
        # PEFT's own meaning would include the classifier.
        config.target_modules = linear_layers(model, anatomy)
    parts: list[str] = []
    if config.tune == "full":
        predicts = "vote" if config.train_classifier is False else config.prediction
        parts = trainable_parts(model, anatomy, predicts, own)
    elif (
        config.prediction == "classifier"
        and anatomy.kind == "classifier"
        and config.train_classifier is not False
        and config.num_classes is None  # else the adapter was made before, and `modules_to_save` says it
    ):
        parts = _classifier(model, anatomy, config)
    if parts:
        config.modules_to_save = sorted({*(config.modules_to_save or []), *parts})


def _check_lora(config: ShapleyConfig) -> None:
    """Refuse options of LoRA with which an adapter could not be restored, or that do nothing for images."""
    start: Any = config.init_lora_weights
    if start == "lora_ga" and config.num_classes is not None:
        # Saved before it was refused, and then without gradients; the weights come from the file.
        config.init_lora_weights = start = True
    if (start.lower() if isinstance(start, str) else start) not in _STARTS or config.kasa_config is not None:
        option = f"init_lora_weights={start!r}" if config.kasa_config is None else "kasa_config"
        raise FieldError(
            f"{option} is not possible: it rewrites the base model's weights, which the checkpoint would not contain, or is "
            "unknown. Use init_lora_weights=True, 'gaussian', 'orthogonal', 'eva' or 'mica'."
        )
    for option in _FOR_TEXTS:
        if getattr(config, option) is not None:
            raise FieldError(f"{option} is for language models; leave it out.")


def _in_chosen_layers(names: list[str], config: ShapleyConfig) -> list[str]:
    """The default targets in the layers of `layers_to_transform`, which PEFT does not apply to whole names."""
    if config.layers_to_transform is None or not any("." in name for name in names):
        return names
    chosen = []
    for name in names:
        probe: Any = copy.copy(config)
        probe.target_modules = {name.rpartition(".")[2]}
        if "." in name and check_target_module_exists(probe, name):
            chosen.append(name)
    if not chosen:
        raise FieldError(
            f"No layer to adapt is left by layers_to_transform={config.layers_to_transform} with layers_pattern="
            f"{config.layers_pattern}, of {', '.join(names[:3])}, ... Name others, or the layers: target_modules=[...]."
        )
    return chosen


def _classifier(model: nn.Module, anatomy: Anatomy, config: ShapleyConfig) -> list[str]:
    """The parts of the base model's classifier to train, without those of which the user has said how they are trained."""
    paths = [original_name(path) for path, _ in model.named_modules()]
    parts = []
    for head in head_parts(model, anatomy, new=config.train_classifier is None):
        inside = [path for path in paths if f"{path}.".startswith(f"{head}.")]
        around = [path for path in paths if head.startswith(f"{path}.")]
        saved = any(path.endswith(name) for path in (*inside, *around) for name in config.modules_to_save or [])
        if not saved and not any(check_target_module_exists(config, path) for path in inside):
            parts.append(head)
    if parts and config.train_classifier is None:
        _log.warning(
            "%s predicts with a new classifier, which is not in the checkpoint it was loaded from: it is trained, and saved "
            "in the adapter (modules_to_save=%s). ShapleyConfig(train_classifier=False) leaves it as it is.",
            type(model).__name__,
            parts,
        )
    return parts


def check_batch_independent(model: nn.Module) -> None:
    """Refuse layers in which the images and patches of a batch influence each other."""
    for path, module in model.named_modules():
        if getattr(getattr(module, "state", None), "threshold", 0) > 0:  # bitsandbytes
            raise UnsupportedModelError(
                f"{path} looks for outliers in the whole batch, so that removed patches and the Shapley token would "
                "influence the others. Load the base without that: BitsAndBytesConfig(load_in_8bit=True, "
                "llm_int8_threshold=0.0)."
            )


def check_trainable(model: nn.Module, config: ShapleyConfig) -> None:
    """Refuse to train quantised weights, or what lies before those that pass on no gradient."""
    if config.inference_mode:
        return
    parts = set(config.modules_to_save or ())
    for path, module in model.named_modules():
        if parts & {path, f"model.{path}", path.split(".")[-1]} and any(map(is_quantised, module.parameters())):
            way = (
                "tune='full' trains them all. Use tune='lora', or load the base in full precision"
                if config.tune == "full"
                else f"modules_to_save names them. Load the base with them in full precision: BitsAndBytesConfig("
                f"llm_int8_skip_modules=[{path!r}]) or TorchAoConfig(modules_to_not_convert=[{path!r}])"
            )
            raise UnsupportedModelError(f"The weights of {path} are quantised, which cannot be trained, but {way}.")
    if path := end_of_gradients(model):
        raise UnsupportedModelError(
            f"The weights of {path} are quantised in a way that passes on no gradient here, so that nothing before them "
            "would be trained. Use BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0) or TorchAoConfig("
            "Int8WeightOnlyConfig()); bitsandbytes' 4 bits can be trained on a GPU."
        )


def end_of_gradients(model: nn.Module) -> str | None:
    """The path of the first quantised layer where that passes on no gradient, else None."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and is_quantised(module.weight):
            return None if _passes_gradient(module) else path  # the first of them stands for all
    return None


def _passes_gradient(linear: nn.Linear) -> bool:
    trained, kind = linear.training, float_dtype(linear)
    linear.train()
    try:
        with torch.inference_mode(False), torch.enable_grad():
            leaf = torch.ones(2, linear.in_features, device=linear.weight.device, dtype=kind).requires_grad_()
            (gradient,) = torch.autograd.grad(linear(1 * leaf).sum(), leaf)
        return bool(gradient.any())
    except RuntimeError:  # there is no graph, or bitsandbytes writes into what has none
        return False
    finally:
        linear.train(trained)
