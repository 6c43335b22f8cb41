"""ViT-Shapley's and AutoGnothi's objectives in our harness: an ablation of our own trainer.

The published programs (github.com/suinleelab/vit-shapley at 6efc3c2, github.com/gszfwsb/AutoGnothi at 0d234f6) no longer
run on current libraries. What is theirs here, as their code has it: the law of the coalitions, how many there are, the
value, the null value, the loss and its factor, the normalisation, the output's tanh, and the stages of training with a
separate frozen surrogate in between. What is ours: the network (an adapter on the same base model, LoRA on the same
layers, where ViT-Shapley trains copies of the whole network and AutoGnothi a ladder beside a frozen one), the optimiser and
its schedule, and the removal of players (AutoGnothi's own lets removed patches leak into the output). Two slips of
AutoGnothi's code are not repeated, in its favour: the surrogate's Kullback-Leibler divergence has its roles swapped
and its softmax taken twice, and Duo's cross-entropy is fed with probabilities.

Each rival is measured against the Shapley values of its own game, the surrogate's probabilities.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import load, save
from torch import Tensor, nn
from trainings import BATCH, DEVICE, Setting, fit, save_merged, steps_of, wrapped
from transformers import AutoModelForImageClassification

from shapadapter import ShapleyTrainer
from shapadapter.adapter.answer import ShapleyOutput
from shapadapter.core.files import write_together
from shapadapter.core.shapley import coalition_sums, project_on_efficiency, size_distribution
from shapadapter.explanation.game import PatchGame, active_layer


@dataclass(frozen=True)
class Objective:
    """What a rival trains its explainer with.

    Attributes:
        name: of the rival.
        masks: coalitions for each image and step, in pairs with their complements.
        surrogate_share: epochs of the surrogate for each of the explainer, in the published recipes.
        tanh: whether each output goes through tanh before the normalisation.
        class_row: whether the class token's row takes its share in the normalisation and is dropped only afterwards, so
            that the patches do not sum to v(all) - v(empty).
        blank_null: whether the null value is that of an image of zeros with nothing removed, not of all removed.
        classifies: whether the explainer is also the classifier, on one trunk: "Duo", the sum of both losses.
        null_every_step: whether the null value is computed again in every step.
    """

    name: str
    masks: int
    surrogate_share: float
    tanh: bool = False
    class_row: bool = False
    blank_null: bool = False
    classifies: bool = False
    null_every_step: bool = False

    def attributions(self, rows: Tensor, class_row: Tensor | None, full: Tensor, null: Tensor) -> Tensor:
        """Normalise what the explainer says.

        Args:
            rows: (B, N, K) of the patches.
            class_row: (B, K) of the class token, for rivals that have it.
            full: (B, K) values v(all).
            null: (B, K) values v(empty).

        Returns:
            (B, N, K) attributions.
        """
        rows = rows.tanh() if self.tanh else rows
        if class_row is None:
            return project_on_efficiency(rows, full, null)
        # All that matters of the extra row is how it stands to the patches' mean, which our head may have moved.
        centred = rows - rows.mean(dim=1, keepdim=True)  # (B, N, K)
        every = torch.cat([class_row[:, None], centred], dim=1)  # (B, 1 + N, K)
        return project_on_efficiency(every, full, null)[:, 1:]  # (B, N, K)

    @property
    def evaluations(self) -> tuple[float, float]:
        """Model evaluations for each image and step of the explainer, without and with a gradient."""
        return self.masks + 1 + self.null_every_step / BATCH, 1.0  # the masks and v(all); the explainer

    def epochs_within(self, evaluations: float) -> float:
        """The epochs of the explainer that, with its surrogate's, cost so many evaluations for each image."""
        return evaluations / (sum(self.evaluations) + 2 * self.surrogate_share)


VIT_SHAPLEY = Objective("ViT-Shapley", masks=32, surrogate_share=50 / 100, tanh=True, null_every_step=True)
AUTOGNOTHI = Objective("AutoGnothi", masks=2, surrogate_share=20 / 100, class_row=True, blank_null=True)
DUO = replace(AUTOGNOTHI, name="AutoGnothi Duo", classifies=True)
RIVALS = (VIT_SHAPLEY, AUTOGNOTHI, DUO)

CLASSIFIES = {"prediction": "classifier", "modules_to_save": ["classifier"]}
"""The logits are those of the base model's own classifier, which is trained."""


