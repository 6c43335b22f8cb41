"""`shapadapter card`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shapadapter.cli.messages import quiet, reporting
from shapadapter.cli.options import Config, Folder, Json, TrustRemoteCode
from shapadapter.cli.outputs import find_images

EXAMPLE = "shapadapter card out --evaluation evaluation/evaluation.json --images photos"


def command(
    context: typer.Context,
    checkpoint: Folder,
    evaluation: Annotated[
        Path | None, typer.Option(help="evaluation.json of `shapadapter evaluate`, for the table of results.")
    ] = None,
    images: Annotated[
        list[Path] | None,
        typer.Option(help="An image, or a folder of them, for the pictures of the card; may be repeated."),
    ] = None,
    shown: Annotated[int, typer.Option(help="How many of the images are shown, spread evenly.", min=1)] = 4,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
    config: Config = None,
) -> None:
    """Write the model card of an adapter, with results and pictures; what you wrote in it stays."""
    with reporting(context, json) as say:
        from shapadapter.hub.card.renewal import update_card

        quiet()
        found = list(find_images(images)) if images else None
        chosen = found and found[:: max(1, len(found) // shown)][:shown]
        written = update_card(checkpoint, evaluation=evaluation, images=chosen, trust_remote_code=trust_remote_code)
        say({"card": str(written)}, f"Wrote {written}.")
