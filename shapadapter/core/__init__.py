"""Plain things that know no model: arithmetic of Shapley values, errors, files."""
