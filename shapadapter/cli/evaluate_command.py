"""`shapadapter evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shapadapter.cli.messages import quiet, reporting
from shapadapter.cli.options import (
    OUTPUT,
    Base,
    BatchSize,
    Checkpoint,
    Config,
    Data,
    Device,
    Json,
    Masks,
    Measured,
    Methods,
    Revision,
    Seed,
    Subfolder,
    TrustRemoteCode,
)
from shapadapter.core.locks import alone_in

if TYPE_CHECKING:
    from shapadapter.evaluation import Evaluation

EXAMPLE = "shapadapter evaluate out --data photos --output evaluation"


def command(
    context: typer.Context,
    checkpoint: Checkpoint,
    data: Data,
    masks: Masks = None,
    images: Measured = 32,
    methods: Methods = "",
    seed: Seed = 0,
    batch_size: BatchSize = 32,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder for evaluation.json, table.md and curves.png.", rich_help_panel=OUTPUT),
    ] = None,
    subfolder: Subfolder = None,
    base: Base = None,
    revision: Revision = None,
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
    config: Config = None,
) -> None:
    """Measure a fine-tuned model and its explanations, side by side with other methods."""
    with reporting(context, json, "Run the command again to go on, if it had an --output.") as say, alone_in(output):
        quiet()
        names = tuple(name.strip() for name in methods.split(",") if name.strip())
        settings: dict[str, Any] = {"images": images, "seed": seed, "batch_size": batch_size}
        place: dict[str, Any] = {
            "subfolder": subfolder,
            "base": base,
            "revision": revision,
            "device": device,
            "trust_remote_code": trust_remote_code,
        }
        result = evaluate_checkpoint(checkpoint, data, masks, names, output, place, **settings)
        say(result.to_dict(), result.table())


def evaluate_checkpoint(
    checkpoint: str | Path,
    data: Path,
    masks: Path | None,
    methods: tuple[str, ...],
    output: Path | None,
    place: dict[str, Any] | None = None,
    **settings: Any,
) -> Evaluation:
    """Load an adapter, from `place` as `load` takes it, evaluate it on a folder of images, and write the results."""
    from peft import get_peft_model_state_dict

    from shapadapter.evaluation.evaluator import check_run, evaluate_folder
    from shapadapter.explanation.game import active_layer
    from shapadapter.hub.card.facts import weights_digest
    from shapadapter.hub.load import load
    from shapadapter.hub.locate import called

    place = place or {}
    shown = called(checkpoint, place.get("subfolder"))
    check_run(data, masks, methods, output, shown)
    model, processor = load(checkpoint, **place)
    weights = get_peft_model_state_dict(model, adapter_name=str(active_layer(model).active))
    # By the weights a card knows whether the evaluation is of its adapter.
    about = {"checkpoint": shown, "folder": str(data), "weights": weights_digest(weights)}
    return evaluate_folder(model, processor, data, masks, methods, output, about, **settings)
