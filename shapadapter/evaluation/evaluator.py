"""An evaluation small enough to run at every evaluation of a training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from shapadapter.backbone import evaluation_view

from .data import Rows
from .evaluating import check_model, label_rules
from .plan import Plan
from .study import study


@dataclass(frozen=True)
class Evaluator:
    """Faithfulness of the one-pass attributions as plain numbers: `ShapleyTrainer(..., evaluator=Evaluator(images=16))`.

    The trainer calls it at the end of each evaluation and puts its numbers among the `eval_*`. So
    `metric_for_best_model="eval_error", greater_is_better=False` keeps the checkpoint that explains best. Task measures
    are the trainer's; sanity, ROAD, montages and cost are left to `evaluate`.

    Attributes:
        images: how many images are explained, always the same ones.
        truth_evaluations: as for `evaluate`; up to 16 players the truth is exact.
        budgets: as for `evaluate`.
        masks: as for `evaluate`.
        seed: as for `evaluate`.
        batch_size: as for `evaluate`.
        options: further keyword arguments of the model's forward.
    """

    images: int = 16
    truth_evaluations: int = 2048
    budgets: Sequence[int] = (128, 256, 512, 1024)
    masks: str | None = None
    seed: int = 0
    batch_size: int = 32
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, model: nn.Module, dataset: Any, processor: Any | None = None) -> dict[str, float]:
        """Measure.

        Args:
            model: a wrapped classifier.
            dataset: rows by index.
            processor: the image processor, or a collator.

        Returns:
            `error`, `spearman`, `equivalent_evaluations`, `insertion`, `deletion`, ...: as `Evaluation.metrics`.

        Raises:
            ShapleyError: as `evaluate`.
        """
        check_model(model)
        plan = Plan.of(
            (),
            self.seed,
            dict(self.options),
            self.budgets,
            images=self.images,
            truth_evaluations=self.truth_evaluations,
            batch_size=self.batch_size,
            progress=False,
            thorough=False,
        )
        rows = Rows(dataset, processor, *label_rules(model))
        with torch.no_grad():
            return study(evaluation_view(model), rows, plan, rows.masks(self.masks), None, None).metrics()
