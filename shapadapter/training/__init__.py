"""Fine-tuning with the Shapley objective."""

from .arguments import ShapleyTrainingArguments
from .collator import ImageCollator
from .trainer import ShapleyTrainer

__all__ = ["ImageCollator", "ShapleyTrainer", "ShapleyTrainingArguments"]
