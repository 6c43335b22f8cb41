"""Options that several commands share, also from a yaml file."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import typer

from shapadapter.core.phrases import did_you_mean

MORE = "shapadapter.more"
"""Where a command finds, in `context.meta`, the keys of the yaml file that are none of its own options."""

_SCALARS = (bool, int, float, str, date)


def read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Take the values of a yaml file as the defaults of the command's options."""
    if path is None or context.resilient_parsing:
        return path
    names = {
        option.lstrip("-").replace("-", "_"): parameter
        for parameter in context.command.params
        for option in parameter.opts
    }
    given = _load(path)
    more = {key: value for key, value in given.items() if key not in names or key in ("config", "help")}
    if more and not context.ignore_unknown_options:
        raise typer.BadParameter(f"{unknown(next(iter(more)), names)} (in {path})")
    context.meta[MORE] = more
    context.default_map = {
        names[key].name: _as_words(key, value, names[key]) for key, value in given.items() if key not in more
    }
    return path


def unknown(name: str, known: Iterable[str]) -> str:
    """Say that an option is unknown, and which one may be meant."""
    options = [option.replace("_", "-") for option in known if option not in ("config", "help")]
    return f"unknown option {name!r}. {did_you_mean(name.replace('_', '-'), options) or 'See --help.'}"


def _load(path: Path) -> dict[str, Any]:
    import yaml

    from shapadapter.core.documents import read_yaml
    from shapadapter.core.errors import CheckpointError

    try:
        found = read_yaml(path)
    except yaml.constructor.ConstructorError as error:
        raise typer.BadParameter(
            f"{path} asks for more than plain yaml ({error.problem}), which could run code. Write plain names and values."
        ) from error
    except CheckpointError as error:
        raise typer.BadParameter(str(error)) from error
    found = {} if found is None else found
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise typer.BadParameter(f"Expected options in {path}, one on a line, such as 'top-k: 3'.")
    return {key.replace("-", "_"): value for key, value in found.items()}


def _as_words(key: str, value: Any, parameter: Any) -> Any:
    """A value as it would be typed on the command line, which then checks it."""
    several = parameter.nargs == -1 or getattr(parameter, "multiple", False)
    flag = getattr(parameter, "is_flag", False)
    if value is None or (isinstance(value, bool) and flag):
        return value
    if isinstance(value, list) and all(isinstance(part, _SCALARS) for part in value):
        return [str(part) for part in value] if several else ",".join(map(str, value))
    if not isinstance(value, _SCALARS) or flag:
        wanted = "true or false" if flag else "a value or a list of values"
        raise typer.BadParameter(f"Expected {wanted} for {key!r}, got {type(value).__name__}.")
    return [str(value)] if several else str(value)


# The groups of options in `--help`, beside a command's own.
LOADING = {"rich_help_panel": "Loading"}
OUTPUT = {"rich_help_panel": "Output"}
GENERAL = {"rich_help_panel": "General"}

Checkpoint = Annotated[str, typer.Argument(help="Folder of the adapter, or its name on the Hub.", show_default=False)]
Folder = Annotated[Path, typer.Argument(help="Folder of the adapter.", show_default=False)]
Subfolder = Annotated[
    str | None,
    typer.Option(help="Where in that folder or repository the adapter is; by default at the top.", **LOADING),
]
Base = Annotated[
    str | None, typer.Option(help="Base model, if it is not where the adapter says: a folder or name.", **LOADING)
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the adapter on the Hub.", **LOADING)]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1, ...; by default a GPU if there is one.", **LOADING)
]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16; by default as the base was saved.", **LOADING)
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run code that comes with the base model. Read it first.", **LOADING),
]
Json = Annotated[bool, typer.Option("--json", help="Print json and nothing else on the standard output.", **GENERAL)]
Config = Annotated[
    Path | None,
    typer.Option(
        help="Options from a yaml file; those of the command line win.",
        callback=read_config,
        is_eager=True,
        **GENERAL,
    ),
]
Texts = Annotated[
    list[str] | None, typer.Option(help="A text, for a model that matches images with texts; may be repeated.")
]

# What `evaluate` and `report` measure.
Data = Annotated[Path, typer.Option(help="Folder with a subfolder of images for each class.", show_default=False)]
Masks = Annotated[
    Path | None, typer.Option(help="Folder with a png mask of the object at the same path for each image.")
]
Measured = Annotated[int, typer.Option(help="How many images are measured.", min=1)]
Methods = Annotated[str, typer.Option(help="Methods to compare with, separated by commas.")]
Seed = Annotated[int, typer.Option(help="Seed of all that is drawn.")]
BatchSize = Annotated[int, typer.Option(help="Images in a forward pass.", min=1)]
