"""`shapadapter export`, `card`, `push` and `space`: what others get of an adapter."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from shapadapter.cli.options import (
    OUTPUT,
    PLACE,
    Checkpoint,
    Folder,
    Refine,
    Revision,
    Say,
    Texts,
    TrustRemoteCode,
    command,
    quiet,
    without,
)
from shapadapter.cli.outputs import find_images

_MOST_IMAGES = 32


@command(place=without(PLACE, "device", "dtype"))
def export(
    say: Say,
    checkpoint: Checkpoint,
    output: Annotated[Path, typer.Argument(help="Folder for the files.")],
    images: Annotated[
        list[Path],
        typer.Option(help=f"An image, or a folder of them, to compare on, the first {_MOST_IMAGES}; may be repeated."),
    ],
    to: Annotated[Literal["onnx", "torch"], typer.Option(help="ONNX, or torch's own ExportedProgram.")] = "onnx",
    texts: Texts = None,
    *,
    place: dict[str, Any],
) -> None:
    """Export model and explanations in one file: logits, attributions and null values, for any number of images.

    The file gives the attributions of one forward pass. What it computes is compared with the model on the images, and nothing is written if it differs.
    """
    from shapadapter.export import export_onnx, export_program
    from shapadapter.hub.load import load

    quiet()
    chosen = list(find_images(images))[:_MOST_IMAGES]
    model, processor = load(checkpoint, device="cpu", **place)
    exporter: Any = export_onnx if to == "onnx" else export_program
    result = exporter(model, output, images=chosen, processor=processor, texts=texts or None)
    say(result.to_dict(), f"Wrote {result}")


@command()
def card(
    say: Say,
    checkpoint: Folder,
    evaluation: Annotated[
        Path | None, typer.Option(help="evaluation.json of `shapadapter evaluate`, for the table of results.")
    ] = None,
    images: Annotated[
        list[Path] | None,
        typer.Option(help="An image, or a folder of them, for the pictures of the card; may be repeated."),
    ] = None,
    shown: Annotated[int, typer.Option(help="How many of the images are shown, spread evenly.", min=1)] = 4,
    refine: Refine = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write the model card of an adapter, with results and pictures; what you wrote in it stays."""
    from shapadapter.hub.card.renewal import update_card

    quiet()
    found = list(find_images(images)) if images else None
    chosen = found and found[:: max(1, len(found) // shown)][:shown]
    told: dict[str, Any] = {"refine": refine, "trust_remote_code": trust_remote_code}
    written = update_card(checkpoint, evaluation=evaluation, images=chosen, **told)
    say({"card": str(written)}, f"Wrote {written}.")


@command("Run the command again: what was uploaded is not uploaded twice.")
def push(
    say: Say,
    checkpoint: Folder,
    repo: Annotated[str, typer.Argument(help="Repository on the Hub, e.g. you/vit-beans.")],
    base_repo: Annotated[
        str | None,
        typer.Option(help="Repository for the base model, if it is a folder of your own; pushed beside it."),
    ] = None,
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="For a repository that is made now.", show_default=False)
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch to push to.", **OUTPUT)] = None,
    pr: Annotated[bool, typer.Option("--pr", help="Open a pull request instead.", **OUTPUT)] = False,
    message: Annotated[str | None, typer.Option(help="Of the commit.", **OUTPUT)] = None,
) -> None:
    """Push an adapter to the Hub, with its card, pictures and processor.

    The token is that of `hf auth login`, or of the variable HF_TOKEN; it is never an option, where others could read it.
    """
    from shapadapter import hub

    url = hub.push(
        checkpoint,
        repo,
        base_repo_id=base_repo,
        private=private,
        revision=revision,
        create_pr=pr,
        commit_message=message,
    )
    say({"url": url}, url)


@command()
def space(
    say: Say,
    checkpoint: Checkpoint,
    output: Annotated[Path, typer.Argument(help="Folder for the app.")],
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
) -> None:
    """Write a Gradio app that shows why: it runs here, and as a Space of the Hugging Face Hub."""
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
    install = f"pip install -r {folder}/requirements.txt && " if find_spec("gradio") is None else ""
    say({"folder": str(folder), "url": url}, f"Wrote {folder}. {url or f'Try it: {install}python {folder}/app.py'}")
