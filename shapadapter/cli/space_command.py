"""`shapadapter space`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from shapadapter.cli.messages import reporting
from shapadapter.cli.options import Checkpoint, Config, Json, Revision

EXAMPLE = "shapadapter space out space && python space/app.py"


def command(
    context: typer.Context,
    checkpoint: Checkpoint,
    output: Annotated[Path, typer.Argument(help="Folder for the app.", show_default=False)],
    title: Annotated[str | None, typer.Option(help="Heading of the app.")] = None,
    examples: Annotated[
        list[Path] | None, typer.Option("--example", help="An image that visitors can click; may be repeated.")
    ] = None,
    license_: Annotated[
        str | None, typer.Option("--license", help="Such as apache-2.0; by default that of the adapter's card.")
    ] = None,
    copy_base: Annotated[
        bool, typer.Option("--copy-base", help="Copy the base model into it where that is a folder of your own.")
    ] = False,
    revision: Revision = None,
    push: Annotated[
        str | None, typer.Option(metavar="REPO", help="Push it as this Space, too, e.g. you/vit-beans.")
    ] = None,
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="For a Space that is made now.", show_default=False)
    ] = None,
    json: Json = False,
    config: Config = None,
) -> None:
    """Write a Gradio app that shows why: it runs here, and as a Space of the Hugging Face Hub."""
    with reporting(context, json) as say:
        from shapadapter.hub.space import push_space, write_space

        folder = write_space(
            checkpoint,
            output,
            revision=revision,
            title=title,
            license=license_,
            copy_base=copy_base,
            examples=examples or (),
        )
        url = push_space(folder, push, private=private) if push else None
        say({"folder": str(folder), "url": url}, f"Wrote {folder}. {url or f'Try it: {_start(folder)}'}")


def _start(folder: Path) -> str:
    """What to type to see the app, and before it what installs gradio where that is missing."""
    install = f"pip install -r {folder}/requirements.txt && " if find_spec("gradio") is None else ""
    return f"{install}python {folder}/app.py"
