"""How large the demo is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """What the full and the quick demo do.

    Attributes:
        digits: source digits; a fifth of them is for testing.
        placements: scenes for each training digit.
        pretrain_epochs: epochs of ordinary training of the base model.
        tune_epochs: epochs of fine-tuning with the Shapley objective.
        truth_images: test images whose attributions are compared with the truth.
        truth_evaluations: coalitions evaluated for each of them.
        budgets: evaluations given to KernelSHAP for comparison.
    """

    digits: int
    placements: int
    pretrain_epochs: float
    tune_epochs: float
    truth_images: int
    truth_evaluations: int
    budgets: tuple[int, ...] = (128, 512)


FULL = Scale(digits=5000, placements=4, pretrain_epochs=6, tune_epochs=1.5, truth_images=8, truth_evaluations=4096)
QUICK = Scale(digits=500, placements=1, pretrain_epochs=2, tune_epochs=1, truth_images=2, truth_evaluations=1024)
