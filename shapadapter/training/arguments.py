"""Training arguments of the Shapley objective, and whether they fit a model."""

import math
import warnings
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from shapadapter.adapter import ShapleyLayer
from shapadapter.backbone import Anatomy, original_name
from shapadapter.core.errors import ShapleyError

LORA_LEARNING_RATE = 5e-4

TASK_OPTIONS = ("class_weights", "label_smoothing_factor", "mixup_alpha", "cutmix_alpha")
"""Training arguments that say what the task loss is, of one class for each image."""

# Ends of the names of measures, the evaluator's and others, of which less is better. transformers knows "loss" alone.
_LESS_IS_BETTER = ("error", "deletion", "infidelity", "aopc_lerf")


@dataclass
class ShapleyTrainingArguments(TrainingArguments):
    """`TrainingArguments` plus the weight and form of the Shapley loss.

    Changed inherited defaults: `learning_rate=5e-4` and `warmup_steps=0.1` (a tenth of the steps), which suit LoRA; with
    `tune="full"` pass a smaller one, such as 5e-5. `remove_unused_columns=False`, because the collator turns the data
    set's `image` column into `pixel_values`; columns it has no use for are named in a warning. With gradient
    checkpointing, `use_reentrant=False` is enforced. Where `metric_for_best_model` is an error, such as "eval_error",
    `greater_is_better` becomes False unless it is given. What the defaults are worth is measured in docs/benchmarks.md.
    """

    learning_rate: float = field(
        default=LORA_LEARNING_RATE,
        metadata={"help": "Learning rate of LoRA, or of the backbone with tune='full', which wants about 5e-5."},
    )
    warmup_steps: float = field(
        default=0.1, metadata={"help": "Steps, or with a number below 1 share of them, over which rates rise from 0."}
    )
    shapley_weight: float = field(
        default=10.0, metadata={"help": "Weight of the Shapley loss beside the task loss, after the warm-up."}
    )
    shapley_warmup: float = field(
        default=0.3,
        metadata={
            "help": "Share of the training steps over which the weight of the Shapley loss rises linearly from 0. A "
            "model that has not learned its task yet can satisfy the Shapley loss by becoming a constant."
        },
    )
    coalition_pairs: int = field(
        default=1, metadata={"help": "Coalitions, each with its complement, evaluated per image and step."}
    )
    coalition_gradients: bool = field(
        default=False,
        metadata={
            "help": "Whether the Shapley loss also changes the coalitions' values (about twice the step's cost). By "
            "default they are targets."
        },
    )
    coalition_task_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the task loss on the coalitions' own predictions: an augmentation that teaches the "
            "model to predict from part of an image (about twice the step's cost)."
        },
    )
    head_learning_rate: float = field(
        default=3e-3,
        metadata={
            "help": "Learning rate of token and head, which start from nothing; `learning_rate` is that of everything else."
        },
    )
    truncate_texts: bool = field(
        default=False,
        metadata={"help": "Whether captions longer than the model takes are cut; by default they are refused."},
    )
    corrupt_images: Literal["fail", "skip"] = field(
        default="fail",
        metadata={
            "help": "What happens at an image that cannot be read: 'fail' names it and stops, 'skip' leaves it out and "
            "logs how many there were as skipped_images."
        },
    )
    class_weights: list[float] | str | None = field(
        default=None,
        metadata={
            "help": "Weights of the classes in the task loss: a number for each (in a shell: 1,0.5,2), or 'balanced' for "
            "n / (K * n_k) by the n_k of n training images in each of K classes."
        },
    )
    mixup_alpha: float = field(
        default=0.0,
        metadata={"help": "Blend training images with Beta(alpha, alpha), such as 0.8; 0 is off. See cutmix_alpha."},
    )
    cutmix_alpha: float = field(
        default=0.0,
        metadata={
            "help": "Replace a box of whole players of training images by another's with Beta(alpha, alpha), such as 1; 0 "
            "is off. With mixup_alpha, too, each micro-batch gets one of them by chance."
        },
    )
    log_attributions: int = field(
        default=0,
        metadata={
            "help": "Held-out images whose attribution maps are drawn at each evaluation: for TensorBoard and Weights & "
            "Biases if they are in report_to, else as files in output_dir/attributions."
        },
    )
    card_images: int = field(
        default=4,
        metadata={
            "help": "Held-out images that the model card shows with their maps, drawn by save_model and push_to_hub and "
            "uploaded with the card; 0 if nobody may see them."
        },
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Remove columns that neither collator nor model use from the data sets."}
    )

    def __post_init__(self) -> None:
        if self.greater_is_better is None and (self.metric_for_best_model or "").endswith(_LESS_IS_BETTER):
            self.greater_is_better = False
        super().__post_init__()
        if not 0 <= self.shapley_warmup <= 1:
            raise ValueError(f"shapley_warmup is a share of the steps, from 0 to 1; got {self.shapley_warmup}.")
        if self.coalition_pairs < 1:
            raise ValueError(f"coalition_pairs must be at least 1, got {self.coalition_pairs}.")
        for name in ("shapley_weight", "coalition_task_weight", "mixup_alpha", "cutmix_alpha", "card_images"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}.")
        if self.corrupt_images not in ("fail", "skip"):
            raise ValueError(f"corrupt_images is 'fail' or 'skip', got {self.corrupt_images!r}.")
        if self.class_weights not in (None, "balanced"):
            self.class_weights = _numbers(self.class_weights)
        if self.log_attributions < 0 or (self.log_attributions > 0 and self.eval_strategy == IntervalStrategy.NO):
            raise ValueError(
                "log_attributions is a number of held-out images, drawn at each evaluation: pass one that is not negative, "
                f"and eval_strategy='steps' or 'epoch'; got {self.log_attributions} and {IntervalStrategy(self.eval_strategy).value!r}."
            )
        if self.gradient_checkpointing:
            options: Any = dict(self.gradient_checkpointing_kwargs or {})  # type: ignore[arg-type]
            if options.get("use_reentrant"):
                raise ValueError(
                    "use_reentrant=True loses the gradient of the Shapley token; leave it out of "
                    "gradient_checkpointing_kwargs."
                )
            self.gradient_checkpointing_kwargs = {**options, "use_reentrant": False}
            # Its name from transformers 5.23 on, and the one the Trainer then reads.
            self.activation_checkpointing_kwargs = self.gradient_checkpointing_kwargs


