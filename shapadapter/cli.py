"""The `shapadapter` command."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from json import dumps
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

    with _reported("What is in the output folder is whole; run the command again to start over."):
        run(output, seed, quick)


@app.command()
def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of the adapter; it names its base model.")],
    data: Annotated[Path, typer.Option(help="Folder with a subfolder of images for each class.")],
    masks: Annotated[
        Path | None, typer.Option(help="Folder with a png mask of the object at the same path for each image.")
    ] = None,
    images: Annotated[int, typer.Option(help="How many images are explained.")] = 32,
    methods: Annotated[str, typer.Option(help="Methods to compare with, separated by commas.")] = "",
    output: Annotated[Path | None, typer.Option(help="Folder for evaluation.json, table.md and curves.png.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of all that is drawn.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Images in a forward pass.")] = 32,
    json: Annotated[bool, typer.Option("--json", help="Print json instead of the table.")] = False,
) -> None:
    """Measure a fine-tuned model and its explanations, side by side with other methods."""
    from transformers.utils.logging import disable_progress_bar

    from .evaluation import evaluate_checkpoint

    disable_progress_bar()  # of loading the weights

    names = tuple(name.strip() for name in methods.split(",") if name.strip())
    with _reported("Run the command again to go on, if it had an --output."):
        result = evaluate_checkpoint(
            checkpoint, data, masks, names, output, images=images, seed=seed, batch_size=batch_size
        )
        typer.echo(dumps(result.to_dict()) if json else result.table())


@contextmanager
def _reported(hint: str) -> Iterator[None]:
    """Say in one line what went wrong: exit code 1, after an interruption 130."""
    from .errors import ShapleyError

    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"\nInterrupted. {hint}", err=True)
        raise typer.Exit(130) from None
    except (ShapleyError, ImportError, OSError, ValueError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from None


def main() -> None:
    """Entry point."""
    app()
