"""The rivals' row of numbers, and ours beside them: each explainer against the Shapley values of its own game."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from rivals import Objective, ProbabilityGame, blank_value, explainer_of, explainer_rows, surrogate_of, trained
from torch import Tensor
from tqdm.auto import tqdm
from trainings import DEVICE, Setting, accuracy_of
from transformers import AutoModelForImageClassification

from shapadapter.core.files import write_together
from shapadapter.core.statistics import pearson, relative_l2
from shapadapter.explanation.game import PatchGame

MEASURES = ("error", "correlation", "kernel_shap_error", "truth_error", "efficiency_gap")


@torch.no_grad()
def measure(
    setting: Setting, objective: Objective, explainer: Any, surrogate: Any, seed: int
) -> dict[str, list[float]]:
    """For every picture, how a rival's attributions of the surrogate's class compare with the Shapley values."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, list[float]] = {name: [] for name in MEASURES}
    with setting.autocast():
        for image in tqdm(setting.pixels(), desc=objective.name, unit="image", leave=False):
            null = blank_value(surrogate, image[None]) if objective.blank_null else None
            game = ProbabilityGame(surrogate, image, null)
            rows, class_row, _ = explainer_rows(explainer, pixel_values=image[None])
            ends = game.full_values[None], game.null_values[None]  # (1, K) each
            said = objective.attributions(rows, class_row, *ends)[0]  # (1, N, K) -> (N, K)
            numbers = against_truth(game, said, setting, generator)
            for name, number in zip(MEASURES, numbers, strict=True):
                found[name].append(number)
    return found


def against_truth(game: PatchGame, said: Tensor, setting: Setting, generator: torch.Generator) -> tuple[float, ...]:
    """`MEASURES` of attributions (N, K) in a game, for the class it is surest of."""
    label = int(game.full_values.argmax())
    truths, doubts = game.kernel_shap(setting.scale.truth_evaluations, generator)  # (N, K), (K,)
    sampled = game.kernel_shap(setting.sampled, generator)[0][:, label]  # (N,)
    truth, told = truths[:, label], said.cpu().double()[:, label]  # (N,)
    worth = float(game.full_values[label] - game.null_values[label])
    errors = float(relative_l2(told, truth)), float(pearson(told, truth)), float(relative_l2(sampled, truth))
    return *errors, float(doubts[label]), abs(float(told.sum()) - worth)


def own_row(setting: Setting, model: Any, accuracy: float, measured: dict[str, Any]) -> dict[str, Any]:
    """Our row: the same measures on the same pictures, in our own game, whose values are the model's logits."""
    epochs = setting.epochs(setting.scale.tune_epochs)
    without, with_gradient = setting.evaluations
    return {
        "name": "ours",
        "accuracy": accuracy,
        "stages": 1,
        "networks": 1,
        "evaluations": epochs * (without + with_gradient),
        "with_gradient": epochs * with_gradient,
        "parameters": sum(value.numel() for name, value in model.named_parameters() if "lora_" in name),
        **{name: measured[name] for name in MEASURES},
    }


def run_rival(
    setting: Setting, objective: Objective, classifier: Path, folder: Path, epochs: float, seed: int
) -> dict[str, Any]:
    """Train a rival's surrogate and explainer, measure them, keep the result; or read what was kept.

    Args:
        setting: pictures, base model, recipe.
        objective: of the rival.
        classifier: folder of the fine-tuned classifier that the surrogate learns from, the first of three stages.
        folder: for what is trained and measured.
        epochs: of the explainer; the surrogate gets its published share of them.
        seed: of everything.
    """
    file = folder / "result.json"
    if file.exists():
        return json.loads(file.read_text())
    surrogate = folder / "surrogate"
    frozen = surrogate_of(setting, classifier, surrogate, epochs * objective.surrogate_share, seed)
    model = explainer_of(setting, objective, surrogate, frozen, folder, epochs, seed)
    alone = AutoModelForImageClassification.from_pretrained(classifier).eval().to(DEVICE)
    result = {
        "name": objective.name,
        "accuracy": accuracy_of(model if objective.classifies else alone, setting),
        **cost(setting, objective, epochs),
        "parameters": stored(objective, model, alone),
        **measure(setting, objective, model, frozen, seed),
    }
    write_together({file: json.dumps(result).encode()})
    return result


def cost(setting: Setting, objective: Objective, epochs: float) -> dict[str, float]:
    """Stages of training, the model evaluations that they take for each training picture, and networks that remain.

    To predict and to explain takes the explainer, the surrogate, whose v(all) the attributions are normalised to, and,
    but for Duo, the classifier. (AutoGnothi's own are ladders beside one frozen network.)
    """
    parts = setting.scale.tune_epochs, epochs * objective.surrogate_share, epochs
    classifier, surrogate, explainer = map(setting.epochs, parts)
    without, with_gradient = objective.evaluations
    learned = classifier + surrogate + explainer * with_gradient
    asked = surrogate + explainer * without  # the surrogate's teacher is asked once for each picture
    networks = 2 if objective.classifies else 3
    return {"stages": 3, "networks": networks, "evaluations": learned + asked, "with_gradient": learned}


def stored(objective: Objective, explainer: Any, classifier: Any) -> int:
    """Parameters to keep beside the base model: LoRA and head of each network."""
    own = trained(explainer)
    lora = sum(value.numel() for name, value in own.items() if "lora_A" in name or "lora_B" in name)
    plain = lora + sum(value.numel() for value in classifier.classifier.parameters())  # surrogate, classifier
    return sum(value.numel() for value in own.values()) + plain * (1 if objective.classifies else 2)
