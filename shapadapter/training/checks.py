"""What is checked before a training starts, because it would fail, or silently go wrong, only later."""

from __future__ import annotations

import warnings
from typing import Any

from peft import PeftModel
from torch import nn

from shapadapter.adapter import ShapleyLayer
from shapadapter.errors import ShapleyError
from shapadapter.game import active_layer

from .arguments import LORA_LEARNING_RATE, ShapleyTrainingArguments

# A classifier whose logits differ by less than this between images says the same about all of them.
_CONSTANT_SPREAD = 0.05


def check_setting(model: nn.Module, args: ShapleyTrainingArguments, trains: bool) -> None:
    """Refuse what would fail, or silently go wrong, only later.

    Raises:
        ShapleyError: with what to do instead.
    """
    if args.n_gpu > 1:
        raise ShapleyError(
            f"{args.n_gpu} GPUs are visible to one process, which torch would use by DataParallel; its replicas share "
            "one adapter state. Start with accelerate launch, or set CUDA_VISIBLE_DEVICES=0."
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ShapleyError(
            "The model's weights are offloaded, or were never loaded: they are on the meta device, and the Trainer cannot "
            "move them. Train it before it is offloaded; an offloaded one can be explained and evaluated."
        )
    if trains and not any(parameter.requires_grad for parameter in model.parameters()):
        raise ShapleyError(
            "No parameter is trainable. Load the adapter with PeftModel.from_pretrained(..., is_trainable=True)."
        )
    own = {id(parameter) for parameter in active_layer(model).parameters()}
    alone = all(id(parameter) in own for parameter in model.parameters() if parameter.requires_grad)
    if trains and alone and args.learning_rate != LORA_LEARNING_RATE:
        warnings.warn(
            f"learning_rate={args.learning_rate} has no effect: only token and head are trained, at "
            f"head_learning_rate={args.head_learning_rate}.",
            stacklevel=3,
        )
    if args.load_best_model_at_end and not isinstance(model, PeftModel):
        raise ShapleyError(
            "load_best_model_at_end needs a PeftModel: transformers cannot load the best adapter of a model wrapped "
            "by add_adapter. Wrap it with get_peft_model(model, ShapleyConfig())."
        )


LABEL_REMEDY = (
    "Load the base with AutoModelForImageClassification.from_pretrained(..., id2label=dict(enumerate(names)), "
    "label2id={name: index for index, name in enumerate(names)}, ignore_mismatched_sizes=True), where names are "
    'dataset.features["label"].names.'
)
"""What to do about classes that the model does not have."""


def is_constant(spread: float, classes: int) -> bool:
    """Whether logits that vary by `spread` between images (standard deviation, mean over classes) are a constant's.

    A single output is a regression, whose unit is the user's.
    """
    return classes > 1 and spread < _CONSTANT_SPREAD


def check_classes(dataset: Any, classes: int) -> None:
    """Refuse a data set whose label feature names more classes than the model has.

    Raises:
        ShapleyError: it does.
    """
    for column, feature in (getattr(dataset, "features", None) or {}).items():
        count = getattr(feature, "num_classes", None)
        if column in ("label", "labels") and count is not None and count > classes:
            raise ShapleyError(
                f"The data set's column {column!r} has {count} classes, the model {classes}. {number_remedy(count)}"
            )


def number_remedy(classes: int) -> str:
    """What to do where model and data differ in the number of classes, which have no names."""
    return (
        f"Load the base with AutoModelForImageClassification.from_pretrained(..., num_labels={classes}, "
        "ignore_mismatched_sizes=True)."
    )


def check_game(layer: ShapleyLayer, args: ShapleyTrainingArguments, trains: bool) -> None:
    """Refuse settings that do not fit the active adapter's game.

    Raises:
        ShapleyError: with what to do instead.
    """
    name = layer.active
    if args.coalition_task_weight > 0 and layer.anatomy.kind == "matching":
        raise ShapleyError(
            "coalition_task_weight is for classes; a model that matches images with texts has none. Set it to 0."
        )
    config = layer.configs.get(name or "")
    if trains and config is not None and config.tune == "full" and args.learning_rate == LORA_LEARNING_RATE:
        warnings.warn(
            f"learning_rate={args.learning_rate} is the default for LoRA; with tune='full' it may overwrite what the "
            "model was pretrained for. Pass a smaller one, such as learning_rate=5e-5.",
            stacklevel=3,
        )
    learned = name is not None and name in layer.lora_shapley_fill  # type: ignore[operator]
    if trains and learned and not (args.coalition_gradients or args.coalition_task_weight > 0):
        raise ShapleyError(
            "fill='learned' learns from what coalitions predict: set coalition_task_weight (e.g. 0.5) or "
            "coalition_gradients=True, or use fill='mean'."
        )
