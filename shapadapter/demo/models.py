"""The demo's two training runs: a small ViT the ordinary way, then the same with the Shapley objective."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from peft import PeftModel, get_peft_model
from PIL import Image
from torch.utils.data import Dataset
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    set_seed,
)

from shapadapter.adapter import ShapleyConfig
from shapadapter.core.errors import ShapleyError
from shapadapter.core.files import atomic_folder
from shapadapter.demo.digits import NAMES, SIZE, DigitScenes
from shapadapter.training import ShapleyTrainer, ShapleyTrainingArguments

MARKER = ".shapadapter-demo"
PATCH = 8  # pixels, each way
SAVED = 100  # test images that are saved as files


def claim(folder: Path) -> None:
    """Make an output folder, or take one that an earlier run has made; refuse another's, which could be overwritten."""
    marker = folder / MARKER
    if folder.exists() and any(folder.iterdir()) and not marker.exists():
        raise ShapleyError(f"{folder} is not empty and was not made by the demo. Choose another --output.")
    folder.mkdir(parents=True, exist_ok=True)
    marker.touch()


@dataclass(frozen=True)
class Scale:
    """What the full and the quick demo do."""

    digits: int  # source digits; a fifth of them is for testing
    placements: int  # scenes for each training digit
    pretrain_epochs: float
    tune_epochs: float
    truth_images: int  # test images whose attributions are compared with the truth
    truth_evaluations: int  # coalitions evaluated for each of them
    budgets: tuple[int, ...] = (128, 512)  # evaluations given to KernelSHAP for comparison


FULL = Scale(digits=5000, placements=4, pretrain_epochs=6, tune_epochs=1.5, truth_images=8, truth_evaluations=4096)
QUICK = Scale(digits=500, placements=1, pretrain_epochs=2, tune_epochs=1, truth_images=2, truth_evaluations=1024)


def save_pictures(scenes: DigitScenes, output: Path) -> None:
    """Write `test/<class>/<number>.png` and, with the digit white on black, `masks/<class>/<number>.png`."""
    _, test = scenes.split()
    for kind, pictures in (("test", scenes.images), ("masks", scenes.masks)):
        with atomic_folder(output / kind) as folder:
            for number, index in enumerate(test[:SAVED]):
                place = folder / NAMES[scenes.labels[index]]
                place.mkdir(exist_ok=True)
                Image.fromarray(pictures[index]).save(place / f"{number}.png")


@dataclass(eq=False)
class Prepared(Dataset[dict[str, Any]]):
    """Scenes as the processor below would prepare them, without the way through PNG files: the training is long."""

    scenes: DigitScenes
    indices: Any

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: int) -> dict[str, Any]:
        index = self.indices[item]
        pixels = torch.from_numpy(self.scenes.images[index]).permute(2, 0, 1)  # (C, H, W)
        return {"pixel_values": pixels / 127.5 - 1, "labels": int(self.scenes.labels[index])}


def pretrain(scenes: DigitScenes, folder: Path, scale: Scale, seed: int) -> float:
    """Train a small ViT on the digits with a plain `Trainer` and save it; returns its test accuracy."""
    train, test = scenes.split()
    processor = ViTImageProcessorPil(size={"height": SIZE, "width": SIZE})
    config = ViTConfig(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=128,
        initializer_range=0.08,  # from scratch and in two minutes: transformers' 0.02 takes twice as long to get going
        image_size=SIZE,
        patch_size=PATCH,
        id2label=dict(enumerate(NAMES)),
        label2id={name: index for index, name in enumerate(NAMES)},
    )
    with atomic_folder(folder) as unfinished, TemporaryDirectory() as runs:
        model = ViTForImageClassification(config)
        rates: dict[str, Any] = {"learning_rate": 2e-3, "adam_beta2": 0.98, "weight_decay": 0.05}
        arguments = TrainingArguments(runs, num_train_epochs=scale.pretrain_epochs, **rates, **_common(seed))
        trainer = Trainer(
            model,
            arguments,
            train_dataset=Prepared(scenes, train),
            eval_dataset=Prepared(scenes, test),
            compute_metrics=accuracy,
        )
        trainer.train()
        result = trainer.evaluate()["eval_accuracy"]
        model.save_pretrained(unfinished)
        processor.save_pretrained(unfinished)
    return result


def tune(
    train: Any, test: Any, pretrained: Path, folder: Path, scale: Scale, seed: int, shapley_token: bool = True
) -> tuple[PeftModel, float]:
    """Load the pretrained model from disk, wrap it, fine-tune it and save the adapter; also returns its accuracy."""
    set_seed(seed)
    # The whole path: the adapter says where its base is, to programs that run elsewhere.
    model = AutoModelForImageClassification.from_pretrained(pretrained.resolve())
    processor = AutoImageProcessor.from_pretrained(pretrained)
    config = ShapleyConfig(r=16, lora_alpha=32, target_modules="all-linear", shapley_token=shapley_token)
    model = get_peft_model(model, config)
    # Ten times the default for LoRA: this base model has been pretrained for a minute, not for days.
    rates: dict[str, Any] = {"learning_rate": 5e-3, "head_learning_rate": 5e-3, "shapley_weight": 20.0}
    with atomic_folder(folder) as unfinished, TemporaryDirectory() as runs:
        trainer = ShapleyTrainer(
            model,
            ShapleyTrainingArguments(runs, num_train_epochs=scale.tune_epochs, **rates, **_common(seed)),
            train_dataset=train,
            eval_dataset=test,
            processing_class=processor,
            compute_metrics=accuracy,
        )
        trainer.train()
        result = trainer.evaluate()["eval_accuracy"]
        trainer.save_model(str(unfinished))  # the processor, too, and a card that tells of the training
    return model, result


def accuracy(prediction: Any) -> dict[str, float]:
    """Share of images whose largest logit is that of their label."""
    return {"accuracy": float(np.mean(prediction.predictions.argmax(-1) == prediction.label_ids))}


def _common(seed: int) -> dict[str, Any]:
    return {
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 250,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "logging_steps": 50,
        "save_strategy": "no",
        "report_to": "none",
        "remove_unused_columns": False,
        "use_cpu": True,
        "seed": seed,
    }
