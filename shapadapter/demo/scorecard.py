"""What the demo measures about the adapted model."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from tqdm.auto import tqdm

from shapadapter.core.grid import Grid, pixels_to_players
from shapadapter.core.statistics import relative_l2
from shapadapter.demo.models import Scale
from shapadapter.evaluation.localization import energy_inside
from shapadapter.explanation.explanation import Explanation
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


def localisation(explanation: Explanation, masks: Tensor) -> tuple[float, float]:
    """Share of the predicted classes' positive attribution inside the masks (B, H, W), and the masks' share of area."""
    rows, cols = explanation.attributions.shape[1:3]
    inside = pixels_to_players(masks.float(), Grid(rows, cols))  # (B, rows, cols)
    best = explanation.logits.gather(1, explanation.classes).argmax(dim=1)  # (B,)
    maps = explanation.attributions[torch.arange(len(explanation), device="cpu"), :, :, best]  # (B, rows, cols)
    return float(energy_inside(maps, inside).nanmean()), float(inside.mean())


def cost_of_explaining(model: PeftModel, pixel_values: Tensor, repeats: int = 30) -> float:
    """Time of prediction and explanation together, over that of the base model's plain prediction.

    Both are measured alternately on the same batch, with LoRA merged, as one would deploy it; the ratio of the medians.
    """
    bare: Any = copy.deepcopy(model)
    adapted = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the bare model predicts with an untrained classifier: only time counts
        bare = bare.merge_and_unload().eval()
    adapted.merge_adapter()
    adapted.eval()

    def plain() -> None:
        bare(pixel_values=pixel_values)

    def explained() -> None:
        adapted(pixel_values=pixel_values)

    with torch.inference_mode():
        plain()
        explained()
        times = [(_seconds(plain), _seconds(explained)) for _ in range(repeats)]
    return median(b for _, b in times) / median(a for a, _ in times)


def _seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def as_text(rows: Sequence[tuple[str, str]]) -> str:
    """A two-column table for the terminal."""
    width = max(len(name) for name, _ in rows)
    line = "-" * (width + 2 + max(len(value) for _, value in rows))
    return "\n".join([line, *(f"{name:<{width}}  {value}" for name, value in rows), line])
