"""A plain training step and one with the Shapley objective, of the same model on the same images, to be timed in turns."""

import copy
import itertools
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from shapadapter import ShapleyConfig, ShapleyTrainer, ShapleyTrainingArguments
from shapadapter.evaluation.cost import base_alone, peak_memory_of, seconds_of, with_merged_lora

PATCH, RANK, TARGETS = 16, 16, ["q_proj", "v_proj"]
SIZES = {
    "vit-s": {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536, "num_hidden_layers": 12},
    "vit-b": {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "num_hidden_layers": 12},
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Setting:
    """What is measured.

    Attributes:
        model: "vit-s" or "vit-b", with random weights: only time and memory count.
        players: N, a square number.
        classes: K.
        precision: "fp32", "bf16" for autocast, or "bf16 base" for autocast with the frozen base itself in bf16.
        tune: "lora" on queries and values with a trained classifier, or "full".
        batch: B.
        pairs: of coalitions for each image.
    """

    model: str = "vit-s"
    players: int = 196
    classes: int = 10
    precision: str = "bf16"
    tune: str = "lora"
    batch: int = 16
    pairs: int = 1


class Steps:
    """Both models of a setting, and what can be done with them.

    Args:
        setting: what is measured.
        compiled: whether both models go through torch.compile.
    """

    def __init__(self, setting: Setting, compiled: bool = False) -> None:
        torch.manual_seed(0)
        side = round(setting.players**0.5) * PATCH
        labels = {"id2label": {index: str(index) for index in range(setting.classes)}}
        base = ViTForImageClassification(
            ViTConfig(**SIZES[setting.model], image_size=side, patch_size=PATCH, **labels)
        ).to(DEVICE)
        lora = {"r": RANK, "target_modules": TARGETS} if setting.tune == "lora" else {}
        if setting.precision == "bf16 base":
            base.to(torch.bfloat16)
        self.setting = setting
        self.adapted = get_peft_model(copy.deepcopy(base), ShapleyConfig(**lora, tune=setting.tune))
        self.plain: nn.Module = base
        if lora:
            self.plain = get_peft_model(base, LoraConfig(**lora, modules_to_save=["classifier"]))
        self.trainer = _trainer(self.adapted, setting)
        self.batch = {
            "pixel_values": torch.randn(setting.batch, 3, side, side, device=DEVICE),
            "labels": torch.randint(setting.classes, (setting.batch,), device=DEVICE),
        }
        self._optimizers = [_optimizer(model) for model in (self.plain, self.adapted)]
        self._models = [torch.compile(m, dynamic=None) if compiled else m for m in (self.plain, self.adapted)]

    def plain_step(self) -> None:
        """Forward, task loss, backward, AdamW."""
        self._step(0, lambda model: model(**self.batch).loss)

    def our_step(self) -> None:
        """The same with the loss of `ShapleyTrainer`, coalitions drawn and terms noted; other coalitions each time."""
        self.trainer.state.global_step += 1
        self._step(1, lambda model: self.trainer.compute_loss(model, self.batch))

    def _step(self, index: int, loss_of: Callable[[nn.Module], Tensor]) -> None:
        model, optimizer = self._models[index].train(), self._optimizers[index]
        with self.precision():
            loss = loss_of(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    @contextmanager
    def precision(self) -> Iterator[None]:
        """Autocast, where that is asked for."""
        with torch.autocast(DEVICE, torch.bfloat16, enabled=self.setting.precision != "fp32"):
            yield

    def passes(self) -> tuple[Callable[[], Any], Callable[[], Any]]:
        """A forward pass of the base model, and one that explains all classes, with LoRA merged."""
        models = base_alone(self.adapted), with_merged_lora(self.adapted)

        def forward(model: nn.Module) -> None:
            with torch.inference_mode(), self.precision():
                model(pixel_values=self.batch["pixel_values"])

        return (lambda: forward(models[0])), (lambda: forward(models[1]))


def in_turns(plain: Callable[[], Any], other: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Ratios of the times of two calls made one after the other: their median, least and largest; and the plain's time."""
    plain(), other()
    times = [(seconds_of(plain), seconds_of(other)) for _ in range(repeats)]
    ratios = sorted(theirs / own for own, theirs in times)
    return {"ratio": median(ratios), "least": ratios[0], "most": ratios[-1], "plain_s": median(a for a, _ in times)}


def memory(plain: Callable[[], Any], other: Callable[[], Any], repeats: int = 3) -> float:
    """Ratio of the largest memory that two calls take, of several: coalitions of another size take another amount."""
    most = [max(peak_memory_of(run) for _ in itertools.repeat(None, repeats)) for run in (plain, other)]
    return most[1] / most[0]


def _trainer(model: nn.Module, setting: Setting) -> ShapleyTrainer:
    folder = tempfile.mkdtemp()
    options: dict[str, Any] = {"use_cpu": DEVICE == "cpu", "report_to": "none", "shapley_warmup": 0.0}
    return ShapleyTrainer(model, ShapleyTrainingArguments(folder, coalition_pairs=setting.pairs, **options))


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-5)
