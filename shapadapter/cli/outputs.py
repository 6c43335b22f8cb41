"""Files of the command line: which files are images, and what is written about them."""

from __future__ import annotations

import io
import json
import os
import unicodedata
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from shapadapter import __version__
from shapadapter.core.files import atomic_file, remove_leftovers, report_full_disk, write_together

if TYPE_CHECKING:
    from shapadapter.explanation.explanation import Explanation

MARK = ".attribution"
"""Stands in front of the suffix of what is written for an image, so that it replaces nobody's picture."""

LONGEST = 60


def find_images(given: list[Path]) -> dict[Path, Path]:
    """Files as they were given, and the images in folders, in order of their names; each with its place in the folder.

    Links to folders are not followed, and neither hidden files nor what this command wrote are images.
    """
    from shapadapter.core.errors import ShapleyError
    from shapadapter.evaluation.dataset import IMAGE_SUFFIXES

    found: dict[Path, Path] = {}
    for path in given:
        if not path.is_dir():
            found.setdefault(path, Path(path.name))
            continue
        files = [Path(place, name) for place, _, names in os.walk(path) for name in names if not name.startswith(".")]
        images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
        inside = sorted(image for image in images if not image.stem.lower().endswith(MARK))
        if not inside:
            raise ShapleyError(f"There are no images in the folder {printable(path)}.")
        for image in inside:
            found.setdefault(image, image.relative_to(path))
    return found


def printable(path: Path) -> str:
    """A path as text that any file can hold: what is no UTF-8 in it is written out."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


class Names:
    """Names for the files about images, without folders, each given once, whatever the case of its letters."""

    def __init__(self) -> None:
        self.taken: set[str] = set()

    def of(self, place: Path) -> str:
        """A name, without suffix, for what is written about the image at a place in a folder: ants/1.jpg gives ants-1.

        Letters, digits, `-`, `_` and `.` are kept, of a long name the end.
        """
        text = unicodedata.normalize("NFC", "-".join(map(printable, map(Path, place.with_suffix("").parts))))
        kept = "".join(c if c.isalnum() or c in "-_." else "_" for c in text)[-LONGEST:].lstrip(".-") or "image"
        name, number = kept, 1
        while name.casefold() in self.taken:
            number += 1
            name = f"{kept}-{number}"
        self.taken.add(name.casefold())
        return f"{name}{MARK}"


FORMAT, FORMAT_VERSION = "shapadapter.explain", 1
PAGE_IMAGES = 100  # images on a page; more make a second one


@contextmanager
def writing(output: Path | None, formats: frozenset[str], checkpoint: str, stream: TextIO | None) -> Iterator[Written]:
    """A folder of explanations, and json on a stream; after an error no half page or json, and no new empty folder."""
    made = [] if output is None else [folder for folder in (output, *output.parents) if not folder.exists()]
    target = Path("the standard output") if output is None else output / "explanations.json"
    try:
        with ExitStack() as stack:
            documents = [] if stream is None else [JsonDocument(stream, checkpoint, target)]
            if output is not None:
                output.mkdir(parents=True, exist_ok=True)
                remove_leftovers(output)
                if "json" in formats:
                    file = stack.enter_context(atomic_file(target))
                    handle = stack.enter_context(file.open("x", encoding="ascii"))
                    documents.append(JsonDocument(handle, checkpoint, target))
            written = Written(output, formats, checkpoint, documents)
            yield written
            written.finish()
    finally:
        with suppress(OSError):  # not empty
            for folder in made:
                folder.rmdir()


class Written:
    """What has been written about images, and what could not be explained."""

    def __init__(
        self, output: Path | None, formats: frozenset[str], checkpoint: str, documents: list[JsonDocument]
    ) -> None:
        self.output, self.checkpoint, self.documents = output, checkpoint, documents
        self.formats = frozenset[str]() if output is None else formats
        self.count, self.errors, self.names = 0, list[dict[str, str]](), Names()
        self.levels = set[str]()
        self.page: list[tuple[str, Explanation]] = []
        self.pages = 0

    def add(self, path: Path, place: Path, one: Explanation, image: Any) -> str | None:
        """Write what belongs to an image; returns what is wrong with its numbers, if they cannot be shown."""
        from shapadapter.visual.wording import level, method_name

        name, shown = self.names.of(place), printable(path)
        contents: dict[str, bytes] = {}
        try:
            if "png" in self.formats:
                contents[f"{name}.png"] = picture(one, image)
            if "npz" in self.formats:
                contents[f"{name}.npz"] = _archive(one)
        except ValueError as error:  # not finite
            return self.refuse(path, error)
        if self.output is not None:
            write_together({self.output / file: content for file, content in contents.items()}, tidy=False)
        about = one.to_dict()
        about |= {"level": level([one]), **about.pop("images")[0]}
        self.levels.add(method_name(one.method))
        for document in self.documents:
            document.add({"path": shown, "files": sorted(contents), **about})
        self.count += 1
        if self.output is not None and "html" in self.formats:
            self.page.append((shown, one))
            if len(self.page) == PAGE_IMAGES:
                self._write_page(self.output)
        return None

    def refuse(self, path: Path, error: Exception) -> str:
        """Note an image that could not be explained; returns why."""
        trouble = str(error).encode("utf-8", "backslashreplace").decode()  # it may name a file
        self.errors.append({"path": printable(path), "error": trouble})
        return trouble

    def finish(self) -> None:
        """Write the last page and the end of the json."""
        if self.page and self.output is not None:
            self._write_page(self.output)
        for document in self.documents:
            document.finish(self.errors)

    def _write_page(self, output: Path) -> None:
        from shapadapter.visual import write_page

        self.pages += 1
        file = output / ("explanations.html" if self.pages == 1 else f"explanations-{self.pages}.html")
        names, explanations = zip(*self.page, strict=True)
        write_page(explanations, file, title=f"Explained by {self.checkpoint}", names=names)
        self.page.clear()


class JsonDocument:
    """One json object whose list of images grows on the way."""

    def __init__(self, handle: TextIO, checkpoint: str, target: Path) -> None:
        self.handle, self.target = handle, target
        head = {"format": FORMAT, "format_version": FORMAT_VERSION, "shapadapter_version": __version__}
        self.before = json.dumps({**head, "checkpoint": checkpoint})[:-1] + ', "images": [\n'

    def add(self, image: dict[str, Any]) -> None:
        """Write an image."""
        with report_full_disk(self.target):
            self.handle.write(self.before + json.dumps(image, allow_nan=False))
        self.before = ",\n"

    def finish(self, errors: list[dict[str, str]]) -> None:
        """Write what could not be explained, and the end."""
        start = "" if self.before == ",\n" else self.before
        with report_full_disk(self.target):
            self.handle.write(start + '\n], "errors": ' + json.dumps(errors) + "}\n")
            self.handle.flush()


def _archive(one: Explanation) -> bytes:
    """The numbers about one image as npz, without its pixels; no pickle in it."""
    import numpy as np

    # (1, ...) -> (...), for there is one image
    arrays = {name: values[0] for name, values in one.to_numpy().items() if name != "images"}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, labels=np.array([one.labels[index] for index in arrays["classes"]]), **arrays)
    return buffer.getvalue()


def picture(one: Explanation, image: Any) -> bytes:
    """A figure of one image as png, on the whole image where that can be."""
    buffer = io.BytesIO()
    original = None if one.frames is None or one.frames.isnan().any() else image
    one.figure(original=original).savefig(buffer, format="png")
    return buffer.getvalue()
