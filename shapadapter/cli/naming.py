"""Which files are images, and what the files about them are called: names of others, of which nothing is believed."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

MARK = ".attribution"
"""Stands in front of the suffix of what is written for an image, so that it replaces nobody's picture."""

LONGEST = 60


def find_images(given: list[Path]) -> dict[Path, Path]:
    """Files as they were given, and the images in folders, in order of their names; each with its place in the folder.

    Links to folders are not followed, and neither hidden files nor what this command wrote are images.

    Raises:
        ShapleyError: a folder has no images.
    """
    from shapadapter.errors import ShapleyError

    found: dict[Path, Path] = {}
    for path in given:
        inside = _images_below(path) if path.is_dir() else [path]
        if not inside:
            raise ShapleyError(f"There are no images in the folder {printable(path)}.")
        for image in inside:
            found.setdefault(image, image.relative_to(path) if path.is_dir() else Path(path.name))
    return found


def _images_below(folder: Path) -> list[Path]:
    from shapadapter.evaluation.checkpoint import IMAGE_SUFFIXES

    files = [Path(place, name) for place, _, names in os.walk(folder) for name in names if not name.startswith(".")]
    return sorted(
        path for path in files if path.suffix.lower() in IMAGE_SUFFIXES and not path.stem.lower().endswith(MARK)
    )


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