# -- coalitions ----------------------------------------------------------------------------------------------------------


def rivals_coalitions(batch: int, players: int, masks: int, generator: torch.Generator | None = None) -> Tensor:
    """The coalitions of both rivals, (B, M, N) bool, paired with their complements.

    A number k from `arange(N - 1)` with the kernel law of k + 1 (off by one), then every player for itself with
    probability 1 - k / N: sizes vary around N - k, and coalitions may be empty or full.
    """
    law = size_distribution(players).float()  # (N - 1,), of the sizes 1 .. N - 1
    drawn = torch.multinomial(law, batch * masks // 2, replacement=True, generator=generator)  # 0 .. N - 2
    threshold = (drawn / players).view(batch, masks // 2, 1)  # (B, M / 2, 1)
    present = torch.rand(batch, masks // 2, players, generator=generator) > threshold  # (B, M / 2, N)
    return torch.stack([present, ~present], dim=2).flatten(1, 2)  # (B, M / 2, 2, N) -> (B, M, N)


def uniform_coalitions(batch: int, players: int, generator: torch.Generator | None = None) -> Tensor:
    """The surrogate's coalitions, (B, 1, N) bool: all sizes from 0 to N equally likely."""
    chances = torch.rand(batch, 1, 1, generator=generator)
    return torch.rand(batch, 1, players, generator=generator) > chances


# -- the surrogate and its game ------------------------------------------------------------------------------------------


class SurrogateTrainer(ShapleyTrainer):
    """Teach a copy of the classifier what the classifier says of the whole image, from one part of it."""

    def __init__(self, teacher: nn.Module, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.teacher = teacher

    def _draw_coalitions(self, inputs: dict[str, Any], training: bool) -> Tensor:
        pixels = inputs["pixel_values"]
        return uniform_coalitions(len(pixels), self.layer.tiling(**inputs).count).to(pixels.device)

    def _loss_terms(self, outputs: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
        pixels = inputs["pixel_values"]
        with torch.no_grad(), torch.autocast(pixels.device.type, torch.bfloat16, enabled=self.args.bf16):
            target = self.teacher(pixel_values=pixels).logits.float().softmax(dim=-1)  # (B, K)
        said = outputs.coalition_values[:, 0].log_softmax(dim=-1)  # (B, 1, K) -> (B, K)
        return {"surrogate_loss": F.kl_div(said, target, reduction="batchmean")}


def surrogate_of(setting: Setting, classifier: Path, folder: Path, epochs: float, seed: int) -> PeftModel:
    """The surrogate, trained or loaded, as a frozen model whose coalitions can be evaluated."""
    if not folder.exists():
        model = wrapped(classifier, seed, **setting.recipe["adapter"], **CLASSIFIES, shapley_token=False)
        own = {"teacher": AutoModelForImageClassification.from_pretrained(classifier).eval().to(DEVICE)}
        steps = steps_of(setting, epochs)
        fit(SurrogateTrainer, setting, model, setting.train, steps, seed, own, coalition_gradients=True)
        save_merged(model, folder)
    frozen = wrapped(folder, seed, tune="frozen", prediction="classifier", shapley_token=False)
    return frozen.requires_grad_(False).eval().to(DEVICE)


class ProbabilityGame(PatchGame):
    """The game of one image whose values are a surrogate's probabilities.

    Args:
        surrogate: the frozen model.
        image: (C, H, W).
        null: (K,), the null value in place of that of an image without patches.
    """

    def __init__(self, surrogate: nn.Module, image: Tensor, null: Tensor | None = None) -> None:
        super().__init__(surrogate, image)
        self.full_values = self.full_values.softmax(dim=-1)  # (K,)
        self.null_values = self.null_values.softmax(dim=-1) if null is None else null  # (K,)

    def values(self, coalitions: Tensor) -> Tensor:
        """v(S) of coalitions (M, N) bool: (M, K)."""
        return super().values(coalitions).softmax(dim=-1)


@torch.no_grad()
def blank_value(surrogate: nn.Module, like: Tensor) -> Tensor:
    """The probabilities (K,) of an image of zeros, nothing removed; `like` is (B, C, H, W)."""
    return surrogate(pixel_values=torch.zeros_like(like[:1])).logits[0].float().softmax(dim=-1)


# -- the explainer -------------------------------------------------------------------------------------------------------


class ClassRow(nn.Sequential):
    """The row of the class token: from its last hidden state (B, D) to (B, K)."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__(nn.LayerNorm(width), nn.Linear(width, classes))


class RivalTrainer(ShapleyTrainer):
    """`N * MSE` of the surrogate's probabilities over all classes; for Duo plus the task's cross-entropy."""

    def __init__(self, objective: Objective, surrogate: nn.Module, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.rival, self.surrogate = objective, surrogate
        self.blank: Tensor | None = None  # (K,), computed once

    def _draw_coalitions(self, inputs: dict[str, Any], training: bool) -> Tensor:
        pixels = inputs["pixel_values"]
        players = self.layer.tiling(pixels).count
        return rivals_coalitions(len(pixels), players, self.rival.masks).to(pixels.device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of one batch: the explainer sees the whole images only, the surrogate the coalitions."""
        coalitions = self._draw_coalitions(inputs, model.training)  # (B, M, N)
        values, full, null = self._targets(inputs["pixel_values"], coalitions)
        rows, class_row, own = explainer_rows(model, **inputs)
        attributions = self.rival.attributions(rows, class_row, full, null)  # (B, N, K)
        sums = coalition_sums(attributions, coalitions)  # (B, M, K)
        residuals = null[:, None] + sums - values  # (B, M, K)
        terms = {"shapley_loss": rows.shape[1] * residuals.square().mean()}
        if self.rival.classifies:
            terms["task_loss"] = own.loss
        game = ShapleyOutput(
            logits=full, null_values=null, coalition_values=values, coalition_attributions=sums.detach()
        )
        self.monitor.add_batch("train" if model.training else "eval", game, coalitions, terms, labels=0.0)
        loss = torch.stack(list(terms.values())).sum()
        return (loss, own) if return_outputs else loss

    @torch.no_grad()
    def _targets(self, pixels: Tensor, coalitions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The surrogate's probabilities: v(S) (B, M, K), v(all) (B, K) and v(empty) (B, K)."""
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=self.args.bf16):
            said = self.surrogate(pixel_values=pixels, coalitions=coalitions, return_dict=True)
            null = said.null_values.softmax(dim=-1)  # (B, K)
            if self.rival.blank_null:
                self.blank = blank_value(self.surrogate, pixels) if self.blank is None else self.blank
                null = self.blank.expand_as(null)
        return said.coalition_values.softmax(dim=-1), said.logits.float().softmax(dim=-1), null


def explainer_rows(model: Any, **inputs: Any) -> tuple[Tensor, Tensor | None, Any]:
    """What the explainer says before the normalisation: patches (B, N, K), class token (B, K) or None, its whole output."""
    reader = getattr(active_layer(model), "class_row", None)
    own: Any = model(**inputs, output_hidden_states=reader is not None, return_dict=True)
    # Our adapter keeps the loss from moving the sum of the attributions; theirs may, so its gradient is given back.
    total = own.logits.float() - own.null_values  # (B, K)
    rows = own.attributions + ((total - total.detach()) / own.attributions.shape[1])[:, None]  # (B, N, K)
    return rows, None if reader is None else reader(own.hidden_states[-1][:, 0].float()), own  # (B, D) -> (B, K)


def explainer_of(
    setting: Setting, objective: Objective, surrogate: Path, frozen: nn.Module, folder: Path, epochs: float, seed: int
) -> PeftModel:
    """The explainer, which starts from the surrogate, trained or loaded."""

    def untrained() -> PeftModel:
        model = wrapped(surrogate, seed, **setting.recipe["adapter"], **(CLASSIFIES if objective.classifies else {}))
        if objective.class_row:
            # Part of the head, so that it learns at the head's rate.
            active_layer(model).class_row = ClassRow(model.config.hidden_size, model.config.num_labels)
        return model

    file = folder / "explainer.safetensors"
    if not file.exists():
        model, own = untrained(), {"objective": objective, "surrogate": frozen}
        fit(RivalTrainer, setting, model, setting.train, steps_of(setting, epochs), seed, own)
        write_together({file: save({name: value.cpu().contiguous() for name, value in trained(model).items()})})
    model = untrained()
    model.load_state_dict(load(file.read_bytes()), strict=False)
    return model.eval().to(DEVICE)


def trained(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that training changes."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