def _numbers(given: Any) -> list[float]:
    """Weights of classes, from a list or a text of numbers."""
    try:
        weights = [float(number) for number in (given.split(",") if isinstance(given, str) else given)]
    except (TypeError, ValueError):
        weights = []
    if not any(weights) or not all(math.isfinite(weight) and weight >= 0 for weight in weights):
        raise ValueError(f"class_weights is a number for each class, none below 0, or 'balanced'; got {given!r}.")
    return weights


def check_setting(model: nn.Module, layer: ShapleyLayer, args: ShapleyTrainingArguments, trains: bool) -> None:
    """Refuse, or warn of, what would fail or silently go wrong only later; `trains` with training data."""
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
    if args.load_best_model_at_end and not isinstance(model, PeftModel):
        raise ShapleyError(
            "load_best_model_at_end needs a PeftModel: transformers cannot load the best adapter of a model wrapped "
            "by add_adapter. Wrap it with get_peft_model(model, ShapleyConfig())."
        )
    if args.coalition_task_weight > 0 and layer.anatomy.kind == "matching":
        raise ShapleyError(
            "coalition_task_weight is for classes; a model that matches images with texts has none. Set it to 0."
        )
    if trains:
        _check_trained(model, layer, args)


def _check_trained(model: nn.Module, layer: ShapleyLayer, args: ShapleyTrainingArguments) -> None:
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    if not trained:
        raise ShapleyError(
            "No parameter is trainable. Load the adapter with PeftModel.from_pretrained(..., is_trainable=True)."
        )
    usual = args.learning_rate == LORA_LEARNING_RATE
    if not usual and trained <= {id(parameter) for parameter in layer.parameters()}:
        warnings.warn(
            f"learning_rate={args.learning_rate} has no effect: only token and head are trained, at "
            f"head_learning_rate={args.head_learning_rate}.",
            stacklevel=4,
        )
    name = layer.active or ""
    if usual and name in layer.configs and layer.configs[name].tune == "full":
        warnings.warn(
            f"learning_rate={args.learning_rate} is the default for LoRA; with tune='full' it may overwrite what the "
            "model was pretrained for. Pass a smaller one, such as learning_rate=5e-5.",
            stacklevel=4,
        )
    learned = name in layer.lora_shapley_fill  # type: ignore[operator]
    if learned and not (args.coalition_gradients or args.coalition_task_weight > 0):
        raise ShapleyError(
            "fill='learned' learns from what coalitions predict: set coalition_task_weight (e.g. 0.5) or "
            "coalition_gradients=True, or use fill='mean'."
        )


def set_head_rate(optimizer: torch.optim.Optimizer, layer: ShapleyLayer, rate: float) -> None:
    """Give token and head groups of their own, with their learning rate."""
    own = {id(parameter) for parameter in layer.parameters()}
    for group in list(optimizer.param_groups):
        head = [parameter for parameter in group["params"] if id(parameter) in own]
        rest = [parameter for parameter in group["params"] if id(parameter) not in own]
        if head and rest:
            group["params"] = rest
            optimizer.add_param_group({**group, "params": head, "lr": rate})
        elif head:
            group["lr"] = rate


def prepare_fsdp(plugin: Any, model: nn.Module, anatomy: Anatomy) -> None:
    """Choose FSDP's units and precision as a wrapped model needs them, in accelerate's plugin.

    Transformer blocks become units where the user named no others. accelerate (1.15) takes `_no_split_modules`, among which
    are vision models' embeddings; it splits their weights again as the model's input embeddings, and fails. Token and head
    belong to the root: they are used in hooks on the model's forward, for which the root's weights are gathered.

    Mixed precision is left to autocast, as without FSDP. FSDP2's own policy would round the head's weights and all that
    the model returns, and attributions would no longer sum to the logits.
    """
    if anatomy.blocks and getattr(plugin, "transformer_cls_names_to_wrap", None) is None:
        blocks = {type(module) for name, module in model.named_modules() if original_name(name) in anatomy.blocks}
        plugin.transformer_cls_names_to_wrap = sorted(block.__name__ for block in blocks)
    if plugin.fsdp_version == 2:
        plugin.mixed_precision_policy = MixedPrecisionPolicy()
