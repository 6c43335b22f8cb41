# /// script
# requires-python = ">=3.11"
# dependencies = ["shapadapter[demo]"]
# [tool.uv.sources]
# shapadapter = { path = "../.." }
# ///
"""Does the Shapley token help? The demo's fine-tuning with and without it, several seeds, one base model.

python examples/benchmarks/token_ablation.py --seeds 3

Both variants have the same head: without a token its second branch is not gated. Prints a Markdown table with mean and
standard deviation over seeds; errors are relative L2 to KernelSHAP with 4,096 evaluations, on test images.
"""

import argparse
from pathlib import Path
from statistics import mean, stdev

import torch
from faithfulness import energy_in_masks, faithfulness
from transformers import AutoImageProcessor, set_seed

from shapadapter.demo.digits import build_digits
from shapadapter.demo.models import FULL, pretrain, tune
from shapadapter.explanation.api import explain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("token-ablation"))
    parser.add_argument("--pretrained", type=Path, help="base model of an earlier run; trained if missing")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    set_seed(0)
    scenes = build_digits(0, FULL.digits, FULL.placements)
    pretrained = args.pretrained or args.output / "pretrained"
    if not pretrained.exists():
        pretrain(scenes, pretrained, FULL, seed=0)
    processor = AutoImageProcessor.from_pretrained(pretrained)
    train, test = (scenes.to_dataset(indices) for indices in scenes.split())
    images, masks = test["image"][:], torch.from_numpy(scenes.masks[scenes.split()[1]])
    print(
        "| token | accuracy | error, one pass | error, KernelSHAP 512 | inside the digit |\n| --- | --- | --- | --- | --- |"
    )
    for token in (True, False):
        rows = []
        for seed in range(args.seeds):
            folder = args.output / f"adapter-{token}-{seed}"
            model, accuracy = tune(train, test, pretrained, folder, FULL, seed, shapley_token=token)
            explanation = explain(model, images, processor, batch_size=100)
            pixels = processor(images[: FULL.truth_images], return_tensors="pt")["pixel_values"]
            errors = faithfulness(model, pixels, FULL, seed=0)
            rows.append((accuracy, errors["one pass"], errors["512"], energy_in_masks(explanation, masks)))
        cells = [f"{mean(c):.3f} ± {stdev(c):.3f}" if len(c) > 1 else f"{c[0]:.3f}" for c in zip(*rows, strict=True)]
        print(f"| {'with' if token else 'without'} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
