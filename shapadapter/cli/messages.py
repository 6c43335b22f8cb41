"""What a command says: results on the standard output, errors in one line on the other, and an exit code."""

from __future__ import annotations

import ast
import json
import re
import shlex
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any, TextIO

import typer

from shapadapter.core.phrases import one_line

_VALUE = r"(True|\.{3}|\[\.{3}\]|'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\")"
_ARGUMENT = re.compile(rf"load\(\.\.\., (\w+)={_VALUE}\)|(?<!\S)(?<!, )(\w+)={_VALUE}")
"""What an error tells people to pass, by itself or to `load`; in the call of another function it is left as it is."""


@dataclass(frozen=True)
class Say:
    """Prints results on the standard output.

    Attributes:
        stream: the standard output.
        as_json: whether json is wanted.
    """

    stream: TextIO
    as_json: bool

    def __call__(self, data: Any, text: str) -> None:
        """Print a result: what json takes, or the text for people."""
        whole = text.encode("utf-8", "backslashreplace").decode()  # it may name files, and classes called as folders
        typer.echo(json.dumps(data, allow_nan=False) if self.as_json else whole, file=self.stream)


@contextmanager
def reporting(
    context: typer.Context, as_json: bool, hint: str = "Run the command again to start over."
) -> Iterator[Say]:
    """Run a command: what goes wrong is said in one line, with exit code 1; an interruption has 130.

    Args:
        context: of the command, which knows its options.
        as_json: whether the standard output is for json alone; what else is printed goes to the other one then.
        hint: what to do after an interruption.
    """
    say = Say(sys.stdout, as_json)
    try:
        with redirect_stdout(sys.stderr if as_json else say.stream):
            yield say
    except KeyboardInterrupt:
        typer.echo(f"\nInterrupted. {hint}", err=True)
        raise typer.Exit(130) from None
    except Exception as error:
        if not isinstance(error, _expected()):
            raise
        typer.echo(f"Error: {one_line(as_typed(str(error), context)) or type(error).__name__}", err=True)
        raise typer.Exit(1) from None


def _expected() -> tuple[type[Exception], ...]:
    """Errors that are the user's to mend; others are ours, and keep their traceback."""
    from shapadapter.core.errors import ShapleyError

    # What the Hub's client raises where nobody answers, if it is in use at all.
    client = sys.modules.get("huggingface_hub.utils")
    network = (client.httpx.HTTPError,) if client is not None else ()
    return (ShapleyError, ImportError, OSError, ValueError, *network)


def as_typed(text: str, context: typer.Context) -> str:
    """What an error tells people to type in Python, as the same is typed here: `load(..., base='x')` is `--base x`.

    Values are quoted for a shell: names come from strangers, too, and what is said here is pasted there.

    An option has the name of the argument that it is handed over as; one that the command does not have is left alone.
    """
    options = {name.lstrip("-").replace("-", "_"): name for one in context.command.params for name in one.opts}

    def option(found: re.Match[str]) -> str:
        """The argument that was found as an option, if it is one."""
        name, value = filter(None, found.groups())
        if name not in options:
            return found[0]
        if value == "True":
            return options[name]
        return f"{options[name]} {_quoted(value)}"

    # A token is never an option: others could read it in the list of processes.
    return _ARGUMENT.sub(option, text.replace("pass token=", "set HF_TOKEN"))


def _quoted(value: str) -> str:
    """A value of Python as one word of a shell; what is none, as `...`, as it is."""
    try:
        found = ast.literal_eval(value)
    except (SyntaxError, ValueError):
        found = value
    return shlex.quote(found) if isinstance(found, str) else value.strip("[]")


def warn(text: str) -> None:
    """Say something beside the result."""
    typer.echo(one_line(text), err=True)


def quiet() -> None:
    """Leave out what other libraries tell each other: bars of loading weights, and what will be renamed one day."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="(transformers|peft)")
