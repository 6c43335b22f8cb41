"""A wrapped model and images as games, and what is known of their Shapley values."""

from shapadapter.explanation.explanation import Explanation, Prediction

__all__ = ["Explanation", "Prediction"]
