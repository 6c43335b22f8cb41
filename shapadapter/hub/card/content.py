"""The sections of a card, in the order in which a reader wants them."""

from __future__ import annotations

import json
from collections.abc import Mapping

from shapadapter.core.installation import how_to_install
from shapadapter.hub.card.facts import (
    MATCHING,
    Facts,
    code,
    mapping,
    number,
    one_line,
    pictures_of,
    table,
    text,
    texts,
    words,
)
from shapadapter.hub.card.results import rows


def usage(facts: Facts) -> str:
    """How to load the adapter, explain an image, and use it in a pipeline."""
    name = _literal(facts.name)
    revision = "" if facts.revision is None else f", revision={_literal(facts.revision)}"
    place = "" if facts.subfolder is None else f", subfolder={_literal(facts.subfolder)}"
    matching = facts.task == MATCHING
    parts = [
        "## Use",
        "```bash\n" + "\n".join(how_to_install()) + "\n```",
        f"```python\n{_explaining(name, place + revision, matching)}\n```",
    ]
    if not matching and facts.subfolder is None:  # pipeline() looks at the top only
        parts += [
            "As a pipeline:",
            "```python\n"
            "import shapadapter  # makes the task and the adapter known\n"
            "from transformers import pipeline\n\n"
            f'attribute = pipeline("image-attribution", model={name}{revision})\n'
            'attribute("photo.jpg")\n'
            "```",
        ]
    return "\n\n".join(parts)


def _explaining(name: str, where: str, matching: bool) -> str:
    texts = ', texts=["a cat", "a dog"]' if matching else ", top_k=3"
    return (
        "import shapadapter\n\n"
        f"model, processor = shapadapter.load({name}{where})\n"
        f'explanation = shapadapter.explain(model, "photo.jpg", processor{texts})\n\n'
        "print(explanation.top(3)[0])  # the likeliest, with logits\n"
        "print(explanation.attributions.shape)  # (images, rows, cols, shown classes)\n"
        'explanation.save_html("why.html")  # a page to look at'
    )


def _literal(value: str) -> str:
    """A Python string that stays on its line and inside its code block."""
    return json.dumps(one_line(value, 200), ensure_ascii=False)


_CLASSES_SHOWN = 12
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


def sections(facts: Facts) -> dict[str, str]:
    """The Markdown of each section by its name; empty where there is nothing to say."""
    return {
        "summary": _summary(facts),
        "pictures": _pictures(facts),
        "usage": usage(facts),
        "results": _results(facts),
        "training": _training(facts),
        "data": _data(facts),
        "reading": _reading(facts),
        "versions": _versions(facts),
        "citation": _CITATION,
    }


def _summary(facts: Facts) -> str:
    what = "compares images with texts" if facts.task == MATCHING else "predicts"
    per = "text" if facts.task == MATCHING else "class"
    if facts.quantity:
        promise = "every player, a patch or tile of the image, gets a number that says what it adds to the prediction"
    else:
        promise = f"every player, a patch or tile of the image, gets a number for every {per}"
    adds = f"null value + contributions = {'prediction' if facts.quantity else 'logit'}, exactly"
    lines = [
        f"# {words(facts.title)}",
        f"A vision model that {what} and explains itself in one forward pass: {promise}. They add up: {adds}. They are "
        "trained towards the Shapley values of the model's own prediction.",
        table(_features(facts), ["", ""]),
    ]
    return "\n\n".join([*lines, *_classes(facts)])


def _features(facts: Facts) -> list[list[str]]:
    config, base, revision = facts.config, facts.base, text(facts.config.get("revision"))
    link = code(facts.base_name) if base is None else f"[{words(base)}](https://huggingface.co/{base})"
    family = "" if facts.family in (None, facts.base_name) else f", {code(facts.family)}"
    quantised = text(facts.record.get("quantised"))
    family += "" if quantised is None else f", quantised by {code(quantised)}"
    at = "" if revision is None else f", revision {code(one_line(revision, 12))}"
    players = facts.players
    cells = "patches" if config.get("mechanism") == "sequence" and config.get("grid") is None else "tiles"
    absent = "".join(_REMOVALS.get(str(config.get("removal")), ()))
    found = [
        ["**Base model**", f"{link}{family}{at}"],
        ["**Players**", "" if players is None else f"{players[0]} x {players[1]} {cells} of the image"],
        ["**An absent player is**", absent],
        ["**Prediction**", "" if facts.quantity else f"logits: {_PREDICTIONS.get(str(config.get('prediction')), '')}"],
        ["**Trained**", _trained(config)],
    ]
    return [row for row in found if row[1]]


