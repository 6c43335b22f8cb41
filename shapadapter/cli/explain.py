"""`shapadapter explain`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shapadapter.cli.options import OUTPUT, PLACE, Checkpoint, Refine, Say, Texts, command, quiet, warn
from shapadapter.cli.outputs import Written, find_images, printable
from shapadapter.core.phrases import one_line

if TYPE_CHECKING:
    from shapadapter.explanation.explanation import Explanation


FORMATS = ("png", "html", "json", "npz")
_BOTH = "forward and backward pass"


@command("The pictures written so far are complete.", place=PLACE)
def explain(
    say: Say,
    checkpoint: Checkpoint,
    images: Annotated[list[Path], typer.Argument(help="Images, and folders of images.")],
    output: Annotated[
        Path | None, typer.Option(help="Folder for the files; by default 'explanations', with --json none.", **OUTPUT)
    ] = None,
    formats: Annotated[
        str, typer.Option("--format", help=f"What to write: {', '.join(FORMATS)}.", **OUTPUT)
    ] = "png,html",
    top_k: Annotated[int, typer.Option(help="How many of the likeliest classes are explained.", min=1)] = 3,
    targets: Annotated[
        list[str] | None, typer.Option(help="A class to explain instead, by name or number; may be repeated.")
    ] = None,
    texts: Texts = None,
    refine: Refine = None,
    seed: Annotated[int, typer.Option(help="Seed of the refinement.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Images in a forward pass.", min=1)] = 16,
    *,
    place: dict[str, Any],
) -> None:
    """Predict images and explain why: pictures, a page, or numbers; folders are searched to the bottom.

    What is written names the level of the maps: one forward pass, forward and backward pass, or refined.

    What cannot be read is named, the others are explained all the same, and the exit code is 1.
    """
    from shapadapter.cli.outputs import writing
    from shapadapter.hub.level import Explainer
    from shapadapter.hub.load import called, load

    wanted, output = _formats(formats), output or (None if say.as_json else Path("explanations"))
    paths = find_images(images)
    quiet()
    model, processor = load(checkpoint, **place)
    asked = {"texts": texts or None, "seed": seed, **_classes(model, texts, targets, top_k)}
    # Coalitions depend on an image's place: explained alone, an image gets the same ones whatever stands beside it.
    size = batch_size if refine in (None, 0, "gradient") else 1
    stream = say.stream if say.as_json else None
    with writing(output, wanted, called(checkpoint, place["subfolder"]), stream) as written:
        explained = _explained(partial(Explainer(refine, warn), model), processor, list(paths), size, asked)
        _write(written, paths, explained, None if say.as_json else say)
        if output is not None:
            there = f" in {output}" if written.count else ""
            made = f": {' or '.join(sorted(written.levels))}" if written.count else ""
            off = " (--refine 0 for one forward pass)" if refine is None and _BOTH in written.levels else ""
            warn(f"{written.count} of {len(paths)} images explained{there}{made}{off}.")
    if written.errors:
        raise typer.Exit(1)


def _write(written: Written, paths: dict[Path, Path], explained: Iterator[Any], say: Say | None) -> None:
    """Write what each image gives, and say it unless the output is json."""
    from shapadapter.visual.wording import likelihood

    for path, image, found in explained:
        if isinstance(found, Exception):
            trouble: str | None = written.refuse(path, found)
        else:
            trouble = written.add(path, paths[path], found, image)
        if trouble is not None:
            warn(trouble if repr(os.fspath(path)) in trouble else f"{printable(path)}: {trouble}")
        elif say is not None:
            best = (f"{one_line(one.label)} {likelihood(one.probability, one.logit)}" for one in found.top(3)[0])
            say(None, f"{one_line(printable(path))}: {', '.join(best)}")


def _formats(given: str) -> frozenset[str]:
    names = [name.strip().lower() for name in given.split(",") if name.strip()]
    for name in names:
        if name not in FORMATS:
            raise typer.BadParameter(f"Choose from {', '.join(FORMATS)}, got {name!r}.", param_hint="--format")
    return frozenset(names)


def _classes(model: Any, texts: list[str] | None, targets: list[str] | None, top_k: int) -> dict[str, Any]:
    """What `explain` is told about the classes to show: a number means an index, unless a class is called so."""
    if not targets:
        return {"top_k": top_k}
    labels = set(texts or map(str, model.config.id2label.values()))
    return {"targets": [int(name) if name.isdecimal() and name not in labels else name for name in targets]}


def _explained(
    explain: Callable[..., Explanation], processor: Any, paths: list[Path], size: int, asked: dict[str, Any]
) -> Iterator[tuple[Path, Any, Explanation | Exception]]:
    """Each path with its image and explanation, or with what is wrong with it; never more than a batch in memory."""
    from tqdm.auto import tqdm

    from shapadapter.core.errors import ImageError, UnreadableImageError
    from shapadapter.data.images import open_image

    with tqdm(total=len(paths), unit=" images", disable=None, leave=False) as bar:
        for start in range(0, len(paths), size):
            opened: dict[Path, Any] = {}
            for path in paths[start : start + size]:
                try:
                    if path.exists() and not path.is_file():  # a pipe would wait for ever
                        raise UnreadableImageError("It is no file.")
                    opened[path] = open_image(os.fspath(path))
                except (ImageError, OSError) as error:
                    yield path, None, error
            try:
                listed = list(opened.values())
                together: Any = explain(listed, processor, **asked) if listed else []
                yield from ((path, image, together[index]) for index, (path, image) in enumerate(opened.items()))
            except ImageError:  # of different sizes, or one of them is of a kind the model cannot take
                for path, image in opened.items():
                    try:
                        yield path, image, explain([image], processor, **asked)
                    except ImageError as error:
                        yield path, image, error
            bar.update(min(size, len(paths) - start))
