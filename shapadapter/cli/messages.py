"""What a command says: results on the standard output, errors in one line on the other, and an exit code."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any, TextIO

import typer

from shapadapter.core.phrases import as_options, one_line


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
    """Run a command: what goes wrong is said in one line, with exit code 1; an interruption has 130."""
    say = Say(sys.stdout, as_json)
    options = {name.lstrip("-").replace("-", "_"): name for one in context.command.params for name in one.opts}
    try:
        with redirect_stdout(sys.stderr if as_json else say.stream), as_options(options):
            yield say
    except KeyboardInterrupt:
        typer.echo(f"\nInterrupted. {hint}", err=True)
        raise typer.Exit(130) from None
    except Exception as error:
        if not isinstance(error, _expected()):
            raise
        typer.echo(f"Error: {one_line(error) or type(error).__name__}", err=True)
        raise typer.Exit(1) from None


def _expected() -> tuple[type[Exception], ...]:
    """Errors that are the user's to mend; others are ours, and keep their traceback."""
    from shapadapter.core.errors import ShapleyError

    # What the Hub's client raises where nobody answers, if it is in use at all.
    client = sys.modules.get("huggingface_hub.utils")
    network = (client.httpx.HTTPError,) if client is not None else ()
    return (ShapleyError, ImportError, OSError, ValueError, *network)


def warn(text: str) -> None:
    """Say something beside the result."""
    typer.echo(one_line(text), err=True)


def quiet() -> None:
    """Leave out what other libraries tell each other: bars of loading weights, and what will be renamed one day."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="(transformers|peft)")
