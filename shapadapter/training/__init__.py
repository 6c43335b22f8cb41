"""Fine-tuning with the Shapley objective."""

from shapadapter.collator import ImageCollator

from .arguments import ShapleyTrainingArguments
from .trainer import ShapleyTrainer

__all__ = ["ImageCollator", "ShapleyTrainer", "ShapleyTrainingArguments"]
