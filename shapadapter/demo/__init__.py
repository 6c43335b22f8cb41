"""`shapadapter demo`: the main job on real digits, from the first one to the report."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from peft import PeftModel
from PIL import Image
from transformers import AutoImageProcessor, set_seed

from shapadapter.core.errors import CheckpointError
from shapadapter.core.files import alone_in, atomic_folder, write_together
from shapadapter.demo.digits import DigitScenes, build_digits
from shapadapter.demo.models import FULL, QUICK, Scale, claim, pretrain, save_pictures, tune
from shapadapter.evaluation import evaluate
from shapadapter.explanation.api import explain
from shapadapter.explanation.explanation import Explanation
from shapadapter.explanation.presence import LEVEL
from shapadapter.visual import gallery, write_page

SHOWN = 6

# What another program does with a saved adapter; the processor is the base model's.
_RELOAD = """
import sys
from pathlib import Path
from peft import AutoPeftModel
from transformers import AutoImageProcessor
from shapadapter import explain

adapter, pretrained, images, result = sys.argv[1:]
model, processor = AutoPeftModel.from_pretrained(adapter), AutoImageProcessor.from_pretrained(pretrained)
explain(model, sorted(Path(images).glob("*.png")), processor).save(result)
"""


def run(output: Path, seed: int = 0, quick: bool = False) -> list[tuple[str, str]]:
    """Train, wrap, fine-tune, save, load in a new process, measure, draw; returns the rows of the table it prints."""
    claim(output)
    with alone_in(output):
        return _run(output, seed, QUICK if quick else FULL)


def _run(output: Path, seed: int, scale: Scale) -> list[tuple[str, str]]:
    start = time.perf_counter()
    set_seed(seed)
    print("1/6  Real digits in cluttered scenes, with the digit's pixels as ground truth")
    scenes = build_digits(seed, scale.digits, scale.placements)
    train, test = (scenes.to_dataset(indices) for indices in scenes.split())
    print(f"     {len(train)} for training, {len(test)} for testing")
    print("2/6  The user's pretrained model: a small ViT, trained the ordinary way")
    base_accuracy = pretrain(scenes, output / "pretrained", scale, seed)
    print("3/6  Loaded from disk, wrapped, fine-tuned with the Shapley objective")
    model, _ = tune(train, test, output / "pretrained", output / "adapter", scale, seed)
    print("4/6  The adapter is loaded again in a new process")
    processor = AutoImageProcessor.from_pretrained(output / "pretrained")
    shown = scenes.split()[1][:SHOWN]
    images = [Image.fromarray(scenes.images[index]) for index in shown]
    _check_reload(explain(model, images, processor), output)
    print("5/6  Compared with the truth")
    rows = [("accuracy of the base model", f"{base_accuracy:.3f}"), *_measure(model, processor, scenes, scale, seed)]
    write_together({output / "table.json": json.dumps({"seed": seed, "rows": rows}, indent=2).encode()})
    if scale is QUICK:
        print("     A smoke run: these numbers mean little.")
    width = max(len(name) for name, _ in rows)
    line = "-" * (width + 2 + max(len(value) for _, value in rows))
    print("\n".join([line, *(f"{name:<{width}}  {value}" for name, value in rows), line]))
    print("6/6  Pictures")
    explanation = explain(model, images, processor, refine="gradient")
    gallery(explanation).savefig(output / "attributions.png")
    labels = scenes.labels[shown].tolist()
    write_page(explanation, output / "report.html", title="shapadapter demo", table=rows, true_labels=labels)
    save_pictures(scenes, output)
    print(
        f"Done in {time.perf_counter() - start:.0f} s. Look at:\n  {output / 'attributions.png'}\n  {output / 'report.html'}"
    )
    print(
        f"Next: shapadapter evaluate {output / 'adapter'} --data {output / 'test'} --masks {output / 'masks'} --images 2 "
        f"--output {output / 'evaluation'}"
    )
    return rows


def _check_reload(expected: Explanation, output: Path) -> None:
    """Let a new process load the adapter and explain; its numbers must be the same."""
    with atomic_folder(output / "explanation") as folder, TemporaryDirectory() as images:
        for number, pixels in enumerate(expected.images):
            Image.fromarray(pixels.numpy()).save(Path(images) / f"{number}.png")
        places = [output / "adapter", output / "pretrained", images, folder]
        subprocess.run([sys.executable, "-c", _RELOAD, *map(str, places)], check=True)
        again = Explanation.load(folder)
    gap = (again.attributions - expected.attributions).abs().max().item()
    if gap > 1e-5:
        raise CheckpointError(f"The reloaded adapter explains differently: attributions differ by {gap:.1e}.")
    print(f"     same attributions, largest difference {gap:.0e}")


def _measure(model: PeftModel, processor: Any, scenes: DigitScenes, scale: Scale, seed: int) -> list[tuple[str, str]]:
    """The rows of the table that `evaluate` finds on the test scenes."""
    data = [
        {"image": Image.fromarray(scenes.images[i]), "label": int(scenes.labels[i]), "mask": scenes.masks[i]}
        for i in scenes.split()[1]
    ]
    found = evaluate(
        model,
        data,
        processor,
        methods=(LEVEL,),
        images=scale.truth_images,
        truth_evaluations=scale.truth_evaluations,
        budgets=scale.budgets,
        seed=seed,
        batch_size=100,
    )
    own, gradient, about = found.methods["shapadapter"], found.methods[LEVEL], found.about
    players = about["players"][0] * about["players"][1]
    return [
        ("accuracy of the adapted model", f"{found.task['accuracy'].mean:.3f}"),
        ("largest efficiency gap |null + sum - logit|", f"{found.task['largest_efficiency_gap'].mean:.0e}"),
        (f"relative L2 error on {scale.truth_images} images: one forward pass", f"{own['error'].mean:.2f}"),
        ("... forward and backward pass", f"{gradient['error'].mean:.2f}"),
        *(
            # A pair of coalitions for each unknown determines the fit and leaves nothing over against noise.
            (
                f"... KernelSHAP, {budget} evaluations{', too few to be stable' * (budget <= 2 * players)}",
                f"{error.mean:.2f}",
            )
            for budget, error in found.kernel_shap.items()
        ),
        ("... the reference that they are compared with", f"{about['truth_error']:.2f}"),
        ("positive attribution inside the digit, on these images", f"{own['energy_inside'].mean:.0%}"),
        ("... by chance: the digit's share of the image", f"{about['area']:.0%}"),
        ("time to predict and explain / to predict (LoRA merged)", f"{own['time'].mean:.2f}x"),
        ("... forward and backward pass, for one image and class", f"{gradient['time'].mean:.1f}x"),
    ]
