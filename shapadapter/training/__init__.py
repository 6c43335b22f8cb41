"""Fine-tuning with the Shapley objective."""

from shapadapter.adapter.registration import check_overrides
from shapadapter.data.collator import ImageCollator
from shapadapter.data.folders import image_folder
from shapadapter.training.arguments import ShapleyTrainingArguments
from shapadapter.training.checkpoints import last_complete_checkpoint
from shapadapter.training.trainer import ShapleyTrainer

__all__ = ["ImageCollator", "ShapleyTrainer", "ShapleyTrainingArguments", "image_folder", "last_complete_checkpoint"]

check_overrides(ShapleyTrainer)
