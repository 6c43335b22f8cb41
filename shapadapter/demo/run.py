"""The demo from the first digit to the report."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoImageProcessor, set_seed

from shapadapter.core.errors import CheckpointError
from shapadapter.core.files import write_together
from shapadapter.core.locks import alone_in
from shapadapter.demo.digits import DigitScenes, build_digits
from shapadapter.demo.models import FULL, QUICK, Scale, claim, pretrain, save_pictures, tune, whole_folder
from shapadapter.demo.scorecard import as_text, cost_of_explaining, faithfulness, localisation
from shapadapter.explanation.api import explain
from shapadapter.explanation.explanation import Explanation
from shapadapter.visual import gallery, write_page

SHOWN = 6


def run(output: Path, seed: int = 0, quick: bool = False) -> list[tuple[str, str]]:
    """Train, wrap, fine-tune, save, load in a new process, measure, draw; returns the rows of the table it prints.

    Args:
        output: folder for everything the demo writes.
        seed: seed of data, training and estimates.
        quick: a smoke run under a minute; its numbers mean little.
    """
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
    model, accuracy = tune(train, test, output / "pretrained", output / "adapter", scale, seed)
    print("4/6  The adapter is loaded again in a new process")
    explanation = _explain_test(model, scenes, output)
    _check_reload(explanation[:SHOWN], scenes, output)
    print("5/6  Compared with the truth")
    rows = _measure(model, explanation, scenes, (base_accuracy, accuracy), (output, scale, seed))
    if scale is QUICK:
        print("     A smoke run: these numbers mean little.")
    print(as_text(rows))
    print("6/6  Pictures")
    _draw(explanation[:SHOWN], scenes.labels[scenes.split()[1]][:SHOWN].tolist(), rows, output)
    save_pictures(scenes, output)
    print(
        f"Done in {time.perf_counter() - start:.0f} s. Look at:\n  {output / 'attributions.png'}\n  {output / 'report.html'}"
    )
    print(
        f"Next: shapadapter evaluate {output / 'adapter'} --data {output / 'test'} --masks {output / 'masks'} --images 2 "
        f"--output {output / 'evaluation'}"
    )
    return rows


def _test_images(scenes: DigitScenes) -> list[Image.Image]:
    return [Image.fromarray(scenes.images[index]) for index in scenes.split()[1]]


def _explain_test(model: PeftModel, scenes: DigitScenes, output: Path) -> Explanation:
    processor = AutoImageProcessor.from_pretrained(output / "pretrained")
    return explain(model, _test_images(scenes), processor, batch_size=100)


def _check_reload(expected: Explanation, scenes: DigitScenes, output: Path) -> None:
    """Let a new process load the adapter and explain; its numbers must be the same."""
    with whole_folder(output / "explanation") as folder, TemporaryDirectory() as temporary:
        images = Path(temporary)
        for number, image in enumerate(_test_images(scenes)[: len(expected)]):
            image.save(images / f"{number}.png")
        arguments = [output / "adapter", output / "pretrained", images, folder]
        subprocess.run([sys.executable, "-m", "shapadapter.demo.reload", *map(str, arguments)], check=True)
        again = Explanation.load(folder)
    gap = (again.attributions - expected.attributions).abs().max().item()
    if gap > 1e-5:
        raise CheckpointError(f"The reloaded adapter explains differently: attributions differ by {gap:.1e}.")
    print(f"     same attributions, largest difference {gap:.0e}")


def _measure(
    model: PeftModel,
    explanation: Explanation,
    scenes: DigitScenes,
    accuracies: tuple[float, float],
    settings: tuple[Path, Scale, int],
) -> list[tuple[str, str]]:
    output, scale, seed = settings
    processor = AutoImageProcessor.from_pretrained(output / "pretrained")
    pixels = processor(_test_images(scenes)[:100], return_tensors="pt")["pixel_values"]  # (100, C, H, W)
    errors = faithfulness(model, pixels[: scale.truth_images], scale, seed)
    inside, area = localisation(explanation, torch.from_numpy(scenes.masks[scenes.split()[1]]))
    ratio = cost_of_explaining(model, pixels)
    players = explanation.attributions.shape[1:3].numel()
    rows = [
        ("accuracy of the base model", f"{accuracies[0]:.3f}"),
        ("accuracy of the adapted model", f"{accuracies[1]:.3f}"),
        ("largest efficiency gap |null + sum - logit|", f"{explanation.efficiency_gap.max().item():.0e}"),
        (f"relative L2 error on {scale.truth_images} images: one forward pass", f"{errors['one pass']:.2f}"),
        *((f"... KernelSHAP, {_spent(budget, players)}", f"{errors[str(budget)]:.2f}") for budget in scale.budgets),
        ("... the reference that they are compared with", f"{errors['truth']:.2f}"),
        ("positive attribution inside the digit", f"{inside:.0%}"),
        ("... by chance: the digit's share of the image", f"{area:.0%}"),
        ("time to predict and explain / to predict (LoRA merged)", f"{ratio:.2f}x"),
    ]
    report: dict[str, Any] = {"seed": seed, "rows": rows}
    write_together({output / "table.json": json.dumps(report, indent=2).encode()})
    return rows


def _spent(budget: int, players: int) -> str:
    # A pair of coalitions for each unknown determines the fit and leaves nothing over against noise.
    return f"{budget} evaluations{', too few to be stable' if budget <= 2 * players else ''}"


def _draw(explanation: Explanation, digits: list[int], rows: list[tuple[str, str]], output: Path) -> None:
    figure = gallery(explanation)
    figure.savefig(output / "attributions.png")
    write_page(explanation, output / "report.html", title="shapadapter demo", table=rows, true_labels=digits)
