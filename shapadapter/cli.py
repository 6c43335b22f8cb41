"""The `shapadapter` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Fine-tuned vision models that predict and explain themselves in one forward pass.",
    no_args_is_help=True,
    add_completion=False,
)


@app.callback()
def _root() -> None:
    """Fine-tuned vision models that predict and explain themselves in one forward pass."""


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for checkpoints, pictures and the report.")] = Path(
        "demo-output"
    ),
    seed: Annotated[int, typer.Option(help="Seed of data, training and estimates.")] = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="A smoke run under a minute; its numbers mean little.")
    ] = False,
) -> None:
    """Run the main job on real digits: train, wrap, fine-tune, save, load, explain, compare with the truth."""
    from .demo import run
    from .errors import ShapleyError

    try:
        run(output, seed, quick)
    except KeyboardInterrupt:
        typer.echo(
            "\nInterrupted. What is in the output folder is whole; run the command again to start over.", err=True
        )
        raise typer.Exit(130) from None
    except (ShapleyError, ImportError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from None


def main() -> None:
    """Entry point."""
    app()
