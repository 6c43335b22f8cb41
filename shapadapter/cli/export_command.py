"""`shapadapter export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from shapadapter.cli.messages import quiet, reporting
from shapadapter.cli.options import Base, Checkpoint, Config, Json, Revision, Subfolder, TrustRemoteCode
from shapadapter.cli.outputs import find_images

EXAMPLE = "shapadapter export out onnx --to onnx --images photos"
MOST_IMAGES = 32


def command(
    context: typer.Context,
    checkpoint: Checkpoint,
    output: Annotated[Path, typer.Argument(help="Folder for the files.", show_default=False)],
    images: Annotated[
        list[Path],
        typer.Option(
            help=f"An image, or a folder of them, to compare on, the first {MOST_IMAGES}; may be repeated.",
            show_default=False,
        ),
    ],
    to: Annotated[Literal["onnx", "torch"], typer.Option(help="ONNX, or torch's own ExportedProgram.")] = "onnx",
    texts: Annotated[
        list[str] | None, typer.Option(help="A text, for a model that matches images with texts; may be repeated.")
    ] = None,
    subfolder: Subfolder = None,
    base: Base = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
    config: Config = None,
) -> None:
    """Export model and explanations in one file: logits, attributions and null values, for any number of images.

    What the file computes is compared with the model on the images, and nothing is written if it differs.
    """
    with reporting(context, json) as say:
        from shapadapter.hub.load import load

        quiet()
        chosen = list(find_images(images))[:MOST_IMAGES]
        place: dict[str, Any] = {"subfolder": subfolder, "base": base, "revision": revision}
        model, processor = load(checkpoint, device="cpu", trust_remote_code=trust_remote_code, **place)
        result: Any = _exporter(to)(model, output, images=chosen, processor=processor, texts=texts or None)
        say(result.to_dict(), f"Wrote {result}")


def _exporter(to: str) -> Any:
    from shapadapter.export import export_onnx, export_program

    return export_onnx if to == "onnx" else export_program
