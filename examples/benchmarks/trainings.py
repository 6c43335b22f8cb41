"""What the benchmark trains: two settings, one recipe for each, and the models that every comparison starts from.

Everything that is compared in a setting has the same base model, the same training pictures, LoRA on the same layers, the
same optimiser and, where nothing else is said, the same number of steps. Each training leaves a folder; a folder that is
there already is loaded instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import AutoModelForImageClassification, Trainer, TrainingArguments, set_seed

from shapadapter import ShapleyConfig, ShapleyTrainer, ShapleyTrainingArguments
from shapadapter.core.files import atomic_folder
from shapadapter.demo.digits import build_digits
from shapadapter.demo.models import Prepared, Scale, pretrain, tune

RECIPE: dict[str, dict[str, Any]] = {
    "demo": {  # the numbers of shapadapter.demo.models.tune, which trains ours
        "adapter": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"},
        "training": {"learning_rate": 5e-3, "lr_scheduler_type": "cosine", "warmup_steps": 0.1},
        "shapley": {"head_learning_rate": 5e-3, "shapley_weight": 20.0},
    },
    "objects": {  # for ours the defaults
        "adapter": {"r": 16, "lora_alpha": 32},
        "training": {"learning_rate": 5e-4, "lr_scheduler_type": "cosine", "warmup_steps": 0.1},
        "shapley": {},
    },
}
BATCH = 32
BUDGETS = (64, 128, 256, 512, 1024, 2048)  # evaluations of KernelSHAP and of refinement
SCALES = {
    "demo": Scale(5000, 4, 6, 1.5, truth_images=6, truth_evaluations=4096, budgets=BUDGETS),
    "demo, quick": Scale(2000, 2, 8, 2, truth_images=6, truth_evaluations=2048, budgets=BUDGETS[:-1]),
    # Each object on 44 backgrounds, seen once; the base model is the reader's.
    "objects": Scale(0, 44, 0, 1, truth_images=6, truth_evaluations=4096, budgets=BUDGETS[1:-1]),
    "objects, quick": Scale(0, 1, 0, 1, truth_images=4, truth_evaluations=1024, budgets=BUDGETS[:-1]),
}
TEST_PLACEMENTS = 6
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Setting:
    """Pictures, a base model and how to fine-tune it.

    Attributes:
        name: "demo" or "objects".
        base: folder of the model that every training starts from.
        train: rows of `pixel_values` and `labels`.
        test: likewise.
        mask: where the object of a test picture is, (H, W) bool.
        scale: how much is trained and measured.
        bf16: whether everything runs under bfloat16 autocast.
    """

    name: str
    base: Path
    train: Dataset[dict[str, Any]]
    test: Dataset[dict[str, Any]]
    mask: Callable[[int], Any]
    scale: Scale
    bf16: bool = False

    @property
    def recipe(self) -> dict[str, Any]:
        return RECIPE[self.name]

    @property
    def sampled(self) -> int:
        """The evaluations of KernelSHAP and refinement in tables that show one budget."""
        return min(512, self.scale.budgets[-1])

    @property
    def evaluations(self) -> tuple[int, int]:
        """Of ours, for each picture and step: without a gradient the coalitions, with one the picture itself."""
        coalitions = 2 * self.recipe["shapley"].get("coalition_pairs", 1)
        through = any(self.recipe["shapley"].get(name) for name in ("coalition_gradients", "coalition_task_weight"))
        return (0, 1 + coalitions) if through else (coalitions, 1)

    def epochs(self, wanted: float) -> float:
        """As many epochs as whole steps make of those wanted: times that each picture is seen."""
        return steps_of(self, wanted) * BATCH / len(self.train)

    @property
    def masked(self) -> Dataset[dict[str, Any]]:
        """The test pictures with a further column `mask`."""
        return WithMasks(self.test, self.mask)

    def pixels(self) -> Tensor:
        """Test pictures, evenly spread, whose true Shapley values are computed outside `evaluate`: (B, C, H, W)."""
        count = min(self.scale.truth_images, len(self.test))
        chosen = np.linspace(0, len(self.test) - 1, count).round().astype(int).tolist()
        return torch.stack([self.test[index]["pixel_values"] for index in chosen]).to(DEVICE)

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """The precision in which everything is trained and measured."""
        with torch.autocast(DEVICE, torch.bfloat16, enabled=self.bf16):
            yield


def demo_setting(output: Path, scale: Scale) -> Setting:
    """The demo's digits and its small ViT, trained from scratch; 64 players."""
    scenes = build_digits(0, scale.digits, scale.placements)
    train, test = scenes.split()
    set_seed(0)
    if not (output / "base").exists():
        pretrain(scenes, output / "base", scale, seed=0)
    parts = (Prepared(scenes, indices) for indices in (train, test))
    return Setting("demo", output / "base", *parts, lambda index: scenes.masks[test[index]], scale)


