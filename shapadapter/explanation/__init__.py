"""A wrapped model and an image as a game, and what is known of its Shapley values."""
