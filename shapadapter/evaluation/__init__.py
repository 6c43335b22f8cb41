"""Measure a wrapped model and its explanations on a data set."""

from shapadapter.evaluation.evaluator import Evaluator, evaluate
from shapadapter.evaluation.folder_run import evaluate_checkpoint
from shapadapter.evaluation.result import Equivalent, Evaluation
from shapadapter.evaluation.sanity import map_agreement

__all__ = ["Equivalent", "Evaluation", "Evaluator", "evaluate", "evaluate_checkpoint", "map_agreement"]
