"""The folder of an exported model: complete, or not there."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shapadapter.atomic import whole_folder
from shapadapter.images import image_side

from .deployed import Job

COMPANIONS = ("config.json", "preprocessor_config.json")


@contextmanager
def new_folder(folder: str | Path, names: tuple[str, ...]) -> Iterator[Path]:
    """A folder to write to, which takes its name at the end; after an error nothing of it is left.

    Args:
        folder: its name; an older export there is replaced.
        names: the files of such an export.

    Raises:
        FileExistsError: there is a file of that name, or a folder with other files in it.
        DiskFullError: there is no room for it.
    """
    final = Path(folder).resolve()
    foreign = [final.name] if final.is_file() else []
    if final.is_dir():
        foreign = sorted(path.name for path in final.iterdir() if path.name not in names)
    if foreign:
        raise FileExistsError(f"{folder} holds {foreign[0]}, which is no part of an export: choose a new folder.")
    with whole_folder(Path(folder)) as place:
        yield place


def write_companions(folder: Path, job: Job, processor: Any) -> None:
    """Write the model's config, with the names of its classes, and the settings of the image processor."""
    config: Any = copy.deepcopy(job.deployed.model.config)
    config.id2label = dict(enumerate(job.labels))
    config.label2id = {label: index for index, label in enumerate(job.labels)}
    config.architectures = [type(job.deployed.model).__name__]
    config.save_pretrained(folder)
    if processor is not None:
        image_side(processor).save_pretrained(folder)


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of each file, by name."""
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
