"""Measures of attributions as pure arithmetic: tensors in, one number per image or per vector out.

Shapes throughout: N players in a grid of rows x cols, M coalitions (bool, True = present), v(S) the value of a
coalition for one class. Leading dimensions are images, or whatever the caller batches. Sums are taken in float64.
"""

from .agreement import (
    EquivalentEvaluations,
    equivalent_evaluations,
    pearson,
    relative_l2,
    spearman,
    top_k_overlap,
)
from .curves import aopc, curve_area, order_of, prefix_coalitions
from .intervals import Interval, bootstrap_interval, bootstrap_intervals
from .localisation import Segmentation, energy_inside, grid_pointing, pointing_game, segmentation
from .retrieval import recall_at_k
from .road import noisy_linear_imputation
from .sensitivity import (
    faithfulness_correlation,
    infidelity,
    normalised_infidelity,
    removal_coalitions,
    sensitivity_n,
)

__all__ = [
    "EquivalentEvaluations",
    "Interval",
    "Segmentation",
    "aopc",
    "bootstrap_interval",
    "bootstrap_intervals",
    "curve_area",
    "energy_inside",
    "equivalent_evaluations",
    "faithfulness_correlation",
    "grid_pointing",
    "infidelity",
    "noisy_linear_imputation",
    "normalised_infidelity",
    "order_of",
    "pearson",
    "pointing_game",
    "prefix_coalitions",
    "recall_at_k",
    "relative_l2",
    "removal_coalitions",
    "segmentation",
    "sensitivity_n",
    "spearman",
    "top_k_overlap",
]
