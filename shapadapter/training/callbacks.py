"""Attribution maps of a few held-out images, drawn while a model is trained."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import Trainer, TrainerCallback
from transformers.integrations.integration_utils import TensorBoardCallback, WandbCallback

from shapadapter.core.files import whole_file
from shapadapter.data.augmentation import seeded
from shapadapter.data.collator import TEXT_COLUMNS, find_column
from shapadapter.data.rows import some_rows
from shapadapter.explanation.api import explain
from shapadapter.explanation.explanation import Explanation
from shapadapter.visual import gallery

# Maps beside each image: those of its likeliest classes.
CLASSES = 3


class AttributionMaps(TrainerCallback):
    """Draw the attribution maps of a few held-out images at each evaluation; `log_attributions=4` adds it.

    The images are spread evenly over the evaluation data and always the same, so that their maps can be followed from
    evaluation to evaluation. The picture goes where the trainer reports to: to TensorBoard and Weights & Biases, else to
    `output_dir/attributions/eval-000100.png`. Training goes on as if nothing had been drawn: model and random generators
    are left as they were.

    Every process runs the forward pass, because a sharded model needs them all, and the main process alone writes.

    Args:
        trainer: whose model, collator and reports are used.
        images: how many images.

    Raises:
        ImportError: matplotlib is missing.
    """

    def __init__(self, trainer: Trainer, images: int) -> None:
        if find_spec("matplotlib") is None:
            raise ImportError('log_attributions draws with matplotlib: pip install "shapadapter[plot]"')
        self.trainer = trainer
        self.images = images

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Explain, draw and write."""
        explanation, _ = explained(self.trainer, kwargs["eval_dataloader"].dataset, self.images)
        if not state.is_world_process_zero:
            return
        if not torch.isfinite(explanation.attributions).all():
            warnings.warn(f"No maps are drawn at step {state.global_step}: attributions are not finite.", stacklevel=2)
            return
        # Several evaluation sets have prefixes of their own, which stand nowhere but in the metrics' names.
        name = next(key.removesuffix("_runtime") for key in kwargs["metrics"] if key.endswith("_runtime"))
        self._write(as_picture(explanation), name, state.global_step, Path(args.output_dir) / "attributions")

    def _write(self, picture: Image.Image, name: str, step: int, folder: Path) -> None:
        taken = False
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                pixels = np.asarray(picture)  # (H, W, 3)
                callback.tb_writer.add_image(f"attributions/{name}", pixels, step, dataformats="HWC")
                taken = True
            elif isinstance(callback, WandbCallback):
                import wandb

                wandb.log({f"attributions/{name}": wandb.Image(picture), "train/global_step": step})
                taken = True
        if not taken:
            folder.mkdir(parents=True, exist_ok=True)
            with whole_file(folder / f"{name}-{step:06d}.png") as file:
                picture.save(file, format="png")


def explained(trainer: Any, dataset: Any, images: int) -> tuple[Explanation, Any]:
    """Explain some images of a data set as the trainer's model sees them; every process has to call it.

    Returns:
        The explanation, and the labels of its images, None without.
    """
    with seeded(0), trainer.compute_loss_context_manager():
        rows = list(some_rows(dataset, images))
        texts = _texts(rows) if trainer.matching else None
        batch = trainer.data_collator(rows)
        found = explain(trainer.model, batch, trainer.processing_class, texts=texts, top_k=CLASSES)
        return found, batch.get("labels")


def as_picture(explanation: Explanation) -> Image.Image:
    """All images of an explanation, a row each, as a picture."""
    file = io.BytesIO()
    gallery(explanation, max_classes=CLASSES).savefig(file, format="png", dpi=100)
    return Image.open(file).convert("RGB")


def _texts(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The different captions of these rows, in their order: what a matching model compares the images with."""
    column = find_column(rows[0], TEXT_COLUMNS)
    assert column is not None, "the collator has refused rows without texts"
    return list(dict.fromkeys(row[column] for row in rows))
