"""Measure a wrapped model and its explanations on a data set."""

from .checkpoint import evaluate_checkpoint
from .evaluating import evaluate
from .evaluator import Evaluator
from .likeness import map_agreement
from .result import Equivalent, Evaluation

__all__ = ["Equivalent", "Evaluation", "Evaluator", "evaluate", "evaluate_checkpoint", "map_agreement"]
