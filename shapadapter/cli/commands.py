"""The commands together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer

from shapadapter import __version__
from shapadapter.cli.evaluate import evaluate, report
from shapadapter.cli.explain import explain
from shapadapter.cli.share import card, export, push, space
from shapadapter.cli.start import demo, inspect
from shapadapter.cli.train import train

app = typer.Typer(
    help="Fine-tuned vision models that predict and explain themselves in one forward pass.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_EXAMPLES: dict[Callable[..., None], str] = {
    demo: "shapadapter demo --output demo-output",
    train: "shapadapter train --model facebook/dinov2-small --data photos --output out",
    explain: "shapadapter explain out photos --output explanations",
    evaluate: "shapadapter evaluate out --data photos --output evaluation",
    report: "shapadapter report out --data photos --output report",
    export: "shapadapter export out onnx --to onnx --images photos",
    card: "shapadapter card out --evaluation evaluation/evaluation.json --images photos",
    push: "shapadapter push out you/vit-beans --private",
    space: "shapadapter space out space && python space/app.py",
    inspect: "shapadapter inspect facebook/dinov2-small",
}
"""The commands in the order of `--help`."""


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"shapadapter {__version__}")
        raise typer.Exit


@app.callback(epilog="Exit codes: 0 success, 1 error, 2 wrong usage, 130 interrupted.")
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Fine-tuned vision models that predict and explain themselves in one forward pass."""


for _command, _example in _EXAMPLES.items():
    # A paragraph of a docstring becomes one line, which the terminal breaks.
    _paragraphs = [" ".join(paragraph.split()) for paragraph in (_command.__doc__ or "").split("\n\n")]
    _settings: dict[str, Any] | None = None
    if _command is train:  # hands the arguments of the training script through
        _settings = {"allow_extra_args": True, "ignore_unknown_options": True}
    app.command(help="\n\n".join([*_paragraphs, f"Example: {_example}"]), context_settings=_settings)(_command)


def main() -> None:
    """Entry point."""
    app()
