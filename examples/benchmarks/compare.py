# /// script
# requires-python = ">=3.11"
# dependencies = ["shapadapter[demo,compare]", "scikit-learn"]
# [tool.uv.sources]
# shapadapter = { path = "../.." }
# ///
"""Everything side by side on one model in one process: faithfulness, localisation, sanity, cost, refinement, rivals.

python examples/benchmarks/compare.py --setting demo --quick                  # minutes on two cores
python examples/benchmarks/compare.py --setting demo --seeds 0 1 2 --rivals both
python examples/benchmarks/compare.py --setting objects --base facebook/dinov2-small --bf16 --seeds 0 1 2

For each seed: our model (one stage), the plainly fine-tuned baseline with the same steps (accuracy), every method of
`attribute` on our model's own game (`evaluate`), refinement against KernelSHAP with the same evaluations, and the rivals'
objectives, each with as many model evaluations as our training takes (`--rivals both`: and with as many steps). For the
first seed also our model on shuffled labels: do the maps depend on what was learned?

The output folder holds report.md, results.json and two figures, and for each seed the full tables. What is there already
is not done again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from compare_report import write_report
from rival_rows import own_row, run_rival
from rivals import RIVALS
from torch import Tensor
from trainings import RECIPE, SCALES, Setting, TwoRates, accuracy_of, demo_setting, objects_setting, ours, plain
from transformers.utils import logging

from shapadapter import attribute, evaluate, explain
from shapadapter.core.estimates import kernel_shap, kernel_shap_error
from shapadapter.core.files import write_together
from shapadapter.core.shapley import sample_pairs
from shapadapter.core.statistics import pearson, relative_l2, spearman
from shapadapter.evaluation import Evaluation
from shapadapter.explanation.game import PatchGame

INTEGRATION_STEPS = 50


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", default="demo", choices=["demo", "objects"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rivals", default="compute", choices=["none", "compute", "both"])
    parser.add_argument("--output", type=Path, help="by default compare-SETTING, or compare-SETTING-quick")
    parser.add_argument("--quick", action="store_true", help="less data, fewer pictures: to see that it runs, and how")
    parser.add_argument("--base", help="with objects: a pretrained vision transformer, on the Hub or in a folder")
    parser.add_argument("--stamps", type=Path, help="with objects: the folder of Tux Paint's stamps")
    parser.add_argument("--bf16", action="store_true", help="with objects: train and measure under bfloat16 autocast")
    args = parser.parse_args(arguments)
    name = args.setting + (", quick" if args.quick else "")
    output = args.output or Path("compare-" + name.replace(", ", "-"))
    if args.setting == "demo" and (args.base or args.stamps or args.bf16):
        parser.error("--base, --stamps and --bf16 are for --setting objects")
    if args.setting == "objects" and args.base is None:
        parser.error("--setting objects needs a base model, e.g. --base facebook/dinov2-small")
    claim(
        output, {"recipe": RECIPE[args.setting], "scale": asdict(SCALES[name]), "base": args.base, "bf16": args.bf16}
    )
    if args.setting == "demo":
        setting = demo_setting(output, SCALES[name])
    else:
        setting = objects_setting(output, SCALES[name], args.base, args.stamps, args.bf16)
    logging.disable_progress_bar()  # of every model that is loaded
    runs = [run(setting, output / f"seed-{seed}", seed, args.rivals) for seed in args.seeds]
    sanity = kept(output / "labels.json", lambda: on_shuffled_labels(setting, output, args.seeds[0]))
    print(write_report(setting, args.seeds, runs, sanity, output))


def claim(output: Path, settings: dict[str, Any]) -> None:
    """Take an output folder, unless it holds what was made with other settings: its results would pass for these."""
    file, text = output / "settings.json", json.dumps(settings, indent=2)
    if file.exists() and file.read_text() != text:
        raise SystemExit(f"{output} was made with other settings, see {file}. Choose another --output, or delete it.")
    output.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def run(setting: Setting, folder: Path, seed: int, rivals: str) -> dict[str, Any]:
    """Train and measure everything for one seed; returns its numbers."""
    print(f"Seed {seed}: training ours and the plain baseline", flush=True)
    model = ours(setting, folder / "ours", seed)
    classifier = folder / "classifier"
    baseline = plain(setting, classifier, folder / "ours", seed)
    print(f"Seed {seed}: evaluating every method on our model", flush=True)
    evaluation = evaluated(setting, model, folder, seed)
    print(f"Seed {seed}: refining, and sampling with as many evaluations", flush=True)
    measured = kept(folder / "refinement.json", lambda: refinement(setting, model, seed))
    accuracy = {"ours": evaluation.task["accuracy"].mean, "plain": accuracy_of(baseline, setting)}
    if setting.name == "objects":  # where the rates differ and the classifier is new
        other = plain(setting, folder / "classifier-two-rates", folder / "ours", seed, TwoRates)
        accuracy["plain, classifier at our head's rate"] = accuracy_of(other, setting)
    rows = [own_row(setting, model, accuracy["ours"], measured)]
    for objective in RIVALS if rivals != "none" else ():
        epochs = {"evaluations": objective.epochs_within(setting.scale.tune_epochs * sum(setting.evaluations))}
        if rivals == "both":
            epochs["steps"] = setting.scale.tune_epochs
        for equal, wanted in epochs.items():
            print(f"Seed {seed}: {objective.name}, as many {equal} as ours", flush=True)
            place = folder / f"{objective.name.lower().replace(' ', '-')}-{equal}"
            row = run_rival(setting, objective, classifier, place, wanted, seed)
            rows.append({**row, "name": f"{objective.name}, equal {equal}"})
    return {
        "accuracy": accuracy,
        "evaluation": evaluation,
        "refinement": measured,
        "rivals": rows,
    }


def kept(file: Path, make: Callable[[], Any]) -> Any:
    """What the file holds, or what `make` returns, which it then holds."""
    if not file.exists():
        write_together({file: json.dumps(make()).encode()})
    return json.loads(file.read_text())


def methods() -> dict[str, Any]:
    """Every method of `attribute` that 64 players allow; those that sample with 512 evaluations for each picture."""
    names = [
        "shapadapter",
        "gradient",
        "refined",
        "presence_gradient",
        "kernel_shap",
        "permutation",
        "leave_one_out",
        "attention",
        "attention_rollout",
    ]
    found: dict[str, Any] = {name: name for name in (*names, "grad_cam", "equal")}
    if find_spec("captum") is None:
        print("Without captum (pip install captum) there are no gradient methods.")
        return found
    steps = partial(attribute, method="integrated_gradients", evaluations=INTEGRATION_STEPS)
    return {**found, "gradient_x_input": "gradient_x_input", "integrated_gradients": steps}


def evaluated(setting: Setting, model: Any, folder: Path, seed: int) -> Evaluation:
    """The evaluation of our model, with every method beside it."""
    file = folder / "evaluation.json"
    if not file.exists():
        with setting.autocast():
            found = evaluate(
                model,
                setting.masked,
                methods=methods(),
                images=setting.scale.truth_images,
                truth_evaluations=setting.scale.truth_evaluations,
                budgets=setting.scale.budgets,
                cache=folder / "cache",
                seed=seed,
                batch_size=256,  # several pictures together
            )
        (folder / "evaluation.md").write_text(found.markdown())
        found.save(file)
    return Evaluation.load(file)


def refinement(setting: Setting, model: Any, seed: int) -> dict[str, Any]:
    """Errors of the one pass, of refinement and of KernelSHAP with each budget, one number for each picture.

    The truth is a KernelSHAP estimate of its own. Its error, too, keeps values from lying in an interval; the coverage is
    that of intervals widened by it.
    """
    pixels = setting.pixels()
    with setting.autocast():
        once = explain(model, pixels, top_k=1)
        truth, doubt = true_values(setting, model, pixels, once.classes[:, 0], seed + 1)  # (B, N), (B,)
        said = maps_of(once)  # (B, N)
        found: dict[str, Any] = {
            "error": relative_l2(said, truth).tolist(),
            "correlation": pearson(said, truth).tolist(),
            "truth_error": doubt.tolist(),
            "efficiency_gap": once.efficiency_gap.tolist(),
            "kernel_shap": {},
            "refined": {},
            "coverage": {},
        }
        slack = doubt[:, None] * torch.linalg.vector_norm(truth, dim=1, keepdim=True) / truth.shape[1] ** 0.5  # (B, 1)
        for budget in setting.scale.budgets:
            sampled = attribute(model, pixels, method="kernel_shap", top_k=1, evaluations=budget, seed=seed)
            refined = explain(model, pixels, top_k=1, refine=budget, seed=seed)
            spread = (refined.standard_errors.flatten(1).double().square() + slack.square()).sqrt()  # (B, N)
            inside = (maps_of(refined) - truth).abs() <= 1.96 * spread  # (B, N)
            found["kernel_shap"][str(budget)] = relative_l2(maps_of(sampled), truth).tolist()
            found["refined"][str(budget)] = relative_l2(maps_of(refined), truth).tolist()
            found["coverage"][str(budget)] = inside.double().mean(dim=1).tolist()
    found["kernel_shap_error"] = found["kernel_shap"][str(setting.sampled)]
    return found


def true_values(setting: Setting, model: Any, pixels: Tensor, classes: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Shapley values (B, N) of one class of each picture (B, C, H, W), and their own relative error (B,)."""
    generator, pairs = torch.Generator().manual_seed(seed), setting.scale.truth_evaluations // 2
    players = PatchGame(model, pixels[0]).players
    coalitions = sample_pairs(len(pixels), players, pairs, generator).to(pixels.device)  # (B, M, N)
    with torch.inference_mode():
        ends = model(pixel_values=pixels)
        parts = [model(pixel_values=pixels, coalitions=part).coalition_values for part in coalitions.split(128, dim=1)]
    arguments = (coalitions.cpu(), torch.cat(parts, dim=1).cpu(), ends.null_values.cpu(), ends.logits.cpu())
    chosen = classes[:, None]  # (B, 1)
    values = kernel_shap(*arguments).gather(2, chosen[:, None].expand(-1, players, -1))[..., 0]  # (B, N, K) -> (B, N)
    return values, kernel_shap_error(*arguments).gather(1, chosen)[:, 0]  # (B, K) -> (B,)


def maps_of(explanation: Any) -> Tensor:
    """The one map of each picture, (B, rows, cols, 1) -> (B, N) float64."""
    return explanation.attributions[..., 0].flatten(1).double()


def on_shuffled_labels(setting: Setting, output: Path, seed: int) -> dict[str, Any]:
    """The same training where there is nothing to learn: its accuracy, and how much its maps are like ours, by picture."""
    print("Training on shuffled labels", flush=True)
    model = ours(setting, output / f"seed-{seed}" / "ours", seed)
    other = ours(setting, output / "shuffled", seed, shuffled=True)
    with setting.autocast():
        one, another = explain(model, setting.pixels(), top_k=1), explain(other, setting.pixels())
    index = one.classes[:, None, None].expand(*another.attributions.shape[:3], 1)  # (B, rows, cols, 1)
    likeness = spearman(another.attributions.gather(3, index).flatten(1), maps_of(one))  # (B,)
    return {"accuracy": accuracy_of(other, setting), "likeness": likeness.tolist()}


if __name__ == "__main__":
    main()
