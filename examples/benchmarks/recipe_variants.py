"""The variants of the training recipe: what each changes, and the few lines of code that some of them need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from trainings import BATCH, RECIPE, Setting
from transformers import TrainerCallback

from shapadapter import ShapleyTrainer, ShapleyTrainingArguments
from shapadapter.core.shapley import SCALE_FLOOR, gains, shapley_loss_of_sums
from shapadapter.explanation.game import active_layer


@dataclass(frozen=True)
class Variant:
    """What differs from the recipe.

    Attributes:
        adapter: fields of `ShapleyConfig`.
        training: arguments of any trainer.
        shapley: arguments of ours.
        steps: times as many as the recipe's.
        trainer: the class.
        own: keyword arguments of the trainer itself.
        rebuild: changes the wrapped model before it is trained.
    """

    adapter: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    shapley: dict[str, Any] = field(default_factory=dict)
    steps: int = 1
    trainer: type[ShapleyTrainer] = ShapleyTrainer
    own: dict[str, Any] = field(default_factory=dict)
    rebuild: Callable[[Any], None] = lambda model: None


@dataclass(frozen=True)
class Varied(Setting):
    """A setting whose recipe is a variant's."""

    variant: Variant = field(default_factory=Variant)

    @property
    def recipe(self) -> dict[str, Any]:
        return {part: {**own, **getattr(self.variant, part)} for part, own in RECIPE[self.name].items()}


def variants(recipe: dict[str, Any]) -> dict[str, Variant]:
    """Every variant of a recipe but plain fine-tuning, by name."""
    rate = recipe["training"]["learning_rate"]
    head_rate = recipe["shapley"].get("head_learning_rate", ShapleyTrainingArguments.head_learning_rate)

    def rates(factor: float) -> Variant:
        return Variant(training={"learning_rate": factor * rate}, shapley={"head_learning_rate": factor * head_rate})

    return {
        "recipe": Variant(),
        "no Shapley loss": Variant(shapley={"shapley_weight": 0.0}),
        **{f"weight {weight}": Variant(shapley={"shapley_weight": float(weight)}) for weight in (1, 3, 10, 30)},
        "no warm-up": Variant(shapley={"shapley_warmup": 0.0}),
        "head rate as LoRA's": Variant(shapley={"head_learning_rate": rate}),
        "head rate x 4": Variant(shapley={"head_learning_rate": 4 * head_rate}),
        "learning rates x 0.4": rates(0.4),
        "learning rates x 2": rates(2),
        "more steps": Variant(steps=3),
        "averaged weights": Variant(own={"callbacks": [AveragedWeights]}),
        "4 pairs": Variant(shapley={"coalition_pairs": 4}),
        "eight sizes in a batch": Variant(trainer=EightSizes),
        "gradients through coalitions": Variant(shapley={"coalition_gradients": True}),
        "cross-entropy on coalitions": Variant(shapley={"coalition_task_weight": 0.5}),
        "yardstick of the drawn coalitions": Variant(trainer=DrawnYardstick),
        "centred logits": Variant(trainer=CentredLogits),
        "width 64": Variant(adapter={"head_width": 64}),
        "rank 64": Variant(adapter={"r": 64, "lora_alpha": 128}),
        "no token": Variant(adapter={"shapley_token": False}),
        "attention block in the head": Variant(rebuild=let_cells_attend),
        "classifier": Variant(adapter={"prediction": "classifier", "modules_to_save": ["classifier"]}),
    }


class EightSizes(ShapleyTrainer):
    """Every eighth of a batch has coalitions of its own sizes."""

    def _draw_coalitions(self, inputs: dict[str, Any], training: bool) -> Tensor:
        draw = super()._draw_coalitions
        parts = inputs["pixel_values"].split(BATCH // 8)  # (b, C, H, W) each
        return torch.cat([draw({"pixel_values": part}, training) for part in parts])  # (b, M, N) each -> (B, M, N)


class DrawnYardstick(ShapleyTrainer):
    """The Shapley loss relative to the mean square of what the drawn coalitions gain, image by image."""

    def _loss_terms(self, outputs: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
        values, null = outputs.coalition_values.detach(), outputs.null_values.detach()  # (B, M, K), (B, K)
        residuals = gains(values, null) - outputs.coalition_attributions  # (B, M, K)
        yardstick = (values - null[:, None]).square().mean(dim=(1, 2)).clamp(min=SCALE_FLOOR)  # (B,)
        loss = (residuals.square().mean(dim=(1, 2)) / yardstick).mean()
        return {**super()._loss_terms(outputs, inputs), "shapley_loss": loss}


class CentredLogits(ShapleyTrainer):
    """The Shapley loss on what stands out from the mean over classes, which is all that a softmax sees."""

    def _loss_terms(self, outputs: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
        parts = outputs.coalition_attributions, outputs.coalition_values, outputs.null_values, outputs.logits
        sums, values, null, full = (part - part.mean(dim=-1, keepdim=True) for part in parts)  # (B, M or 1, K)
        # What `expected_square` is for the most part: half the square of what all players gain together.
        yardstick = (full - null).detach().square().mean(dim=1).clamp(min=SCALE_FLOOR) / 2  # (B,)
        loss = shapley_loss_of_sums(sums, yardstick, values.detach(), null)
        return {**super()._loss_terms(outputs, inputs), "shapley_loss": loss}


class AveragedWeights(TrainerCallback):
    """The training ends with the moving average of the weights over its second half."""

    decay = 0.99

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.weights = [weight.detach() for weight in model.parameters() if weight.requires_grad]
        self.averages = [weight.clone() for weight in self.weights]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        share = 1 - self.decay if 2 * state.global_step > state.max_steps else 1.0
        torch._foreach_lerp_(self.averages, self.weights, share)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        torch._foreach_copy_(self.weights, self.averages)


def let_cells_attend(model: Any) -> None:
    """Give the head's view of a cell a block of attention between the cells, which is silent at the start."""
    patches: Any = active_layer(model).lora_shapley_patch
    (name, patch), *_ = patches.items()
    block = nn.TransformerEncoderLayer(
        patch.out_features, 4, 2 * patch.out_features, 0.0, "gelu", batch_first=True, norm_first=True
    )
    for last in (block.self_attn.out_proj, block.linear2):
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
    patches[name] = nn.Sequential(patch, block)  # (B, N, D) -> (B, N, W)