def _trained(config: Mapping[str, object]) -> str:
    tune, rank = str(config.get("tune")), config.get("r")
    if tune == "lora" and isinstance(rank, int):
        return f"LoRA of rank {rank}, Shapley token and projection head"
    return f"Shapley token and projection head, and of the base model {_TUNES[tune]}" if tune in _TUNES else ""


def _classes(facts: Facts) -> list[str]:
    names = facts.classes
    if not names or facts.quantity or facts.task == MATCHING:
        return []
    shown = ", ".join(code(name, 40) for name in names[:_CLASSES_SHOWN])
    rest = len(names) - _CLASSES_SHOWN
    more = f" and {rest:,} more, which `adapter_config.json` names" if rest > 0 else ""
    several = facts.config.get("problem_type") == "multi_label_classification"
    kind = "labels, several of which an image may have" if several else "classes"
    return [f"**{len(names):,} {kind}**: {shown}{more}."]


def _pictures(facts: Facts) -> str:
    shown = [picture for picture in pictures_of(facts.record) if picture["file"] in facts.pictures]
    if not shown:
        return ""
    pictures = [f"![{words(picture.get('alt', ''), 300)}](explanations/{picture['file']})" for picture in shown]
    what = "the prediction" if facts.quantity else "the class below the map"
    return "\n\n".join(
        [
            "## What it sees",
            f"Sample images. Red speaks for {what}, blue with a dash against it, no colour is 0; maps of one image share "
            "their scale.",
            *pictures,
        ]
    )


def _results(facts: Facts) -> str:
    found = rows(facts)
    if not found:
        return f"## Results\n\n{_nothing_measured(facts)}"
    lines = [[row.label, row.shown, "" if row.images is None else f"{row.images:,}"] for row in found]
    evaluated = facts.of("evaluation")
    head = "mean (95 % interval)" if evaluated else "mean"
    parts = ["## Results", table(lines, ["", head, "images"]), _how_measured(facts)]
    return "\n\n".join(part for part in [*parts, _others(evaluated)] if part)


def _nothing_measured(facts: Facts) -> str:
    again = "The weights have changed since results were measured. " if facts.record.get("changed") else ""
    return (
        f"{again}Nothing is measured yet: neither accuracy, nor how near the contributions are to the true Shapley values, nor "
        "the cost. To measure it on held-out images, in a folder with a subfolder for each class, and write it here:\n\n"
        "```bash\n"
        "shapadapter evaluate CHECKPOINT --data FOLDER --output report\n"
        "shapadapter card CHECKPOINT --evaluation report/evaluation.json\n"
        "```"
    )


def _how_measured(facts: Facts) -> str:
    found = facts.of("evaluation")
    if not found:
        when = facts.of("metrics").get("step")
        at = f" at step {when:,}" if isinstance(when, int) else ""
        return f"Measured during training{at}, on held-out images; without intervals. `shapadapter evaluate` measures more."
    count, own = number(found.get("truth_evaluations")), number(found.get("truth_error"))
    truth = "exact, from all coalitions"
    if found.get("truth") != "exact":
        error = "" if own is None else f", its own error {own:.2g}"
        truth = f"KernelSHAP with {0 if count is None else count:,.0f} evaluations{error}"
    read = "value" if found.get("curves_read") == "value" else "probability"
    groups = " of groups" if found.get("groups") else ""
    return (
        f"The game is the model's own: an absent player is {_REMOVALS.get(str(found.get('removal')), ('removed',))[0]}, the value "
        f"is the logit of the predicted class. The true Shapley values are {truth}. Insertion and deletion are areas under "
        f"the curve of its {read}. Intervals are bootstrapped over images{groups}; time and memory with LoRA merged."
    )


def _others(found: Mapping[str, object]) -> str:
    """Other methods beside the one pass, where any was compared but those that know nothing of the model."""
    methods = {name: mapping(values) for name, values in mapping(found.get("methods")).items()}
    if not set(methods) - {"shapadapter", "random", "centre"}:
        return ""
    shown = {
        "error": "relative L2 ↓",
        "insertion": "insertion ↑",
        "deletion": "deletion ↓",
        "evaluations": "evaluations",
    }
    lines = []
    for name, values in sorted(methods.items(), key=lambda item: (item[0] != "shapadapter", item[0])):
        means = [number(mean[0]) if isinstance(mean := values.get(key), list) and mean else None for key in shown]
        lines.append([code(name, 40), *("" if mean is None else f"{mean:,.3g}" for mean in means)])
    return _folded("Beside other methods", table(lines, ["", *shown.values()]))


