"""The generated part of a card, from `card.md.jinja`, and its metadata."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from typing import Any

from huggingface_hub import ModelCardData
from jinja2 import Environment, StrictUndefined, Template

from shapadapter.core.installation import how_to_install
from shapadapter.core.phrases import one_line
from shapadapter.hub.card.facts import (
    LONG,
    MATCHING,
    Facts,
    code,
    count,
    mapping,
    number,
    repository,
    table,
    text,
    texts,
    words,
)
from shapadapter.hub.card.results import eval_results, rows

_TAGS = ("shapadapter", "explainability", "shapley-values", "attribution")
_REMOVALS = {
    "drop": ("dropped", ": its token takes no part"),
    "mask": ("masked", ": no other token reads it"),
    "pixels": ("painted over", " in the image"),
}
_PREDICTIONS = {
    "vote": "the sum of the null value and the contributions of all players",
    "classifier": "of the base model's own classifier; the contributions are projected so that they add up to them",
}
_TUNES = {"frozen": "nothing", "full": "the whole backbone"}


@cache
def _template() -> Template:
    # Words of others come in as values, through the filters, and are never read as a template.
    environment = Environment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, autoescape=False)
    environment.filters |= {"words": words, "code": code, "literal": _literal}
    environment.globals["table"] = table
    return environment.from_string(resources.files(__package__).joinpath("card.md.jinja").read_text("utf-8"))


def _literal(value: str) -> str:
    """A Python string that stays on its line and inside its code block."""
    return json.dumps(one_line(value, 200), ensure_ascii=False)


def markdown(facts: Facts) -> str:
    """The text of a card."""
    matching, evaluation = facts.task == MATCHING, facts.of("evaluation")
    found = _template().render(
        facts=facts,
        matching=matching,
        score="prediction" if facts.quantity else "logit",
        features=_features(facts),
        class_names=[] if facts.quantity or matching else facts.classes,
        several=facts.config.get("problem_type") == "multi_label_classification",
        install="\n".join(how_to_install()),
        place="" if facts.subfolder is None else f", subfolder={_literal(facts.subfolder)}",
        revision="" if facts.revision is None else f", revision={_literal(facts.revision)}",
        results=[[r.label, r.shown, "" if r.images is None else f"{r.images:,}"] for r in rows(facts)],
        evaluation=evaluation,
        removal=_REMOVALS.get(str(evaluation.get("removal")), ("",)),
        truth=_truth(evaluation),
        measured_at="" if (step := count(facts.of("metrics").get("step"))) is None else f" at step {step:,}",
        other_methods=_other_methods(evaluation),
        training=facts.of("training"),
        length=_length(facts.of("training")),
        settings=[[code(k), code(v)] for k, v in sorted(mapping(facts.of("training").get("settings")).items())],
        data=_data(facts),
        accuracy=_accuracy(facts),
        versions=_versions(facts),
    )
    return re.sub(r"\n{3,}", "\n\n", found).strip()


def _features(facts: Facts) -> list[list[str]]:
    config, base, revision = facts.config, facts.base, text(facts.config.get("revision"))
    model = code(facts.base_name) if base is None else f"[{words(base)}](https://huggingface.co/{base})"
    model += "" if facts.family in (None, facts.base_name) else f", {code(facts.family)}"
    quantised = text(facts.record.get("quantised"))
    model += "" if quantised is None else f", quantised by {code(quantised)}"
    model += "" if revision is None else f", revision {code(one_line(revision, 12))}"
    players, tune, rank = facts.players, str(config.get("tune")), config.get("r")
    cells = "patches" if config.get("mechanism") == "sequence" and config.get("grid") is None else "tiles"
    trained = f"Shapley token and projection head, and of the base model {_TUNES[tune]}" if tune in _TUNES else ""
    if tune == "lora" and isinstance(rank, int):
        trained = f"LoRA of rank {rank}, Shapley token and projection head"
    found = {
        "Base model": model,
        "Players": "" if players is None else f"{players[0]} x {players[1]} {cells} of the image",
        "An absent player is": "".join(_REMOVALS.get(str(config.get("removal")), ())),
        "Prediction": "" if facts.quantity else f"logits: {_PREDICTIONS.get(str(config.get('prediction')), '')}",
        "Trained": trained,
    }
    return [[f"**{name}**", value] for name, value in found.items() if value]


def _truth(evaluation: Mapping[str, Any]) -> str:
    if evaluation.get("truth") == "exact":
        return "exact, from all coalitions"
    evaluations, own = number(evaluation.get("truth_evaluations")), number(evaluation.get("truth_error"))
    error = "" if own is None else f", its own error {own:.2g}"
    return f"KernelSHAP with {evaluations or 0:,.0f} evaluations{error}"


def _other_methods(evaluation: Mapping[str, Any]) -> list[list[str]]:
    """Rows of all methods, where any was compared but those that know nothing of the model."""
    methods = {name: mapping(values) for name, values in mapping(evaluation.get("methods")).items()}
    if not set(methods) - {"shapadapter", "random", "centre"}:
        return []
    lines = []
    for name, values in sorted(methods.items(), key=lambda item: (item[0] != "shapadapter", item[0])):
        given = [values.get(key) for key in ("error", "insertion", "deletion", "evaluations")]
        means = [number(mean[0]) if isinstance(mean, list) and mean else None for mean in given]
        lines.append([code(name, 40), *("" if mean is None else f"{mean:,.3g}" for mean in means)])
    return lines


def _length(training: Mapping[str, Any]) -> str:
    epochs, steps, minutes = (number(training.get(name)) for name in ("epochs", "steps", "minutes"))
    parts = [] if epochs is None else [f"{epochs:.3g} epoch{'s' * (epochs != 1)}"]
    parts += [] if steps is None else [f"{steps:,.0f} steps"]
    length = ", ".join(parts) or "length unknown"
    if minutes is not None:
        length += f" in {f'{minutes:,.0f} minutes' if minutes >= 2 else f'{60 * minutes:.0f} s'}"
    hardware = text(training.get("hardware"))
    return length if hardware is None else f"{length} on {code(hardware)}"


def _data(facts: Facts) -> str:
    data, about = facts.of("data"), facts.of("about")
    names = texts(about.get("dataset")) or texts(data.get("id")) or texts(data.get("name"))
    named = ", ".join(code(one) for one in names)
    part = ", ".join(code(one) for one in texts(about.get("dataset_args")))
    named += f" ({part})" if part else ""
    counts = {"training": count(data.get("train_images")), "held-out": count(data.get("eval_images"))}
    sizes = ", ".join(f"{images:,} {kind} images" for kind, images in counts.items() if images is not None)
    return ": ".join(one for one in (named, sizes) if one)


def _accuracy(facts: Facts) -> str:
    found = next((row for row in rows(facts) if row.kind == "shapley_relative_error"), None)
    if found is None:
        return "How near it comes was not measured for this model."
    return (
        f"Here it differs from the true Shapley values by {found.value:.0%} of their length (relative L2), on average."
    )


def _versions(facts: Facts) -> str:
    known = {name: facts.config.get(f"{name}_version") for name in ("shapadapter", "peft")}
    known |= facts.of("versions")
    return ", ".join(f"{words(name, 20)} {code(version, 30)}" for name, version in known.items() if text(version))


def metadata(facts: Facts) -> dict[str, Any]:
    """The metadata that we can fill in."""
    about, base, found = facts.of("about"), facts.base, eval_results(facts)
    tags = [*_TAGS, *([] if base is None else [f"base_model:adapter:{base}"])]
    tags += ["lora"] if facts.config.get("tune") == "lora" else []
    tags += ["generated_from_trainer"] if facts.of("training") else []
    datasets = [*texts(about.get("dataset_tags")), *texts(about.get("dataset")), *texts(facts.of("data").get("id"))]
    data = ModelCardData(
        language=about.get("language"),
        license=text(about.get("license")),
        library_name="peft",
        base_model=base,
        base_model_relation=None if base is None else "adapter",
        pipeline_tag=facts.task,
        tags=unique([*tags, *texts(about.get("tags"))]),
        datasets=unique([name for name in datasets if repository(name)]),
        metrics=unique([str(result.metric_type) for result in found]),
        eval_results=found or None,
        model_name=one_line(facts.title, LONG) if found else None,
    )
    return {key: value for key, value in data.to_dict().items() if value}


def unique(items: Sequence[str]) -> list[str]:
    """The items in their order, each once."""
    return list(dict.fromkeys(items))