def objects_setting(output: Path, scale: Scale, base: str, stamps: Path | None, bf16: bool) -> Setting:
    """Photographs of objects on other backgrounds, and a pretrained model of the reader's with a new classifier."""
    from objects import NAMES, STAMPS, ObjectScenes, split

    folder = stamps or STAMPS
    train, test = split(folder)
    scenes = ObjectScenes(test, min(TEST_PLACEMENTS, scale.placements), 1, folder)
    if not (output / "base").exists():
        set_seed(0)
        labels = {"id2label": dict(enumerate(NAMES)), "label2id": {name: index for index, name in enumerate(NAMES)}}
        model = AutoModelForImageClassification.from_pretrained(
            base, **labels, ignore_mismatched_sizes=True, dtype=torch.float32
        )
        with atomic_folder(output / "base") as unfinished:
            model.save_pretrained(unfinished)
    pictures = ObjectScenes(train, scale.placements, 0, folder)
    return Setting("objects", output / "base", pictures, scenes, lambda index: scenes.scene(index)[2], scale, bf16)


class WithMasks(Dataset[dict[str, Any]]):
    """Test pictures and where their objects are."""

    def __init__(self, data: Dataset[dict[str, Any]], mask: Callable[[int], Any]) -> None:
        self.data, self.mask = data, mask

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, item: int) -> dict[str, Any]:
        return {**self.data[item], "mask": torch.as_tensor(self.mask(item))}


class ShuffledLabels(Dataset[dict[str, Any]]):
    """The same pictures with each other's labels: there is nothing to learn but them."""

    def __init__(self, data: Dataset[dict[str, Any]], seed: int) -> None:
        self.data, self.order = data, np.random.default_rng(seed).permutation(len(data))

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, item: int) -> dict[str, Any]:
        return {**self.data[item], "labels": self.data[int(self.order[item])]["labels"]}


def ours(setting: Setting, folder: Path, seed: int, shuffled: bool = False) -> PeftModel:
    """Our model, trained in one stage or loaded; with `shuffled`, on labels that mean nothing."""
    if not folder.exists():
        train = ShuffledLabels(setting.train, seed) if shuffled else setting.train
        if setting.name == "demo":
            tune(train, setting.test, setting.base, folder, setting.scale, seed)
        else:
            model = wrapped(setting.base, seed, **setting.recipe["adapter"])
            steps = steps_of(setting, setting.scale.tune_epochs)
            fit(ShapleyTrainer, setting, model, train, steps, seed, **setting.recipe["shapley"])
            with atomic_folder(folder) as unfinished:
                model.save_pretrained(str(unfinished))
    # Always from the folder, so that a run that was interrupted measures what an uninterrupted one does.
    base = AutoModelForImageClassification.from_pretrained(setting.base)
    model = PeftModel.from_pretrained(base, str(folder)).eval().to(DEVICE)
    return cast_once(model) if setting.bf16 else model