def _training(facts: Facts) -> str:
    found = facts.of("training")
    if not found:
        return (
            "## Training\n\nNot recorded: this adapter was not trained by `ShapleyTrainer`, or before it kept records."
        )
    epochs, steps, minutes = (number(found.get(name)) for name in ("epochs", "steps", "minutes"))
    length = [] if epochs is None else [f"{epochs:.3g} epoch{'s' * (epochs != 1)}"]
    length += [] if steps is None else [f"{steps:,.0f} steps"]
    took = "" if minutes is None else f" in {f'{minutes:,.0f} minutes' if minutes >= 2 else f'{60 * minutes:.0f} s'}"
    where = "" if text(found.get("hardware")) is None else f" on {code(found['hardware'])}"
    later = " The weights were changed by other means after it." if facts.record.get("changed") else ""
    settings = [[code(name), code(value)] for name, value in sorted(mapping(found.get("settings")).items())]
    said = f"Task loss and Shapley loss in one stage: {', '.join(length) or 'length unknown'}{took}{where}.{later}"
    folded = [_folded("Settings", table(settings, ["setting", "value"]))] if settings else []
    return "\n\n".join(["## Training", said, *folded])


def _data(facts: Facts) -> str:
    data = facts.of("data")
    given, name = texts(facts.of("about").get("dataset")), text(data.get("name"))
    known = text(data.get("id"))
    if given:
        named = ", ".join(code(one) for one in given)
    elif known is not None:
        named = code(known)
    else:
        named = "" if name is None else code(name)
    counts = {"training": data.get("train_images"), "held-out": data.get("eval_images")}
    sizes = [f"{count:,} {kind} images" for kind, count in counts.items() if type(count) is int]
    part = ", ".join(code(one) for one in texts(facts.of("about").get("dataset_args")))
    named += f" ({part})" if part else ""
    said = ": ".join(one for one in (named, ", ".join(sizes)) if one)
    return f"## Data\n\n{said}." if said else "## Data\n\nNot recorded."


def _reading(facts: Facts) -> str:
    score = "prediction" if facts.quantity else "logit"
    return f"""## How to read the contributions

Averaged over all orders in which the players could appear, this player raised (red) or lowered (blue) the {score} by so much.

- **They explain this model, not the world.** A model that knows boats by water will show water. That is no cause, and no
  advice.
- **They belong to one game**: players present or absent, and absent as the table above says. Another way of removing
  them has other Shapley values.
- **One pass is an estimate.** {_accuracy(facts)}
  Do not read the order of nearly equal players. `explain(..., refine=256)` comes nearer, with standard errors.
- **Players interact**, and one number for each cannot show it: two that replace each other share the credit as two that
  need each other do.
- **Sums are exact, meaning is not promised**: contributions add up for any weights, good or bad."""


def _accuracy(facts: Facts) -> str:
    found = next((row for row in rows(facts) if row.kind == "shapley_relative_error"), None)
    if found is None:
        return "How near it comes was not measured for this model."
    return (
        f"Here it differs from the true Shapley values by {found.value:.0%} of their length (relative L2), on average."
    )


def _versions(facts: Facts) -> str:
    known = {**{"shapadapter": facts.config.get("shapadapter_version"), "peft": facts.config.get("peft_version")}}
    known |= facts.of("versions")
    listed = ", ".join(f"{words(name, 20)} {code(version, 30)}" for name, version in known.items() if text(version))
    return f"## Versions\n\n{listed}." if listed else ""


def _folded(title: str, body: str) -> str:
    return f"<details>\n<summary>{title}</summary>\n\n{body}\n\n</details>"


_CITATION = """## Citation

The idea, attributions trained towards Shapley values as an auxiliary task:

```bibtex
@inproceedings{fan2026enhancing,
  title     = {Enhancing Interpretability for Vision Models via Shapley Value Optimization},
  author    = {Fan, Kanglong and Yang, Yunqiao and Ma, Chen},
  booktitle = {Proceedings of the AAAI Conference on Artificial Intelligence},
  year      = {2026},
  note      = {arXiv:2512.14354},
}
```

The adapter:

```bibtex
@software{shapadapter,
  title = {shapadapter: fine-tuned vision models that predict and explain themselves in one forward pass},
  year  = {2026},
}
```"""
