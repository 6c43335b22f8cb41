# /// script
# requires-python = ">=3.11"
# dependencies = ["shapadapter"]
# [tool.uv.sources]
# shapadapter = { path = "../.." }
# ///
"""How do time and memory of a training step grow with players, classes, pairs and batch?

python examples/benchmarks/cost_curve.py --output cost

One setting is varied at a time around a ViT-S with 196 players, 10 classes, one pair and 8 images; a step with the Shapley
objective and a plain one are timed in turns in one process. Beside them, from times of the same process:

- the limit: a plain step and one more forward pass without gradients, since a coalition and its complement have as many
  tokens together as the image. It is 4/3 where backward costs two forward passes (full tuning), more with LoRA, whose
  backward costs less;
- ViT-Shapley: a step of its explainer with 32 masked forward passes of a surrogate per image, which training the surrogate
  comes before;
- what explaining one image costs afterwards, in forward passes: one pass, refined with 64 evaluations, KernelSHAP with 512.

Writes cost.json and cost.png, and prints the numbers.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from stepping import Setting, Steps, in_turns, memory

from shapadapter import PatchGame, explain
from shapadapter.evaluation.cost import seconds_of, with_merged_lora

CENTRE, ALONE = Setting(batch=8), Setting(batch=1)
CURVES = {
    "players": [49, 100, 196, 256, 400, 576],
    "classes": [2, 10, 100, 1000, 10000],
    "pairs": [1, 2, 4, 8],
    "batch": [1, 2, 4, 8, 16, 32],
}
VIT_SHAPLEY_PASSES, KERNEL_SHAP_EVALUATIONS, REFINEMENTS = 32, 512, 64


def point(setting: Setting, repeats: int) -> dict[str, float]:
    """Ratios of time and memory of a step, and of the passes it is compared with, to a plain step."""
    steps = Steps(setting)
    step = in_turns(steps.plain_step, steps.our_step, repeats)
    plain, explaining = steps.passes()
    passes = in_turns(plain, explaining, repeats)
    # A plain step as the unit, as slow as the machine was between these two.
    forward = passes["plain_s"] / min(seconds_of(steps.plain_step) for _ in range(repeats))
    return {
        "time": step["ratio"],
        "least": step["least"],
        "most": step["most"],
        "memory": memory(steps.plain_step, steps.our_step),
        "forward": forward,
        "explaining": passes["ratio"],
    }


def afterwards(repeats: int) -> dict[str, float]:
    """What explaining one image takes, in forward passes of the base model."""
    steps = Steps(ALONE)
    plain, explaining = steps.passes()
    model, pixels = with_merged_lora(steps.adapted), steps.batch["pixel_values"]

    def kernel_shap() -> None:
        PatchGame(model, pixels).kernel_shap(KERNEL_SHAP_EVALUATIONS, torch.Generator().manual_seed(0))

    with steps.precision():
        return {
            "one pass": in_turns(plain, explaining, 5 * repeats)["ratio"],
            f"refined, {REFINEMENTS}": in_turns(
                plain, lambda: explain(model, pixels, top_k=1, refine=REFINEMENTS), repeats
            )["ratio"],
            f"KernelSHAP, {KERNEL_SHAP_EVALUATIONS}": in_turns(plain, kernel_shap, repeats)["ratio"],
        }


def draw(found: dict[str, dict[str, Any]]) -> Figure:
    """Four curves of time above four of memory, and what explaining takes afterwards."""
    figure = Figure(figsize=(15, 6), layout="constrained")
    for column, name in enumerate(CURVES):
        curve(figure.add_subplot(2, 5, column + 1), figure.add_subplot(2, 5, column + 6), name, found[name])
    figure.axes[0].set_ylabel("plain steps")
    figure.axes[1].set_ylabel("memory of a plain step")
    legend = figure.add_subplot(2, 5, 10)
    legend.axis("off")
    legend.legend(*figure.axes[0].get_legend_handles_labels(), fontsize=9, loc="upper left", frameon=False)
    bars = figure.add_subplot(2, 5, 5)
    ways = found["afterwards"]
    drawn = bars.barh(list(ways), list(ways.values()), color=["tab:blue", "tab:cyan", "tab:red"])
    bars.bar_label(drawn, fmt="{:,.3g}", padding=3)
    bars.set(title="explaining one image", xlabel="forward passes", xscale="log", xlim=(0.5, 8000))
    bars.invert_yaxis()
    return figure


def curve(time: Axes, space: Axes, name: str, points: dict[str, dict[str, float]]) -> None:
    """Time and memory of a step as one setting grows."""
    values = CURVES[name]
    series = {key: [points[str(value)][key] for value in values] for key in points[str(values[0])]}
    pairs = [value if name == "pairs" else 1 for value in values]
    limit = [1 + count * forward for count, forward in zip(pairs, series["forward"], strict=True)]
    rival = [1 + VIT_SHAPLEY_PASSES * forward for forward in series["forward"]]
    time.fill_between(values, series["least"], series["most"], color="tab:blue", alpha=0.2, linewidth=0)
    time.plot(values, series["time"], "o-", color="tab:blue", label="with the Shapley objective")
    time.plot(values, limit, "--", color="tab:gray", label="plain + one forward pass per pair")
    time.plot(values, rival, ":", color="tab:red", label="plain + 32 forward passes (ViT-Shapley)")
    time.axhline(4 / 3, color="tab:green", linewidth=0.8, label="4/3: one pass more, backward costing two")
    time.set(title=f"time by {name}", yscale="log", ylim=(0.95, 24))
    time.set_yticks([1, 1.5, 2, 4, 8, 16], labels=["1", "1.5", "2", "4", "8", "16"])
    time.set_yticks([], minor=True)
    space.plot(values, series["memory"], "o-", color="tab:blue")
    space.axhline(1.0, color="tab:gray", linewidth=0.8)
    space.set(xlabel=name, ylim=(0.9, 2.0))
    for axes in (time, space):
        axes.set_xscale("log")
        axes.set_xticks(values, labels=[f"{value:,}" for value in values], fontsize=8)
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.25)


def main() -> None:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tune", choices=["lora", "full"], default="lora")
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    record = given.output / "cost.json"
    found: dict[str, dict[str, Any]] = json.loads(record.read_text()) if record.exists() else {}
    print("| varied | value | time | memory | explaining / predicting | a forward pass, in plain steps |")
    print("| --- | --- | --- | --- | --- | --- |", flush=True)
    for name, values in CURVES.items():
        points = found.setdefault(name, {})
        for value in values:
            if str(value) not in points:
                points[str(value)] = point(replace(CENTRE, tune=given.tune, **{name: value}), given.repeats)
                record.write_text(json.dumps(found, indent=1))
            one = points[str(value)]
            numbers = " | ".join(f"{one[key]:.2f}" for key in ("time", "memory", "explaining", "forward"))
            print(f"| {name} | {value} | {numbers} |", flush=True)
    if "afterwards" not in found:
        found["afterwards"] = afterwards(given.repeats)
        record.write_text(json.dumps(found, indent=1))
    for way, passes in found["afterwards"].items():
        print(f"Explaining one image, {way}: {passes:.3g} forward passes.")
    draw(found).savefig(given.output / "cost.png", dpi=120)


if __name__ == "__main__":
    main()
