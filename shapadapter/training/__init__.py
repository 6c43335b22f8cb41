"""Fine-tuning with the Shapley objective."""

from shapadapter.collator import ImageCollator
from shapadapter.installing import check_overrides

from .arguments import ShapleyTrainingArguments
from .checkpoints import last_whole_checkpoint
from .folders import image_folder
from .trainer import ShapleyTrainer

__all__ = ["ImageCollator", "ShapleyTrainer", "ShapleyTrainingArguments", "image_folder", "last_whole_checkpoint"]

check_overrides(ShapleyTrainer)
