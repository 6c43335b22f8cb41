"""The demo's two training runs: a small ViT the ordinary way, then the same with the Shapley objective."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from peft import PeftModel, get_peft_model
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from shapadapter.adapter import ShapleyConfig
from shapadapter.training import ShapleyTrainer, ShapleyTrainingArguments

from .digits import NAMES, SIZE
from .folders import whole_folder
from .scale import Scale

PATCH = 8


def pretrain(train: Any, test: Any, folder: Path, scale: Scale, seed: int) -> float:
    """Train a small ViT on the digits with a plain `Trainer` and save it; returns its test accuracy."""
    processor = ViTImageProcessorPil(size={"height": SIZE, "width": SIZE}, do_resize=False)
    config = ViTConfig(
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=128,
        initializer_range=0.1,  # from scratch and in two minutes: transformers' 0.02 takes twice as long to get going
        image_size=SIZE,
        patch_size=PATCH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        id2label=dict(enumerate(NAMES)),
        label2id={name: index for index, name in enumerate(NAMES)},
    )

    def prepare(rows: dict[str, Any]) -> dict[str, Any]:
        pixels = processor(rows["image"], return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels, "labels": rows["label"]}

    with whole_folder(folder) as unfinished:
        model = ViTForImageClassification(config)
        arguments = TrainingArguments(
            str(unfinished / "runs"),
            num_train_epochs=scale.pretrain_epochs,
            learning_rate=3e-3,
            weight_decay=0.05,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,
            **_common(seed),
        )
        trainer = Trainer(
            model,
            arguments,
            train_dataset=train.with_transform(prepare),
            eval_dataset=test.with_transform(prepare),
            compute_metrics=accuracy,
        )
        trainer.train()
        result = trainer.evaluate()["eval_accuracy"]
        model.save_pretrained(unfinished)
        processor.save_pretrained(unfinished)
    return result


def tune(train: Any, test: Any, pretrained: Path, folder: Path, scale: Scale, seed: int) -> tuple[PeftModel, float]:
    """Load the pretrained model from disk, wrap it, fine-tune it and save the adapter; also returns its accuracy."""
    model = AutoModelForImageClassification.from_pretrained(pretrained)
    model = get_peft_model(model, ShapleyConfig(r=16, lora_alpha=32, target_modules="all-linear", head_width=256))
    with whole_folder(folder) as unfinished:
        trainer = ShapleyTrainer(
            model,
            ShapleyTrainingArguments(
                str(unfinished / "runs"),
                num_train_epochs=scale.tune_epochs,
                learning_rate=2e-3,
                lr_scheduler_type="cosine",
                warmup_steps=0.1,
                shapley_weight=3.0,
                **_common(seed),
            ),
            train_dataset=train,
            eval_dataset=test,
            processing_class=AutoImageProcessor.from_pretrained(pretrained),
            compute_metrics=accuracy,
        )
        trainer.train()
        result = trainer.evaluate()["eval_accuracy"]
        model.save_pretrained(str(unfinished))
    return model, result


def accuracy(prediction: Any) -> dict[str, float]:
    """Share of images whose largest logit is that of their label."""
    return {"accuracy": float(np.mean(prediction.predictions.argmax(-1) == prediction.label_ids))}


def _common(seed: int) -> dict[str, Any]:
    return {
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 250,
        "logging_steps": 50,
        "save_strategy": "no",
        "report_to": "none",
        "remove_unused_columns": False,
        "use_cpu": True,
        "seed": seed,
    }
