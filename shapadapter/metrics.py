"""Measures of attributions as pure arithmetic: tensors in, one number per image or per vector out.

Shapes throughout: N players in a grid of rows x cols, M coalitions (bool, True = present), v(S) the value of a
coalition for one class. Leading dimensions are images, or whatever the caller batches. Sums are taken in float64.
"""

from shapadapter.core.statistics import (
    EquivalentEvaluations,
    Interval,
    bootstrap_interval,
    bootstrap_intervals,
    equivalent_evaluations,
    pearson,
    relative_l2,
    spearman,
    top_k_overlap,
)
from shapadapter.evaluation.deletion import (
    aopc,
    curve_area,
    noisy_linear_imputation,
    order_of,
    prefix_coalitions,
)
from shapadapter.evaluation.faithfulness import (
    faithfulness_correlation,
    infidelity,
    normalised_infidelity,
    removal_coalitions,
    sensitivity_n,
)
from shapadapter.evaluation.localization import Segmentation, energy_inside, grid_pointing, pointing_game, segmentation
from shapadapter.evaluation.retrieval import recall_at_k

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
