"""`shapadapter evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

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
        from shapadapter.evaluation import evaluate_checkpoint

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
        result = evaluate_checkpoint(checkpoint, data, masks, names, output, **place, **settings)
        say(result.to_dict(), result.table())
