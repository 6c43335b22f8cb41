# /// script
# requires-python = ">=3.11"
# dependencies = ["shapadapter[demo,compare]", "scikit-learn"]
# [tool.uv.sources]
# shapadapter = { path = "../.." }
# ///
"""What gradients by presence are worth: errors at equal evaluations and at equal cost, with and without a trained head.

python examples/benchmarks/presence.py --setting demo --quick
python examples/benchmarks/presence.py --setting objects --base facebook/dinov2-small --bf16 --seeds 0 1 2

Two games are played on the same pictures, for the class that the model predicts: that of our trained model, and that of a
classifier which nothing was trained for (`prediction="classifier"`, `tune="frozen"`; with objects a plainly fine-tuned one).
Of each: one pass, the untrained gradient, the gradient level, and refinement, KernelSHAP and permutation sampling with the
same evaluations; what each costs in forward passes by measured time; how often 95 % intervals hold the truth; and how the
errors depend on the smoothness of the game, which is the error of the untrained gradient.

The truth is antithetic permutation sampling, with coalitions of its own, until its own error is below a third of the least
error that is compared with it, or until --most evaluations for a picture. Intervals are bootstrapped over seeds and pictures,
differences between methods with the same draws. The output folder keeps what was trained and measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compare import claim, kept, maps_of
from compare_report import table
from peft import get_peft_model
from torch import Tensor
from trainings import DEVICE, RECIPE, SCALES, Setting, cast_once, demo_setting, objects_setting, ours, plain
from transformers import AutoModelForImageClassification, set_seed
from transformers.utils import logging

from shapadapter import ShapleyConfig, attribute
from shapadapter.core.shapley import seed_of
from shapadapter.core.statistics import relative_l2
from shapadapter.evaluation.equal_cost import Way, passes_of, ways
from shapadapter.evaluation.plan import Plan

BUDGETS = (64, 128, 256, 512, 1024)
ROUND = 4096  # evaluations of the truth between two looks at its error
DRAWS = 10_000
FEW = 8  # pictures; of fewer a correlation says nothing
NAMES = {
    "shapadapter": "one pass",
    "presence_gradient": "untrained gradient",
    "kernel_shap": "KernelSHAP",
    "permutation": "permutation sampling",
}
GAMES = {"ours": "Our trained model", "base": "A classifier without training for it"}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", default="demo", choices=["demo", "objects"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--pictures", type=int, help="how many are explained, by default 16, or with --quick 4")
    parser.add_argument("--most", type=int, help="evaluations of the truth, by default 65536, or with --quick 4096")
    parser.add_argument("--output", type=Path, help="by default presence-SETTING, or presence-SETTING-quick")
    parser.add_argument("--quick", action="store_true", help="less data, fewer pictures: to see that it runs, and how")
    parser.add_argument("--base", help="with objects: a pretrained vision transformer, on the Hub or in a folder")
    parser.add_argument("--stamps", type=Path, help="with objects: the folder of Tux Paint's stamps")
    parser.add_argument("--bf16", action="store_true", help="with objects: train and measure under bfloat16 autocast")
    args = parser.parse_args(arguments)
    if args.setting == "demo" and (args.base or args.stamps or args.bf16):
        parser.error("--base, --stamps and --bf16 are for --setting objects")
    if args.setting == "objects" and args.base is None:
        parser.error("--setting objects needs a base model, e.g. --base facebook/dinov2-small")
    name = args.setting + (", quick" if args.quick else "")
    output = args.output or Path("presence-" + name.replace(", ", "-"))
    pictures, most = args.pictures or (4 if args.quick else 16), args.most or (ROUND if args.quick else 16 * ROUND)
    settings = {"recipe": RECIPE[args.setting], "scale": asdict(SCALES[name]), "base": args.base, "bf16": args.bf16}
    claim(output, {**settings, "pictures": pictures, "most": most})
    if args.setting == "demo":
        setting = demo_setting(output, SCALES[name])
    else:
        setting = objects_setting(output, SCALES[name], args.base, args.stamps, args.bf16)
    logging.disable_progress_bar()  # of every model that is loaded
    report = []
    for game, title in GAMES.items():
        runs = []
        for seed in args.seeds:
            print(f"{title}, seed {seed}", flush=True)
            folder = output / f"seed-{seed}"
            measure = partial(measured, setting, game, folder, seed, pictures, most)
            runs.append(kept(folder / f"{game}.json", measure))
        report.append(f"## {title}\n\n{described(runs)}")
    text = "\n\n".join(report) + "\n"
    (output / "report.md").write_text(text)
    print(text)


# -- measured ----------------------------------------------------------------------------------------------------------


def model_of(setting: Setting, game: str, folder: Path, seed: int) -> Any:
    """Our model, trained or loaded; or a classifier in a new adapter, which leaves it as it is."""
    trained = ours(setting, folder / "ours", seed)
    if game == "ours":
        return trained
    base = setting.base
    if setting.name == "objects":  # whose base has a classifier that knows nothing yet
        base = folder / "classifier"
        plain(setting, base, folder / "ours", seed)
    set_seed(seed)
    classifier = AutoModelForImageClassification.from_pretrained(base)
    model = get_peft_model(classifier, ShapleyConfig(prediction="classifier", tune="frozen")).eval().to(DEVICE)
    return cast_once(model) if setting.bf16 else model


def measured(setting: Setting, game: str, folder: Path, seed: int, pictures: int, most: int) -> dict[str, Any]:
    """Errors and coverage of each way, by picture, and what it costs."""
    model = model_of(setting, game, folder, seed)
    chosen = np.linspace(0, len(setting.test) - 1, pictures).round().astype(int).tolist()
    pixels = torch.stack([setting.test[index]["pixel_values"] for index in chosen]).to(DEVICE)  # (B, C, H, W)
    plan = Plan.of((), seed, {}, budgets=BUDGETS)
    with setting.autocast(), torch.no_grad():
        batch = plan.predict(model, {"pixel_values": pixels})
        compared = ways(BUDGETS, batch.tiling.count)
        said = {way: explained(model, pixels, way, seed) for way in compared}
        truth, doubt = true_values(model, pixels, [maps for maps, _ in said.values()], most, seed)
        passes = passes_of(model, plan, batch, compared)
    own = doubt.square().sum(dim=1).sqrt() / truth.norm(dim=1)  # (B,)
    rows = [{"way": way, "passes": passes[way], **compare(*said[way], truth, doubt)} for way in compared]
    return {"truth_error": own.tolist(), "rows": rows}


def explained(model: Any, pixels: Tensor, way: Way, seed: int) -> tuple[Tensor, Tensor | None]:
    """Maps and standard errors (B, N) of the class that each picture is predicted to be; None where there are no errors."""
    method, budget = way
    found = attribute(model, pixels, method=method, top_k=1, seed=seed, evaluations=budget or 2)
    errors = None if found.standard_errors is None else found.standard_errors[..., 0].flatten(1).double()
    return maps_of(found), errors


def true_values(model: Any, pixels: Tensor, maps: Sequence[Tensor], most: int, seed: int) -> tuple[Tensor, Tensor]:
    """Shapley values (B, N) and their standard errors, from as many rounds as the best of the maps takes."""
    values, variances = list[Tensor](), list[Tensor]()
    for turn in range(max(1, most // ROUND)):
        drawn, errors = explained(model, pixels, ("permutation", ROUND), seed_of(seed, turn, "truth"))
        assert errors is not None
        values.append(drawn)
        variances.append(errors.square())
        mean = torch.stack(values).mean(dim=0)  # (B, N)
        error = torch.stack(variances).mean(dim=0).div(len(values)).sqrt()  # (B, N)
        own = (error.square().sum(dim=1).sqrt() / mean.norm(dim=1)).mean()
        if own < min(relative_l2(one, mean).mean() for one in maps) / 3:
            break
    return mean, error


def compare(maps: Tensor, errors: Tensor | None, truth: Tensor, doubt: Tensor) -> dict[str, Any]:
    """Of each picture the relative L2 error and the share of the players whose 95 % interval, widened by the truth's error,
    holds the truth.
    """
    found: dict[str, Any] = {"error": relative_l2(maps, truth).tolist()}
    if errors is not None:
        spread = (errors.square() + doubt.square()).sqrt()  # (B, N)
        found["coverage"] = ((maps - truth).abs() <= 1.96 * spread).double().mean(dim=1).tolist()
    return found


# -- reported ----------------------------------------------------------------------------------------------------------


def described(runs: Sequence[dict[str, Any]]) -> str:
    """A table with a row for each way, another of differences, and what the truth is worth."""
    every = [tuple(row["way"]) for row in runs[0]["rows"]]
    errors = {way: of_seeds(runs, place, "error") for place, way in enumerate(every)}
    smooth = errors["presence_gradient", 0]
    rough = smooth > np.median(smooth)
    rows = []
    for place, way in enumerate(every):
        passes = np.mean([run["rows"][place]["passes"] for run in runs])
        covered = "coverage" in runs[0]["rows"][place]
        rows.append(
            (
                called(way),
                f"{passes:,.3g}" if passes < 100 else f"{passes:,.0f}",
                interval(errors[way]),
                f"{of_seeds(runs, place, 'coverage').mean():.3f}" if covered else "",
                *(f"{errors[way][part].mean():.3f}" if part.any() else "" for part in (~rough, rough)),
                f"{rank_correlation(errors[way], smooth):.2f}" if smooth.size >= FEW else "",
            )
        )
    heads = (
        "",
        "forward passes ↓",
        "relative L2 ↓",
        "95 % coverage",
        "smoother half",
        "rougher half",
        "with smoothness",
    )
    own = np.mean([run["truth_error"] for run in runs])
    least = min(values.mean() for values in errors.values())
    doubt = "" if own < least / 3 else " That is more than a third of the least error: raise --most."
    return (
        f"Seeds: {len(smooth)}, pictures: {smooth.shape[1]}; the truth's own error is {own:.3f}.{doubt} Error of the untrained "
        f"gradient, 0 in a perfectly smooth game: {smooth.mean():.2f}. The halves of the pictures are those where it is small "
        f"and large; the last column is the rank correlation with it.\n\n{table(heads, rows)}\n\n{differences(errors)}"
    )


def differences(errors: dict[Way, Any]) -> str:
    """What is gained, as paired differences of errors; an interval without zero is no chance."""
    pairs: list[tuple[Way, Way]] = [
        (("gradient", 0), ("shapadapter", 0)),
        (("gradient", 0), ("presence_gradient", 0)),
        *((("refined", b), (name, b)) for name in ("kernel_shap", "permutation") for b in BUDGETS),
    ]
    rows = [
        (f"{called(one)} - {called(other)}", interval(errors[one] - errors[other]))
        for one, other in pairs
        if one in errors and other in errors
    ]
    return table(("difference of errors", "mean (95 %)"), rows)


def called(way: Way) -> str:
    return f"{NAMES.get(way[0], way[0])} {way[1] or ''}".strip()


def of_seeds(runs: Sequence[dict[str, Any]], place: int, measure: str) -> Any:
    """One measure of one way, (seeds, pictures)."""
    return np.array([run["rows"][place][measure] for run in runs], dtype=float)


def interval(values: Any) -> str:
    """A mean over (seeds, pictures) with its bootstrap interval; seeds and pictures are drawn apart, for they are crossed."""
    if values.size < 2:
        return f"{values.mean():.3f}"
    generator = np.random.default_rng(0)  # the same draws for all
    seeds, pictures = (
        generator.multinomial(count, np.full(count, 1 / count), DRAWS) / count for count in values.shape
    )  # (draws, seeds) and (draws, pictures): how often each was drawn
    low, high = np.quantile(np.einsum("ds,sp,dp->d", seeds, values, pictures), (0.025, 0.975))
    return f"{values.mean():.3f} ({low:.3f} to {high:.3f})"


def rank_correlation(one: Any, other: Any) -> float:
    """Spearman's, of all seeds and pictures together."""
    ranks = [values.ravel().argsort().argsort() for values in (one, other)]
    return float(np.corrcoef(*ranks)[0, 1])


if __name__ == "__main__":
    main()
