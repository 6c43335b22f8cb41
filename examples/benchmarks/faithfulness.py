"""How far one pass and KernelSHAP are from many evaluations, and where the maps look: for the comparisons beside this file."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from shapadapter import Explanation
from shapadapter.core.grid import Grid, pixels_to_players
from shapadapter.core.statistics import relative_l2
from shapadapter.demo.models import Scale
from shapadapter.evaluation.localization import energy_inside
from shapadapter.explanation.game import PatchGame


def faithfulness(model: nn.Module, pixel_values: Tensor, scale: Scale, seed: int, **options: Any) -> dict[str, float]:
    """Relative L2 error to the truth, of the one-pass attributions and of KernelSHAP at each budget.

    For the predicted class of each image (B, C, H, W); the mean over images. The truth is KernelSHAP with
    `scale.truth_evaluations`; "truth" is how far that estimate itself is likely to be off, and "equal shares" what a head
    that knows nothing would say: every player the same.
    """
    kinds = ("one pass", "equal shares", "truth", *(str(budget) for budget in scale.budgets))
    errors: dict[str, list[float]] = {kind: [] for kind in kinds}
    generator = torch.Generator().manual_seed(seed)
    for image in tqdm(pixel_values, desc="Shapley values the slow way", unit="image"):
        game = PatchGame(model, image, **options)
        label = int(game.full_values.argmax())
        truth, doubt = game.kernel_shap(scale.truth_evaluations, generator)  # (N, K), (K,)
        errors["truth"].append(float(doubt[label]))
        errors["one pass"].append(float(relative_l2(game.attributions[:, label].double(), truth[:, label])))
        equal = (game.full_values - game.null_values)[label].double() / game.players
        errors["equal shares"].append(float(relative_l2(equal.expand(game.players), truth[:, label])))
        for budget in scale.budgets:
            estimate, _ = game.kernel_shap(budget, generator)
            errors[str(budget)].append(float(relative_l2(estimate[:, label], truth[:, label])))
    return {name: sum(values) / len(values) for name, values in errors.items()}


def energy_in_masks(explanation: Explanation, masks: Tensor) -> float:
    """Share of the predicted classes' positive attribution inside the masks (B, H, W)."""
    inside = pixels_to_players(masks.float(), Grid(*explanation.attributions.shape[1:3]))  # (B, rows, cols)
    best = explanation.logits.gather(1, explanation.classes).argmax(dim=1)  # (B,)
    maps = explanation.attributions[torch.arange(len(explanation), device="cpu"), :, :, best]  # (B, rows, cols)
    return float(energy_inside(maps, inside).nanmean())
