"""The comparison as Markdown tables, json and figures."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from trainings import DEVICE, Setting

from shapadapter.core.files import write_together
from shapadapter.core.statistics import Interval, bootstrap_interval, equivalent_evaluations
from shapadapter.evaluation.plan import versions

MEASURES = {
    "error": "error ↓",
    "pearson": "Pearson ↑",
    "insertion": "insertion ↑",
    "deletion": "deletion ↓",
    "aopc_gap": "AOPC gap ↑",
    "road_gap": "ROAD gap ↑",
    "sensitivity_n": "sensitivity-n ↑",
    "infidelity": "infidelity ↓",
    "energy_inside": "energy inside ↑",
    "pointing_game": "pointing ↑",
    "randomised": "randomised → 0",
    "evaluations": "evaluations ↓",
    "time": "time, in plain passes ↓",
}
"""What `evaluate` measures and the report shows; its own tables, in each seed's folder, have the rest."""

DIGITS = {"evaluations": 0, "time": 2}

Runs = Sequence[dict[str, Any]]


def write_report(setting: Setting, seeds: Sequence[int], runs: Runs, sanity: dict[str, Any], output: Path) -> str:
    """Write report.md, results.json and the figures; returns the report."""
    parts = [
        heading(setting, seeds),
        "## Accuracy\n\n" + accuracy(runs),
        "## Every method on our model\n\n" + methods(runs),
        "## Refinement\n\n" + refinement(setting, runs),
        "## Rivals\n\n" + rivals(setting, runs),
        "## Do the maps depend on the labels?\n\n" + labels(sanity),
    ]
    report = "\n\n".join(parts) + "\n"
    plain = [{**run, "evaluation": run["evaluation"].to_dict()} for run in runs]
    results = {
        "setting": setting.name,
        "seeds": list(seeds),
        "versions": versions(),
        "runs": plain,
        "shuffled labels": sanity,
    }
    write_together({output / "report.md": report.encode(), output / "results.json": json.dumps(results).encode()})
    runs[0]["evaluation"].figure().savefig(output / "curves.png")
    ladder(setting, runs).savefig(output / "evaluations.png")
    return report


def over_seeds(runs: Runs, read: Callable[[dict[str, Any]], Any], digits: int = 3) -> str:
    """What `read` finds in the runs: its mean over seeds and their standard deviation, or of one seed its interval.

    Args:
        runs: one for each seed.
        read: returns a number, an `Interval`, or one number for each picture, of which the mean counts.
        digits: after the point.
    """
    found = [read(run) for run in runs]
    if len(found) == 1 and not isinstance(found[0], float | int):
        alone = found[0] if isinstance(found[0], Interval) else bootstrap_interval(torch.tensor(found[0]).double())
        return str(alone) if alone.high - alone.low > 1e-9 * abs(alone.mean) else f"{alone.mean:.{digits}f}"
    means = [one.mean if isinstance(one, Interval) else mean(one) if isinstance(one, list) else one for one in found]
    around = f" ± {stdev(means):.{digits}f}" if len(set(means)) > 1 else ""
    return f"{mean(means):,.{digits}f}{around}"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (heads, ["---"] * len(heads), *rows))


def heading(setting: Setting, seeds: Sequence[int]) -> str:
    """What a reader must know first."""
    scale, known = setting.scale, ", ".join(f"{name} {version}" for name, version in versions().items())
    precision = "bfloat16 autocast" if setting.bf16 else "float32"
    return (
        f"# Comparison: {setting.name}\n\n"
        f"{len(setting.train):,} training pictures, {scale.tune_epochs:g} epochs, {len(setting.test):,} test pictures, "
        f"{scale.truth_images} of them explained; {precision} on {DEVICE}; {known}. Seeds: {', '.join(map(str, seeds))}. "
        "± is the standard deviation between seeds; with one seed, half of the 95 % bootstrap interval over pictures. Errors "
        f"are relative L2 to KernelSHAP with {scale.truth_evaluations:,} evaluations, for the predicted class."
    )


def accuracy(runs: Runs) -> str:
    """Ours beside plain fine-tuning."""
    rows = [(name, over_seeds(runs, lambda run, name=name: run["accuracy"][name])) for name in runs[0]["accuracy"]]
    points = over_seeds(runs, lambda run: 100 * (run["accuracy"]["ours"] - run["accuracy"]["plain"]), 1)
    return table(("training", "accuracy"), rows) + f"\n\nOurs minus plain fine-tuning: {points} points."


def methods(runs: Runs) -> str:
    """A row for each method."""
    first = runs[0]["evaluation"].methods
    shown = [name for name in MEASURES if any(name in values for values in first.values())]
    rows = []
    for method, own in first.items():
        cells = [
            over_seeds(
                runs, lambda run, at=(method, name): run["evaluation"].methods[at[0]][at[1]], DIGITS.get(name, 3)
            )
            if name in own
            else ""
            for name in shown
        ]
        rows.append((method, *cells, equivalents([run["evaluation"].equivalents.get(method) for run in runs])))
    return table(("method", *(MEASURES[name] for name in shown), "equals KernelSHAP with"), rows)