def cast_once(model: PeftModel) -> PeftModel:
    """Keep the frozen layers in bfloat16: autocast would cast them again in each of the many small passes."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "lora_" not in name:
            module.to(torch.bfloat16)
    return model


def plain(setting: Setting, folder: Path, like: Path, seed: int, trainer: Any = Trainer) -> Any:
    """The same base model fine-tuned without us: LoRA on the layers of the adapter in `like`, a trained classifier."""
    if not folder.exists():
        set_seed(seed)
        base = to_train(setting.base)
        adapter = {name: setting.recipe["adapter"][name] for name in ("r", "lora_alpha")}
        targets = sorted(PeftConfig.from_pretrained(str(like)).target_modules)
        model = get_peft_model(base, LoraConfig(**adapter, target_modules=targets, modules_to_save=["classifier"]))
        fit(trainer, setting, model, setting.train, steps_of(setting, setting.scale.tune_epochs), seed)
        save_merged(model, folder)
    return AutoModelForImageClassification.from_pretrained(folder).eval().to(DEVICE)


class TwoRates(Trainer):
    """Plain fine-tuning in which the new classifier has the learning rate of our head."""

    rate: float = ShapleyTrainingArguments.head_learning_rate

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        head = {id(value) for name, value in self.model.named_parameters() if "modules_to_save" in name}
        for group in list(optimizer.param_groups):
            mine = [value for value in group["params"] if id(value) in head]
            group["params"] = [value for value in group["params"] if id(value) not in head]
            optimizer.add_param_group({**group, "params": mine, "lr": self.rate})
        return optimizer


def wrapped(base: Path, seed: int, **config: Any) -> PeftModel:
    """The model of a folder with a new adapter."""
    set_seed(seed)
    return get_peft_model(to_train(base), ShapleyConfig(**config))


def to_train(base: Path) -> Any:
    """The model of a folder. On a CPU torch's fused attention has a slow backward pass: there, without it."""
    return AutoModelForImageClassification.from_pretrained(
        base, attn_implementation="eager" if DEVICE == "cpu" else None
    )


def save_merged(model: PeftModel, folder: Path) -> None:
    """Write a fine-tuned model as an ordinary one, LoRA folded into its weights."""
    with atomic_folder(folder) as unfinished:
        model.merge_and_unload().save_pretrained(unfinished)


def fit(
    trainer_class: Any, setting: Setting, model: Any, train: Any, steps: int, seed: int, own: Any = None, **more: Any
) -> None:
    """Train `model` in place by the setting's recipe.

    Args:
        trainer_class: `Trainer`, `ShapleyTrainer` or a class derived from it.
        setting: brings learning rate, schedule and precision.
        model: all of its parameters that want a gradient are trained.
        train: the pictures.
        steps: optimiser steps of `BATCH` pictures.
        seed: of their order.
        own: keyword arguments of the trainer itself.
        **more: further training arguments.
    """
    arguments: Any = TrainingArguments
    if issubclass(trainer_class, ShapleyTrainer):
        arguments, rates = ShapleyTrainingArguments, {"head_learning_rate"} & set(setting.recipe["shapley"])
        more = {**{name: setting.recipe["shapley"][name] for name in rates}, **more}
    with TemporaryDirectory() as runs:
        settings = arguments(
            runs,
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            logging_steps=50,
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            bf16=setting.bf16,
            use_cpu=DEVICE == "cpu",
            disable_tqdm=True,
            seed=seed,
            **setting.recipe["training"],
            **more,
        )
        trainer_class(model=model, args=settings, train_dataset=train, **(own or {})).train()


def steps_of(setting: Setting, epochs: float) -> int:
    """Optimiser steps of so many epochs, at least one."""
    return max(1, round(epochs * len(setting.train) / BATCH))


@torch.inference_mode()
def accuracy_of(model: Any, setting: Setting) -> float:
    """Share of the test pictures that the model names correctly."""
    right = 0
    with setting.autocast():
        for rows in DataLoader(setting.test, batch_size=250):
            said = model(pixel_values=rows["pixel_values"].to(DEVICE)).logits.argmax(dim=1).cpu()  # (b,)
            right += int((said == rows["labels"]).sum())
    return right / len(setting.test)
