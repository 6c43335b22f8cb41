"""What leaves a folder for the Hub or for a Space: files of known names, and no code."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from shapadapter.files import refuse_link
from shapadapter.reading import read_json


def copy_files(folder: Path | None, target: Path, patterns: Sequence[str]) -> None:
    """Copy those files of a folder that match a pattern; of no folder none.

    Raises:
        CheckpointError: one of them is a link out of the folder.
    """
    if folder is None:
        return
    for path in sorted(path for pattern in patterns for path in folder.glob(pattern) if path.is_file()):
        refuse_link(path, folder)
        copy = target / path.relative_to(folder)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)


def own_code(base: Path) -> list[str]:
    """The files of code in the folder of a base model without which it cannot be loaded; others there do not count.

    Raises:
        CheckpointError: its configuration is damaged.
    """
    named = str(read_json(base / "config.json").get("auto_map"))
    return sorted(path.name for path in base.glob("*.py") if f"'{path.stem}." in named)