def equivalents(found: Sequence[Any]) -> str:
    """KernelSHAP's evaluations for the same error, seed by seed."""
    return "" if None in found else ", ".join(str(one) for one in found)


def refinement(setting: Setting, runs: Runs) -> str:
    """Refined against sampled, budget by budget."""
    rows = [
        ("0 (one pass)", "", over_seeds(runs, lambda run: run["refinement"]["error"]), worth(setting, runs), "", "")
    ]
    for budget in map(str, setting.scale.budgets):
        sampled, refined, coverage = (
            over_seeds(runs, lambda run, kind=kind, budget=budget: run["refinement"][kind][budget])
            for kind in ("kernel_shap", "refined", "coverage")
        )
        rows.append((budget, sampled, refined, worth(setting, runs, budget), saved(setting, runs, budget), coverage))
    doubt = over_seeds(runs, lambda run: run["refinement"]["truth_error"])
    heads = (
        "evaluations",
        "KernelSHAP",
        "refined",
        "equals KernelSHAP with",
        "evaluations saved",
        "in the 95 % interval",
    )
    return table(heads, rows) + f"\n\nThe reference itself is off by about {doubt}."


def worth(setting: Setting, runs: Runs, budget: str | None = None) -> str:
    """KernelSHAP's evaluations for the error of the one pass, or of refinement with a budget."""
    return str(equivalent(setting, runs, budget))


def saved(setting: Setting, runs: Runs, budget: str) -> str:
    """Evaluations that refinement saves against KernelSHAP with the same error."""
    same = equivalent(setting, runs, budget)
    sign = {"=": "", ">": "> ", "<": "< "}[same.bound]
    return f"{sign}{round(same.evaluations - int(budget)):,}"


def equivalent(setting: Setting, runs: Runs, budget: str | None) -> Any:
    """The same as a number, from the means over pictures and seeds."""

    def average(read: Callable[[dict[str, Any]], list[float]]) -> float:
        return mean(mean(read(run["refinement"])) for run in runs)

    own = average(lambda found: found["error"] if budget is None else found["refined"][budget])
    errors = [average(lambda found, b=b: found["kernel_shap"][str(b)]) for b in setting.scale.budgets]
    return equivalent_evaluations(own, setting.scale.budgets, errors)


def rivals(setting: Setting, runs: Runs) -> str:
    """Each explainer in its own game, and what it costs."""
    measures = {"error": 3, "correlation": 3, "kernel_shap_error": 3, "truth_error": 3, "efficiency_gap": 4}
    costs = {"accuracy": 3, "evaluations": 1, "with_gradient": 1, "stages": 0, "networks": 0, "parameters": 0}
    rows = [
        (
            row["name"],
            *(
                over_seeds(runs, lambda run, place=place, name=name: run["rivals"][place][name], digits)
                for name, digits in {**measures, **costs}.items()
            ),
        )
        for place, row in enumerate(runs[0]["rivals"])
    ]
    heads = ("objective", "error", "correlation", f"KernelSHAP {setting.sampled}, same game", "error of the reference")
    more = ("efficiency gap", "accuracy", "evaluations", "with gradient", "stages", "networks", "parameters")
    return table((*heads, *more), rows) + (
        "\n\nEach against the Shapley values of its own game: ours the model's logits, the rivals' a surrogate's "
        "probabilities. Evaluations: of any model in any stage, for each training picture, and how many of them with a "
        "gradient; the rivals' classifier is on top of what was made equal. Networks: that have to run to predict and to "
        "explain. Parameters: stored beside the base model. rivals.py says what is theirs and what is ours."
    )


def labels(sanity: dict[str, Any]) -> str:
    """The label randomisation test."""
    found = bootstrap_interval(torch.tensor(sanity["likeness"]).double())
    return (
        "Rank correlation of our maps (first seed) with those of the same training on shuffled labels, for the same "
        f"class: {found}; that model's accuracy is {sanity['accuracy']:.3f}. Maps that show the picture and not what was "
        "learned would stay the same (1)."
    )


def ladder(setting: Setting, runs: Runs) -> Figure:
    """Error against evaluations: KernelSHAP, refinement, and the one pass as a line across."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes, budgets = figure.subplots(), setting.scale.budgets
    for kind, label, colour in (("kernel_shap", "KernelSHAP", "0.5"), ("refined", "refined", "tab:blue")):
        lines = [[mean(run["refinement"][kind][str(budget)]) for budget in budgets] for run in runs]
        columns = list(zip(*lines, strict=True))
        axes.plot(budgets, [mean(column) for column in columns], "o-", color=colour, label=label)
        axes.fill_between(
            budgets, *([pick(column) for column in columns] for pick in (min, max)), color=colour, alpha=0.2
        )
    once = mean(mean(run["refinement"]["error"]) for run in runs)
    axes.axhline(once, color="tab:red", linestyle="--", label="one forward pass")
    axes.set(xscale="log", yscale="log", xlabel="model evaluations per picture", ylabel="relative L2 error")
    axes.set_xticks(budgets, [str(budget) for budget in budgets])
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.legend(frameon=False)
    return figure
