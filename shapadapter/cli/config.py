"""Options from a yaml file: read safely, checked by name, overridden by the command line."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import date
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import typer

MORE = "shapadapter.more"
"""Where a command finds, in `context.meta`, the keys that are none of its own options."""

_SCALARS = (bool, int, float, str, date)


def read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Take the values of a yaml file as the defaults of the command's options.

    Raises:
        typer.BadParameter: the file is unreadable, no mapping, more than plain yaml, or has keys that are no options.
    """
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
        raise typer.BadParameter(unknown(next(iter(more)), names, f"{path} has"))
    context.meta[MORE] = more
    context.default_map = {
        names[key].name: _as_words(key, value, names[key]) for key, value in given.items() if key not in more
    }
    return path


def unknown(name: str, known: Iterable[str], where: str) -> str:
    """Say that an option is none, and which one may be meant."""
    options = [option.replace("_", "-") for option in known if option not in ("config", "help")]
    close = get_close_matches(name.replace("_", "-"), options, n=1)
    hint = f"Did you mean {close[0]!r}?" if close else "See --help."
    return f"{where} the option {name!r}, which this command does not know. {hint}"


def _load(path: Path) -> dict[str, Any]:
    import yaml

    from shapadapter.errors import CheckpointError
    from shapadapter.reading import read_yaml

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
        raise typer.BadParameter(f"Expected options in {path}, a line each, such as 'top-k: 3'.")
    return {key.replace("-", "_"): value for key, value in found.items()}


def _as_words(key: str, value: Any, parameter: Any) -> Any:
    """A value as it would be typed on the command line, which then checks it."""
    several = parameter.nargs == -1 or getattr(parameter, "multiple", False)
    if value is None or (isinstance(value, bool) and getattr(parameter, "is_flag", False)):
        return value
    if isinstance(value, list) and all(isinstance(part, _SCALARS) for part in value):
        return [str(part) for part in value] if several else ",".join(map(str, value))
    if not isinstance(value, _SCALARS) or getattr(parameter, "is_flag", False):
        wanted = "true or false" if getattr(parameter, "is_flag", False) else "a value or a list of values"
        raise typer.BadParameter(f"Expected {wanted} for {key!r}, got {type(value).__name__}.")
    return [str(value)] if several else str(value)
