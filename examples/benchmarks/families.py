# /// script
# requires-python = ">=3.11"
# dependencies = ["shapadapter[demo]"]
# [tool.uv.sources]
# shapadapter = { path = "../.." }
# ///
"""Does every kind of classifier learn to explain itself? Four small ones on the demo's digits, one after the other.

python examples/benchmarks/families.py --models vit swin convnext resnet --output families

Each model is trained from scratch, saved, and fine-tuned from there three times with the same number of steps: the plain
way (LoRA and the classifier, a `Trainer`, no explanation), with the adapter but without the Shapley loss, and with it. All
have 4 x 4 players on 64 x 64 pixels. Errors are relative L2 to KernelSHAP with 4,096 evaluations, for the predicted class
of held-out images, each on the model's own game: of an untrained head (which gives every player the same, by efficiency),
of the adapter without the Shapley loss, and with it. Prints a Markdown row for each model and keeps it in a json file, so
that a second run only does what is missing.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from faithfulness import faithfulness
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForImageClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

from shapadapter import ShapleyConfig, ShapleyTrainer, ShapleyTrainingArguments
from shapadapter.demo.digits import NAMES, SIZE, DigitScenes, build_digits
from shapadapter.demo.models import Prepared, Scale, accuracy

LABELS = {"id2label": dict(enumerate(NAMES)), "label2id": {name: index for index, name in enumerate(NAMES)}}
VIT = {"hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 192, "patch_size": 16}
SWIN = {"embed_dim": 32, "depths": [2, 2, 2], "num_heads": [2, 4, 8], "window_size": 4, "drop_path_rate": 0.0}
CONVNEXT = {"hidden_sizes": [32, 64, 128], "depths": [2, 2, 2], "num_stages": 3, "layer_scale_init_value": 0.1}
RESNET = {"embedding_size": 32, "hidden_sizes": [32, 64, 128], "depths": [2, 2, 2], "layer_type": "basic"}
# Transformers' initial scale of 0.02 is for training that takes days.
MODELS = {
    "vit": lambda: ViTForImageClassification(ViTConfig(**VIT, **LABELS, image_size=SIZE, initializer_range=0.08)),
    "swin": lambda: SwinForImageClassification(SwinConfig(**SWIN, **LABELS, image_size=SIZE, initializer_range=0.08)),
    "convnext": lambda: ConvNextForImageClassification(ConvNextConfig(**CONVNEXT, **LABELS, initializer_range=0.08)),
    "resnet": lambda: ResNetForImageClassification(ResNetConfig(**RESNET, **LABELS)),
}
# A transformer without windows needs longer to learn to see.
LONGER = {"vit": 2}
FULL = Scale(digits=5000, placements=4, pretrain_epochs=4, tune_epochs=1.5, truth_images=8, truth_evaluations=4096)
QUICK = Scale(digits=500, placements=1, pretrain_epochs=1, tune_epochs=1, truth_images=2, truth_evaluations=512)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--prediction", default="vote", choices=["vote", "classifier"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("families"))
    parser.add_argument("--quick", action="store_true", help="a tenth of the data, to see that it runs")
    args = parser.parse_args()
    scale = QUICK if args.quick else FULL
    scenes = build_digits(0, scale.digits, scale.placements)
    print(
        "| model | accuracy, plain | without Shapley loss | with | error, untrained head | without Shapley loss | with |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in args.models:
        file = args.output / f"{name}-{args.prediction}-{args.seed}.json"
        if not file.exists():
            measured = Benchmark(name, scenes, scale, args).run()
            file.write_text(json.dumps(measured))
        print(row(name, json.loads(file.read_text())), flush=True)


class Benchmark:
    """One model's trainings and measurements."""

    def __init__(self, name: str, scenes: DigitScenes, scale: Scale, args: argparse.Namespace) -> None:
        self.folder = args.output / f"{name}-{args.seed}"
        self.make, self.scale, self.args = MODELS[name], scale, args
        self.pretrain_epochs = scale.pretrain_epochs * LONGER.get(name, 1)
        self.train, self.test = (Prepared(scenes, indices) for indices in scenes.split())

    def run(self) -> dict[str, Any]:
        set_seed(self.args.seed)
        if not self.folder.exists():
            base = self.make()
            self.fit(Trainer, TrainingArguments, base, self.pretrain_epochs)
            base.save_pretrained(self.folder)
        without, with_loss = self.adapted(0.0), self.adapted(3.0)
        return {"plain": self.plain(with_loss["targets"]), "without": without, "with": with_loss}

    def adapted(self, shapley_weight: float) -> dict[str, Any]:
        set_seed(self.args.seed)
        base = AutoModelForImageClassification.from_pretrained(self.folder)
        config = ShapleyConfig(r=16, lora_alpha=32, prediction=self.args.prediction, head_width=256)
        model = get_peft_model(base, config)
        found = self.fit(
            ShapleyTrainer,
            ShapleyTrainingArguments,
            model,
            self.scale.tune_epochs,
            shapley_weight=shapley_weight,
            head_learning_rate=2e-3,
        )
        chosen = range(self.scale.truth_images)
        pixels = torch.stack([self.test[index]["pixel_values"] for index in chosen])  # (B, C, H, W)
        errors = faithfulness(model.eval(), pixels, self.scale, self.args.seed)
        return {"accuracy": found, "errors": errors, "targets": sorted(model.peft_config["default"].target_modules)}

    def plain(self, targets: list[str]) -> float:
        set_seed(self.args.seed)
        base = AutoModelForImageClassification.from_pretrained(self.folder)
        lora = LoraConfig(r=16, lora_alpha=32, target_modules=targets, modules_to_save=["classifier"])
        return self.fit(Trainer, TrainingArguments, get_peft_model(base, lora), self.scale.tune_epochs)

    def fit(self, trainer_class: Any, arguments_class: Any, model: Any, epochs: float, **more: Any) -> float:
        """Train and return the accuracy on the test scenes."""
        arguments = arguments_class(
            str(self.args.output / "runs"),
            num_train_epochs=epochs,
            learning_rate=2e-3,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,
            adam_beta2=0.98,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=250,
            logging_steps=200,
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            use_cpu=True,
            seed=self.args.seed,
            disable_tqdm=True,
            **more,
        )
        data = {"train_dataset": self.train, "eval_dataset": self.test, "compute_metrics": accuracy}
        trainer = trainer_class(model, arguments, **data)
        trainer.train()
        return trainer.evaluate()["eval_accuracy"]


def row(name: str, found: dict[str, Any]) -> str:
    accuracies = [found["plain"], found["without"]["accuracy"], found["with"]["accuracy"]]
    errors = [found["with"]["errors"]["equal shares"], *(found[k]["errors"]["one pass"] for k in ("without", "with"))]
    return f"| {name} | " + " | ".join(f"{cell:.3f}" for cell in (*accuracies, *errors)) + " |"


if __name__ == "__main__":
    main()
