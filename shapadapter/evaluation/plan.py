"""What is to be measured, and with which effort."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from .methods import Explainer, Methods

METHODS = ("shapadapter", "leave_one_out", "random", "centre")
BUDGETS = (128, 256, 512, 1024, 2048)


@dataclass(frozen=True)
class Plan:
    """The settings of an evaluation, checked.

    Attributes:
        methods: that are compared, with seed and options.
        images: how many are explained.
        truth_evaluations: of KernelSHAP as the truth.
        budgets: of KernelSHAP to compare with.
        batch_size: images in a forward pass.
        progress: whether to show progress bars.
        thorough: whether sanity, ROAD, montages and cost are measured, too.
    """

    methods: Methods
    images: int
    truth_evaluations: int
    budgets: tuple[int, ...]
    batch_size: int
    progress: bool
    thorough: bool = True

    def __post_init__(self) -> None:
        if self.images < 1 or self.batch_size < 1:
            raise ValueError(f"Expected at least one image, got images={self.images}, batch_size={self.batch_size}.")
        if self.truth_evaluations < 4 or self.truth_evaluations % 4:
            raise ValueError(f"truth_evaluations must be a multiple of 4, got {self.truth_evaluations}.")
        rising = all(low < high for low, high in pairwise(self.budgets))
        if not self.budgets or self.budgets[0] < 2 or any(budget % 2 for budget in self.budgets) or not rising:
            raise ValueError(f"budgets must be even numbers of evaluations that rise, got {list(self.budgets)}.")
        if self.budgets[-1] >= self.truth_evaluations:
            raise ValueError(
                f"budgets must stay below the truth's evaluations, which are to be nearer the truth: got "
                f"{list(self.budgets)} and truth_evaluations={self.truth_evaluations}."
            )

    @classmethod
    def of(
        cls,
        methods: Sequence[str] | Mapping[str, str | Explainer],
        seed: int,
        options: dict[str, Any],
        budgets: Sequence[int],
        **settings: Any,
    ) -> Plan:
        """From the arguments of `evaluate`."""
        return cls(methods=Methods.of(methods, seed, options), budgets=tuple(budgets), **settings)

    @property
    def seed(self) -> int:
        """Of all that is drawn."""
        return self.methods.seed
