"""Measure a wrapped model and its explanations on a data set."""

from .evaluating import evaluate
from .result import Equivalent, Evaluation

__all__ = ["Equivalent", "Evaluation", "evaluate"]
