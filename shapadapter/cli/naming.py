"""Which files are images, and what the files about them are called: names of others, of which nothing is believed."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

MARK = ".attribution"
"""Stands in front of the suffix of what is written for an image, so that it replaces nobody's picture."""

LONGEST = 60


def find_images(given: list[Path]) -> list[Path]:
    """Files as they were given, and the images in folders, in order of their names; each once.

    Links to folders are not followed, and neither hidden files nor what this command wrote are images.

    Raises:
        ShapleyError: a folder has no images.
    """
    from shapadapter.errors import ShapleyError

    found: list[Path] = []
    for path in given:
        if not path.is_dir():
            found.append(path)
            continue
        inside = _images_below(path)
        if not inside:
            raise ShapleyError(f"There are no images in the folder {printable(path)}.")
        found += inside
    return list(dict.fromkeys(found))


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

    def of(self, path: Path) -> str:
        """A name for what is written about `path`, without suffix: letters, digits, `-`, `_` and `.` of its own name."""
        text = unicodedata.normalize("NFC", printable(Path(path.stem)))
        kept = "".join(c if c.isalnum() or c in "-_." else "_" for c in text).lstrip(".-")[:LONGEST] or "image"
        name, number = kept, 1
        while name.casefold() in self.taken:
            number += 1
            name = f"{kept}-{number}"
        self.taken.add(name.casefold())
        return f"{name}{MARK}"
