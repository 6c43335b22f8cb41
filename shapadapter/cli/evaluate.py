"""`shapadapter evaluate` and `shapadapter report`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shapadapter.cli.options import OUTPUT, PLACE, Checkpoint, Refine, Say, command, quiet, warn, without
from shapadapter.cli.outputs import printable
from shapadapter.core.files import alone_in

if TYPE_CHECKING:
    from shapadapter.evaluation import Evaluation
    from shapadapter.explanation.explanation import Explanation

_CLASSES = 5  # of each image, the likeliest ones, on the page


def _names(methods: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in methods.split(",") if name.strip())


_PLACE = without(PLACE, "dtype")
_MEASURED: dict[str, tuple[Any, Any]] = {
    "data": (Annotated[Path, typer.Option(help="Folder with a subfolder of images for each class.")], ...),
    "masks": (
        Annotated[
            Path | None, typer.Option(help="Folder with a png mask of the object at the same path for each image.")
        ],
        None,
    ),
    "images": (Annotated[int, typer.Option(help="How many images are measured.", min=1)], 32),
    "methods": (
        Annotated[str, typer.Option(help="Methods to compare with, separated by commas.", callback=_names)],
        "",
    ),
    "cost_curve": (
        Annotated[bool, typer.Option("--cost-curve", help="Measure errors at equal cost, too: twice as much work.")],
        False,
    ),
    "seed": (Annotated[int, typer.Option(help="Seed of all that is drawn.")], 0),
    "batch_size": (Annotated[int, typer.Option(help="Images in a forward pass.", min=1)], 32),
}


@command("Run the command again to go on, if it had an --output.", measured=_MEASURED, place=_PLACE)
def evaluate(
    say: Say,
    checkpoint: Checkpoint,
    *,
    measured: dict[str, Any],
    output: Annotated[
        Path | None, typer.Option(help="Folder for evaluation.json, table.md and the figures.", **OUTPUT)
    ] = None,
    place: dict[str, Any],
) -> None:
    """Measure a fine-tuned model and its explanations, side by side with other methods."""
    with alone_in(output):
        result = evaluate_checkpoint(checkpoint, output=output, place=place, **measured)[-1]
        say(result.to_dict(), result.table())


@command("Run the command again to go on.", measured=_MEASURED, place=_PLACE)
def report(
    say: Say,
    checkpoint: Checkpoint,
    *,
    measured: dict[str, Any],
    shown: Annotated[int, typer.Option(help="How many images are on the page.", min=1, max=500)] = 12,
    refine: Refine = None,
    output: Annotated[Path, typer.Option(help="Folder for report.html and the files of `evaluate`.", **OUTPUT)] = Path(
        "report"
    ),
    place: dict[str, Any],
) -> None:
    """Evaluate a fine-tuned model and write a page: its measures, and images with their explanations.

    The page names the level of its maps. A second run with the same --output takes what has been measured from there.
    """
    from shapadapter.hub.level import Explainer

    with alone_in(output):
        model, processor, result = evaluate_checkpoint(checkpoint, output=output, place=place, **measured)
        explain = partial(Explainer(refine, warn), model)
        data, seed, file = measured["data"], measured["seed"], output / "report.html"
        page = _page(partial(explain, processor=processor), model, result, data, file, shown, seed)
        say({"page": str(page), "metrics": result.metrics()}, f"{result.table()}\n\nWrote {page}.")


def evaluate_checkpoint(
    checkpoint: str | Path,
    data: Path,
    masks: Path | None = None,
    methods: tuple[str, ...] = (),
    output: Path | None = None,
    place: Mapping[str, Any] | None = None,
    **settings: Any,
) -> tuple[Any, Any, Evaluation]:
    """Load an adapter, from `place` as `load` takes it, and evaluate it on a folder: model, processor and results."""
    from peft import get_peft_model_state_dict

    from shapadapter.adapter.saving import weights_digest
    from shapadapter.evaluation.evaluator import check_run, evaluate_folder
    from shapadapter.explanation.game import active_layer
    from shapadapter.hub.load import called, load

    quiet()
    place = place or {}
    shown = called(checkpoint, place.get("subfolder"))
    check_run(data, masks, methods, output, shown)
    model, processor = load(checkpoint, **place)
    weights = get_peft_model_state_dict(model, adapter_name=str(active_layer(model).active))
    # By the weights a card knows whether the evaluation is of its adapter.
    about = {"checkpoint": shown, "folder": str(data), "weights": weights_digest(weights)}
    return model, processor, evaluate_folder(model, processor, data, masks, methods, output, about, **settings)


def _page(
    explain: Callable[..., Explanation], model: Any, result: Evaluation, data: Path, file: Path, shown: int, seed: int
) -> Path:
    """Explain some of the images, and show them below the measures of the model card, the wrong predictions first."""
    from shapadapter.data.classes import class_names
    from shapadapter.evaluation.dataset import choose, labelled_images
    from shapadapter.evaluation.tables import blocks, summary
    from shapadapter.explanation.game import active_layer
    from shapadapter.hub.card.facts import Facts, compact, rows
    from shapadapter.visual import write_page
    from shapadapter.visual.page import Measures

    listed = labelled_images(data, list(class_names(model.config.id2label, active_layer(model).classes)), None)
    chosen = [listed[index] for index in choose(len(listed), shown, seed)]
    # One by one, for they may differ in size.
    explained = [(row, _explained(explain, row)) for row in chosen]
    explained.sort(key=lambda pair: pair[1].top(1)[0][0].index == pair[0]["label"])
    notes = (summary(result.about), *result.notes)
    facts = Facts({"record": {"evaluation": compact(result.to_dict())}}, "")
    return write_page(
        [explanation for _, explanation in explained],
        file,
        title=f"{result.about['checkpoint']} on {printable(data)}",
        table=[(row.label, row.shown) for row in rows(facts)],
        names=[printable(Path(row["image"]).relative_to(data)) for row, _ in explained],
        true_labels=[row["label"] for row, _ in explained],
        measures=Measures(blocks(result), result.curves, result.about["curves_read"], notes),
    )


def _explained(explain: Callable[..., Explanation], row: dict[str, Any]) -> Explanation:
    """The likeliest classes of an image, and the true one: a wrong prediction is to be compared with it."""
    found = explain(row["image"], top_k=_CLASSES)
    shown = found.classes[0].tolist()
    return found if row["label"] in shown else explain(row["image"], targets=[*shown, row["label"]])
