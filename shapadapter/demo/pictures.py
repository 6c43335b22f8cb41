"""Some test scenes as files, in the folders that `shapadapter evaluate` takes."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from .digits import NAMES, DigitScenes
from .folders import whole_folder

SAVED = 100


def save_pictures(scenes: DigitScenes, output: Path) -> None:
    """Write `test/<class>/<number>.png` and, with the digit white on black, `masks/<class>/<number>.png`."""
    _, test = scenes.split()
    for kind, pictures in (("test", scenes.images), ("masks", scenes.masks)):
        with whole_folder(output / kind) as folder:
            for number, index in enumerate(test[:SAVED]):
                place = folder / NAMES[scenes.labels[index]]
                place.mkdir(exist_ok=True)
                Image.fromarray(pictures[index]).save(place / f"{number}.png")
