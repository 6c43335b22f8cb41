"""Result folders that are whole or not there."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shapadapter.errors import ShapleyError

MARKER = ".shapadapter-demo"


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that takes the place of `path`, replacing what is there, when the block ends without error.

    It is called as `path` is, because a model card says by which name its folder is loaded. An interruption leaves `path`
    as it was and nothing else behind.
    """
    around, old = path.with_name(f".{path.name}.unfinished"), path.with_name(f".{path.name}.old")
    temporary = around / path.name
    shutil.rmtree(around, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(around, ignore_errors=True)
        raise
    # Two renames and then the deletion: at no point is there half a folder under the name.
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
    temporary.rename(path)
    around.rmdir()
    shutil.rmtree(old, ignore_errors=True)


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
