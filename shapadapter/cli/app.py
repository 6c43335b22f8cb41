"""The commands together."""

from __future__ import annotations

from types import ModuleType
from typing import Annotated

import typer

from shapadapter import __version__
from shapadapter.cli import card_command as card
from shapadapter.cli import demo_command as demo
from shapadapter.cli import evaluate_command as evaluate
from shapadapter.cli import explain_command as explain
from shapadapter.cli import export_command as export
from shapadapter.cli import inspect_command as inspect
from shapadapter.cli import push_command as push
from shapadapter.cli import report_command as report
from shapadapter.cli import space_command as space
from shapadapter.cli import train_command as train

app = typer.Typer(
    help="Fine-tuned vision models that predict and explain themselves in one forward pass.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"shapadapter {__version__}")
        raise typer.Exit


@app.callback(epilog="Exit codes: 0 good, 1 error, 2 wrong usage, 130 interrupted.")
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Fine-tuned vision models that predict and explain themselves in one forward pass."""


def _help(part: ModuleType) -> str:
    """What a command does, and an example; a paragraph is one line, which the terminal breaks."""
    paragraphs = (part.command.__doc__ or "").split("\n\n")
    return "\n\n".join([*(" ".join(paragraph.split()) for paragraph in paragraphs), f"Example: {part.EXAMPLE}"])


for _part in (demo, train, explain, evaluate, report, export, card, push, space, inspect):
    app.command(
        _part.__name__.rpartition(".")[2],
        help=_help(_part),
        context_settings=getattr(_part, "SETTINGS", None),
    )(_part.command)


def main() -> None:
    """Entry point."""
    app()
