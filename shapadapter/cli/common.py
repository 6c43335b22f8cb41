"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .config import read_config

LOADING, OUTPUT, GENERAL = "Loading", "Output", "General"
"""The groups of options in `--help`, beside a command's own."""

Checkpoint = Annotated[str, typer.Argument(help="Folder of the adapter, or its name on the Hub.", show_default=False)]
Folder = Annotated[Path, typer.Argument(help="Folder of the adapter.", show_default=False)]
Subfolder = Annotated[
    str | None,
    typer.Option(
        "--subfolder",
        help="Where in that folder or repository the adapter is; by default at the top.",
        rich_help_panel=LOADING,
    ),
]
Base = Annotated[
    str | None,
    typer.Option(
        "--base", help="Base model, if it is not where the adapter says: a folder or name.", rich_help_panel=LOADING
    ),
]
Revision = Annotated[
    str | None,
    typer.Option("--revision", help="Branch, tag or commit of the adapter on the Hub.", rich_help_panel=LOADING),
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device", help="cpu, cuda, cuda:1, ...; by default a GPU if there is one.", rich_help_panel=LOADING
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype", help="float32, bfloat16 or float16; by default as the base was saved.", rich_help_panel=LOADING
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run code that comes with the base model. Read it before.",
        rich_help_panel=LOADING,
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print json and nothing else on the standard output.", rich_help_panel=GENERAL)
]
Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="Options from a yaml file; those of the command line win.",
        callback=read_config,
        is_eager=True,
        rich_help_panel=GENERAL,
    ),
]

# What `evaluate` and `report` measure.
Data = Annotated[
    Path, typer.Option("--data", help="Folder with a subfolder of images for each class.", show_default=False)
]
Masks = Annotated[
    Path | None,
    typer.Option("--masks", help="Folder with a png mask of the object at the same path for each image."),
]
Measured = Annotated[int, typer.Option("--images", help="How many images are measured.", min=1)]
Methods = Annotated[str, typer.Option("--methods", help="Methods to compare with, separated by commas.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of all that is drawn.")]
BatchSize = Annotated[int, typer.Option("--batch-size", help="Images in a forward pass.", min=1)]
