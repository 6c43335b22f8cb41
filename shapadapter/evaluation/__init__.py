"""Measure a wrapped model and its explanations on a data set."""

from shapadapter.evaluation.equal_cost import CostPoint
from shapadapter.evaluation.evaluator import Evaluator, evaluate
from shapadapter.evaluation.measure import map_agreement
from shapadapter.evaluation.records import Equivalent
from shapadapter.evaluation.result import Evaluation

__all__ = ["CostPoint", "Equivalent", "Evaluation", "Evaluator", "evaluate", "map_agreement"]
