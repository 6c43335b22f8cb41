"""Measure a wrapped model and its explanations on a data set."""
