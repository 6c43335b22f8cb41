"""The generated part of a card, from `card.md.jinja`, and its metadata."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, StrictUndefined, Template

from shapadapter.core.installation import how_to_install
from shapadapter.core.phrases import one_line
from shapadapter.hub.card.facts import LONG, MATCHING, Facts, Row, code, repository, rows, words

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
    environment.globals |= {"table": _table, "install": "\n".join(how_to_install())}
    return environment.from_string(resources.files(__package__).joinpath("card.md.jinja").read_text("utf-8"))


def _literal(value: str) -> str:
    """A Python string that stays on its line and inside its code block."""
    return json.dumps(one_line(value, 200), ensure_ascii=False)


def _table(lines: Sequence[Sequence[str]], head: Sequence[str]) -> str:
    """A table of cells that are Markdown already."""
    # A bar would end the cell, and GFM has no escape for it that a backslash before it could not undo.
    cells = ([cell.replace("|", "\N{DIVIDES}") for cell in line] for line in (head, ["---"] * len(head), *lines))
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def markdown(facts: Facts) -> str:
    """The text of a card."""
    matching, evaluation, training = facts.task == MATCHING, facts.of("evaluation"), facts.of("training")
    results = rows(facts)
    versions = {name: facts.config.get(f"{name}_version") for name in ("shapadapter", "peft")} | dict(
        facts.of("versions")
    )
    found = _template().render(
        facts=facts,
        matching=matching,
        score="prediction" if facts.quantity else "logit",
        features=_features(facts),
        class_names=[] if facts.quantity or matching else facts.classes,
        several=facts.config.get("problem_type") == "multi_label_classification",
        place="" if facts.subfolder is None else f", subfolder={_literal(facts.subfolder)}",
        revision="" if facts.revision is None else f", revision={_literal(facts.revision)}",
        results=[[row.label, row.shown, "" if row.images is None else f"{row.images:,}"] for row in results],
        evaluation=evaluation,
        removal=_REMOVALS.get(evaluation.get("removal", ""), ("",)),
        other_methods=_other_methods(evaluation),
        training=training,
        settings=[[code(name), code(value)] for name, value in sorted(training.get("settings", {}).items())],
        data=_data(facts),
        error=next((row.value for row in results if row.kind == "shapley_relative_error"), None),
        gradient_error=evaluation.get("methods", {}).get("gradient", {}).get("error", [None])[0],
        versions=", ".join(
            f"{words(name, 20)} {code(one, 30)}" for name, one in versions.items() if isinstance(one, str)
        ),
    )
    return re.sub(r"\n{3,}", "\n\n", found).strip()


def _features(facts: Facts) -> list[list[str]]:
    config, base, revision = facts.config, facts.base, facts.config.get("revision")
    model = code(facts.base_name) if base is None else f"[{words(base)}](https://huggingface.co/{base})"
    model += "" if facts.family in (None, facts.base_name) else f", {code(facts.family)}"
    model += f", quantised by {code(facts.record['quantised'])}" if "quantised" in facts.record else ""
    model += f", revision {code(one_line(revision, 12))}" if isinstance(revision, str) else ""
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


def _other_methods(evaluation: Mapping[str, Any]) -> list[list[str]]:
    """Rows of all methods, where any was compared but those that know nothing of the model."""
    methods = evaluation.get("methods", {})
    if not set(methods) - {"shapadapter", "random", "centre"}:
        return []
    return [
        [
            code(name, 40),
            *(
                f"{values[key][0]:,.3g}" if key in values else ""
                for key in ("error", "insertion", "deletion", "evaluations")
            ),
        ]
        for name, values in sorted(methods.items(), key=lambda item: (item[0] != "shapadapter", item[0]))
    ]


def _data(facts: Facts) -> str:
    data, about = facts.of("data"), facts.of("about")
    names = about.get("dataset") or [data[key] for key in ("id", "name") if key in data][:1]
    named, part = (", ".join(map(code, some)) for some in (names, about.get("dataset_args", [])))
    counts = {"training": data.get("train_images"), "held-out": data.get("eval_images")}
    sizes = ", ".join(f"{images:,} {kind} images" for kind, images in counts.items() if images is not None)
    return ": ".join(one for one in (named + (f" ({part})" if part else ""), sizes) if one)


def metadata(facts: Facts) -> dict[str, Any]:
    """The metadata that we can fill in."""
    about, base = facts.of("about"), facts.base
    results = [_result(facts, row) for row in rows(facts) if row.kind is not None]
    tags = [*_TAGS, *([] if base is None else [f"base_model:adapter:{base}"])]
    tags += ["lora"] if facts.config.get("tune") == "lora" else []
    tags += ["generated_from_trainer"] if facts.of("training") else []
    datasets = [*about.get("dataset_tags", []), *about.get("dataset", []), facts.of("data").get("id")]
    data = ModelCardData(
        language=about.get("language"),
        license=about.get("license"),
        library_name="peft",
        base_model=base,
        base_model_relation=None if base is None else "adapter",
        pipeline_tag=facts.task,
        tags=_unique([*tags, *about.get("tags", [])]),
        datasets=_unique([name for name in datasets if repository(name)]),
        metrics=_unique([result.metric_type for result in results]),
        eval_results=results or None,
        model_name=one_line(facts.title, LONG) if results else None,
    )
    return {key: value for key, value in data.to_dict().items() if value}


def _unique(items: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(items))


def _result(facts: Facts, row: Row) -> EvalResult:
    """A result as the Hub's model index takes it."""
    about, data = facts.of("evaluation"), facts.of("data")
    how = {"removal": about.get("removal") or facts.config.get("removal")}
    how |= {name: about.get(name) for name in ("truth", "truth_evaluations")}
    how = {} if row.of_task else {name: one for name, one in how.items() if isinstance(one, str | int | float)}
    return EvalResult(
        task_type=facts.task,
        task_name=facts.task.replace("-", " ").capitalize(),
        dataset_type=repository(data.get("id")) or "image-folder",
        dataset_name=one_line(about.get("data_name") or data.get("name") or "held-out images", LONG),
        metric_type=str(row.kind),
        metric_value=row.value,
        metric_name=one_line(row.label.rstrip(" ↑↓"), LONG),
        metric_args={**({} if row.images is None else {"images": row.images}), **how},
        verified=False,
    )
