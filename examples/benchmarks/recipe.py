# /// script
# requires-python = ">=3.11"
# dependencies = ["shapadapter[demo,compare]", "scikit-learn"]
# [tool.uv.sources]
# shapadapter = { path = "../.." }
# ///
"""Why the training recipe is what it is: each variant of it trained from the same base model, with as many steps.

python examples/benchmarks/recipe.py --setting demo --quick --variants recipe "no Shapley loss" "weight 10" plain
python examples/benchmarks/recipe.py --setting objects --base facebook/dinov2-small --bf16 --seeds 0 1 2

Prints a Markdown table, a row for each variant. Every result is kept as json in the output folder; a second run trains
only what is missing.

Errors are measured without bias. Two independent KernelSHAP estimates f1 and f2, of 512 coalitions each, have errors that
do not correlate: (phi - f1).(phi - f2) is on average |phi - truth|^2, f1.f2 is |truth|^2, and |f1 - f2|^2 / 2 is the squared
error of KernelSHAP itself. Each is summed over 16 test pictures, for the predicted class, before the root of a ratio is taken.

The relative cost counts how often the model is evaluated for each picture, with or without a gradient, over the whole
training; how much a gradient adds, the seconds tell.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np
import torch
from compare import claim, kept
from compare_report import over_seeds, table
from recipe_variants import Varied, variants
from torch import Tensor
from trainings import (
    DEVICE,
    RECIPE,
    SCALES,
    Setting,
    accuracy_of,
    demo_setting,
    fit,
    objects_setting,
    plain,
    steps_of,
    wrapped,
)
from transformers import TrainingArguments
from transformers.utils import logging

from shapadapter import ShapleyTrainingArguments
from shapadapter.core.estimates import kernel_shap
from shapadapter.core.grid import Grid, pixels_to_players
from shapadapter.core.shapley import sample_pairs
from shapadapter.evaluation.localization import energy_inside
from shapadapter.explanation.game import active_layer

IMAGES = 16
COALITIONS = 512
COLUMNS = {
    "accuracy": "accuracy ↑",
    "error": "error ↓",
    "sampled": "KernelSHAP-512 error",
    "ratio": "error / KernelSHAP-512 ↓",
    "explained": "explained beyond equal shares ↑",
    "energy": "energy inside the mask ↑",
    "seconds": "training seconds ↓",
    "cost": "relative cost ↓",
}
DIGITS = {"seconds": 0, "cost": 2}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*variants(RECIPE["demo"]), "plain"]
    parser.add_argument("--setting", default="demo", choices=["demo", "objects"])
    parser.add_argument("--variants", nargs="+", default=names, choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--output", type=Path, help="by default recipe-SETTING, or recipe-SETTING-quick")
    parser.add_argument("--quick", action="store_true", help="less data and fewer steps: to see that it runs, and how")
    parser.add_argument("--base", help="with objects: a pretrained vision transformer, on the Hub or in a folder")
    parser.add_argument("--stamps", type=Path, help="with objects: the folder of Tux Paint's stamps")
    parser.add_argument("--bf16", action="store_true", help="with objects: train and measure under bfloat16 autocast")
    args = parser.parse_args(arguments)
    if args.setting == "demo" and (args.base or args.stamps or args.bf16):
        parser.error("--base, --stamps and --bf16 are for --setting objects")
    if args.setting == "objects" and args.base is None:
        parser.error("--setting objects needs a base model, e.g. --base facebook/dinov2-small")
    name = args.setting + (", quick" if args.quick else "")
    scale, output = SCALES[name], args.output or Path("recipe-" + name.replace(", ", "-"))
    settings = {"recipe": RECIPE[args.setting], "defaults": defaults(), "scale": asdict(scale)}
    claim(output, {**settings, "base": args.base, "bf16": args.bf16})
    if args.setting == "demo":
        setting = demo_setting(output, scale)
    else:
        setting = objects_setting(output, scale, args.base, args.stamps, args.bf16)
    logging.disable_progress_bar()  # of every model that is loaded
    rows = []
    for variant in args.variants:
        files = {seed: output / f"{variant.replace(' ', '-')}-seed-{seed}.json" for seed in args.seeds}
        runs = [kept(file, partial(result, setting, variant, seed)) for seed, file in files.items()]
        cells = [
            over_seeds(runs, lambda run, at=at: run[at], DIGITS.get(at, 3)) if at in runs[0] else "" for at in COLUMNS
        ]
        rows.append((variant, *cells))
    print(table(("variant", *COLUMNS.values()), rows))


def defaults() -> dict[str, Any]:
    """What `ShapleyTrainingArguments` adds to its base class, with what it is where the recipe says nothing."""
    inherited = {one.name for one in fields(TrainingArguments)}
    return {one.name: one.default for one in fields(ShapleyTrainingArguments) if one.name not in inherited}


def result(setting: Setting, name: str, seed: int) -> dict[str, float]:
    """Train a variant, or plainly; returns its columns."""
    print(f"Training: {name}, seed {seed}", flush=True)
    if name == "plain":
        return plain_result(setting, seed)
    variant = variants(setting.recipe)[name]
    varied = Varied(**vars(setting), variant=variant)
    model = wrapped(setting.base, seed, **varied.recipe["adapter"])
    variant.rebuild(model)
    steps, start = variant.steps * steps_of(setting, setting.scale.tune_epochs), perf_counter()
    fit(variant.trainer, varied, model, setting.train, steps, seed, variant.own, **varied.recipe["shapley"])
    seconds, cost = perf_counter() - start, variant.steps * sum(varied.evaluations) / sum(setting.evaluations)
    model.eval()
    return {"accuracy": accuracy_of(model, setting), **measure(setting, model), "seconds": seconds, "cost": cost}


def plain_result(setting: Setting, seed: int) -> dict[str, float]:
    """LoRA on the same layers and a classifier, without us: it explains nothing."""
    with TemporaryDirectory() as folder:
        like = Path(folder) / "like"
        wrapped(setting.base, seed, **setting.recipe["adapter"]).peft_config["default"].save_pretrained(str(like))
        start = perf_counter()
        model = plain(setting, Path(folder) / "model", like, seed)
    seconds = perf_counter() - start
    return {"accuracy": accuracy_of(model, setting), "seconds": seconds, "cost": 1 / sum(setting.evaluations)}


@torch.inference_mode()
def measure(setting: Setting, model: Any) -> dict[str, float]:
    """Errors and localisation on test pictures that are evenly spread; the same coalitions for every model."""
    chosen = np.linspace(0, len(setting.test) - 1, min(IMAGES, len(setting.test))).round().astype(int).tolist()
    rows = [setting.masked[index] for index in chosen]
    pixels = torch.stack([row["pixel_values"] for row in rows]).to(DEVICE)  # (B, C, H, W)
    grid, generator = Grid(*active_layer(model).tiling(pixel_values=pixels).players), torch.Generator().manual_seed(0)
    estimates = []
    with setting.autocast():
        output = model(pixel_values=pixels)
        for _ in range(2):
            coalitions = sample_pairs(len(rows), grid.rows * grid.cols, COALITIONS // 2, generator)  # (B, M, N)
            parts = coalitions.to(DEVICE).split(64, dim=1)  # (B, m, N) each
            values = [model(pixel_values=pixels, coalitions=part).coalition_values.cpu() for part in parts]
            ends = output.null_values.cpu(), output.logits.float().cpu()  # (B, K) each
            estimates.append(kernel_shap(coalitions, torch.cat(values, dim=1), *ends))  # (B, N, K)
    classes = output.logits.argmax(dim=1).cpu()[:, None, None]  # (B, 1, 1)
    said, first, second = (
        values.double().take_along_dim(classes, dim=2)[..., 0] for values in (output.attributions.cpu(), *estimates)
    )  # (B, N, K) -> (B, N)
    inside = pixels_to_players(torch.stack([row["mask"] for row in rows]), grid)  # (B, rows, cols)
    energy = energy_inside(said.unflatten(1, inside.shape[1:]), inside).nanmean()
    return {**errors(said, first, second), "energy": float(energy)}


def errors(said: Tensor, first: Tensor, second: Tensor) -> dict[str, float]:
    """Errors of attributions (B, N), pooled over pictures, from two independent estimates (B, N) of the truth."""
    equal = first.mean(dim=1, keepdim=True)  # (B, 1): by efficiency the mean of them all
    squares = ((said - first) * (said - second)).sum(), ((equal - first) * (equal - second)).sum()
    sampled, truth = (first - second).square().sum() / 2, (first * second).sum()
    ratios = {"error": squares[0] / truth, "sampled": sampled / truth, "ratio": squares[0] / sampled}
    roots = {name: float(ratio.clamp(min=0).sqrt()) for name, ratio in ratios.items()}
    return {**roots, "explained": float(1 - squares[0] / squares[1])}


if __name__ == "__main__":
    main()
