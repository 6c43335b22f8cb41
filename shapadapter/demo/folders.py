"""Result folders that are whole or not there."""

from __future__ import annotations

from pathlib import Path

from shapadapter.atomic import whole_folder
from shapadapter.errors import ShapleyError

__all__ = ["claim", "whole_folder"]

MARKER = ".shapadapter-demo"


def claim(folder: Path) -> None:
    """Make an output folder, or take one that an earlier run has made.

    Raises:
        ShapleyError: the folder holds something else, which could be overwritten.
    """
    marker = folder / MARKER
    if folder.exists() and any(folder.iterdir()) and not marker.exists():
        raise ShapleyError(f"{folder} is not empty and was not made by the demo. Choose another --output.")
    folder.mkdir(parents=True, exist_ok=True)
    marker.touch()
