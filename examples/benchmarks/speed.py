# /// script
# requires-python = ">=3.11"
# dependencies = ["shapadapter"]
# [tool.uv.sources]
# shapadapter = { path = "../.." }
# ///
"""What does the Shapley objective cost beside plain fine-tuning, and explaining beside predicting?

python examples/benchmarks/speed.py --output speed
python examples/benchmarks/speed.py --models vit-s --players 196 --classes 10 --precision bf16 --tune lora --repeats 3

Times a training step with one pair of coalitions per image and a plain one of the same configuration (same LoRA, same
optimiser, same images) in turns in one process, and so the pass that explains all classes and the base model's forward
pass. Ratios are medians with least and largest. "With one more pass" is what a plain step and one plain forward pass take
together: a pair of coalitions has as many tokens as the image. Memory is the largest amount allocated at a time during a
step, beyond weights and optimiser. What misses its limit is bold. Prints a Markdown row for each setting and keeps it in a
json file, so that a second run only does what is missing. On a GPU it uses the GPU. Weights are random: only time and memory
count.

glibc gives memory back to the system between steps and fetches it again page by page, which costs more than some layers.
On a CPU let it keep what it has, as an accelerator's allocator does:

MALLOC_MMAP_THRESHOLD_=8589934592 MALLOC_TRIM_THRESHOLD_=34359738368 python examples/benchmarks/speed.py --output speed
"""

import argparse
import itertools
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stepping import SIZES, Setting, Steps, in_turns, memory

LIMITS = {"step": 1.35, "memory": 1.2, "explaining": 1.05}
HEAD = (
    "| model | players | classes | precision | tuned | batch | a step, time | with one more pass | a step, memory "
    "| explaining, time |"
)


def measured(setting: Setting, repeats: int, compiled: bool) -> dict[str, Any]:
    """Ratios to the plain ones."""
    steps = Steps(setting, compiled)
    found: dict[str, Any] = {"step": in_turns(steps.plain_step, steps.our_step, repeats)}
    if not compiled:
        found["memory"] = memory(steps.plain_step, steps.our_step)
        found["explaining"] = in_turns(*steps.passes(), repeats=2 * repeats + 1)
    return found


def row(setting: Setting, found: dict[str, Any]) -> str:
    """A line of the table; what misses its limit is bold."""

    def said(name: str) -> str:
        if name not in found:
            return "-"
        value = found[name] if name == "memory" else found[name]["ratio"]
        text = f"**{value:.2f}**" if value > LIMITS[name] + 0.005 else f"{value:.2f}"
        return text if name == "memory" else f"{text} ({found[name]['least']:.2f} to {found[name]['most']:.2f})"

    parts = (setting.model, setting.players, setting.classes, setting.precision, setting.tune, setting.batch)
    limit = f"{1 + found['explaining']['plain_s'] / found['step']['plain_s']:.2f}" if "explaining" in found else "-"
    return "| " + " | ".join([*map(str, parts), said("step"), limit, said("memory"), said("explaining")]) + " |"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--players", nargs="+", type=int, default=[196, 256])
    parser.add_argument("--classes", nargs="+", type=int, default=[10, 1000])
    parser.add_argument("--precision", nargs="+", choices=["fp32", "bf16", "bf16 base"], default=["fp32", "bf16"])
    parser.add_argument("--tune", nargs="+", choices=["lora", "full"], default=["lora", "full"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="Both models through torch.compile; steps only.")
    parser.add_argument("--output", type=Path, help="Folder for speed.json; nothing is kept without.")
    given = parser.parse_args()
    record = given.output / "speed.json" if given.output else None
    known: list[dict[str, Any]] = json.loads(record.read_text()) if record and record.exists() else []
    print(HEAD, "|" + " --- |" * (HEAD.count("|") - 1), sep="\n", flush=True)
    for choice in itertools.product(given.models, given.players, given.classes, given.precision, given.tune):
        setting = Setting(*choice, batch=given.batch)
        own = {**asdict(setting), "compiled": given.compile}
        found = next((entry["found"] for entry in known if entry["setting"] == own), None)
        if found is None:
            found = measured(setting, given.repeats, given.compile)
            known.append({"setting": own, "found": found})
            if record:
                record.parent.mkdir(parents=True, exist_ok=True)
                record.write_text(json.dumps(known, indent=1))
        print(row(setting, found), flush=True)


if __name__ == "__main__":
    main()
