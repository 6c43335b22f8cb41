"""`shapadapter demo`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from shapadapter.cli.messages import reporting
from shapadapter.cli.options import Config, Json

EXAMPLE = "shapadapter demo --output demo-output"


def command(
    context: typer.Context,
    output: Annotated[Path, typer.Option(help="Folder for checkpoints, pictures and the report.")] = Path(
        "demo-output"
    ),
    seed: Annotated[int, typer.Option(help="Seed of data, training and estimates.")] = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="A smoke run under a minute; its numbers mean little.")
    ] = False,
    json: Json = False,
    config: Config = None,
) -> None:
    """Run the main job on real digits: train, wrap, fine-tune, save, load, explain, compare with the truth."""
    hint = "What is in the output folder is whole; run the command again to start over."
    with reporting(context, json, hint) as say:
        for name in ("datasets", "matplotlib", "mlxtend"):
            if find_spec(name) is None:
                raise ImportError(f'The demo needs {name}: pip install "shapadapter[demo]"')
        from shapadapter.demo import run

        rows = run(output, seed, quick)
        if json:
            say({"output": str(output), "rows": {name.strip(): value for name, value in rows}}, "")
