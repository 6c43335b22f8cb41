"""Checkpoints on disk: which of them are whole, what is wrong with the others, and which may go."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath
from typing import Annotated, Literal, TypedDict

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints

from shapadapter.core.documents import Between, FileName, open_tensors, read_json, reading, shown
from shapadapter.core.errors import CheckpointError
from shapadapter.core.files import to_disk, write_together
from shapadapter.core.remote import CARD, PICTURES

MANIFEST = "complete.json"
"""Written last: the names, sizes and hashes of all other files of a checkpoint."""

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")


class Entry(TypedDict):
    """What a file must be."""

    bytes: Annotated[int, Between(0)]
    sha256: str


class Manifest(TypedDict):
    """What `complete.json` holds."""

    format: Literal["shapadapter.checkpoint"]
    format_version: Literal[1]
    files: Annotated[dict[Annotated[str, FileName], Entry], Between(1)]


def seal(folder: Path) -> None:
    """Declare a checkpoint whole: every file of it is on the disk, and `complete.json` says what they must be.

    Of the model card and its pictures it says nothing: they may be edited, and nothing is loaded from them.

    Raises:
        OSError: If a file cannot be brought to the disk; there is no `complete.json` then.
    """
    about: dict[str, Entry] = {}
    for path in _files(folder):
        to_disk(path)
        if _is_card(path.relative_to(folder)):
            continue
        about[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": _hash(path)}
    whole: Manifest = {"format": "shapadapter.checkpoint", "format_version": 1, "files": about}
    write_together({folder / MANIFEST: json.dumps(whole, indent=2).encode()})


def resealed(folder: Path, name: str, content: bytes) -> dict[Path, bytes]:
    """What to write so that one file of a whole checkpoint gets another content, and the checkpoint stays whole.

    Args:
        folder: a checkpoint, a folder in one, or any other folder, in which only the file is written.
        name: of the file.
        content: the new one.

    Returns:
        Contents of files, by path.
    """
    found = {folder / name: content}
    # An adapter that is not called "default" is in a folder of the checkpoint.
    whole = next((place for place in (folder, folder.parent) if (place / MANIFEST).exists()), None)
    if whole is not None and trouble_with(whole) is None:
        about = read_json(whole / MANIFEST)
        inside = (folder / name).relative_to(whole).as_posix()
        about["files"][inside] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        found[whole / MANIFEST] = json.dumps(about, indent=2).encode()
    return found


def trouble_with(folder: Path) -> str | None:
    """What keeps a checkpoint from being whole, by the name of the file; None if it is."""
    if not folder.is_dir():
        return "there is no such folder"
    if not (folder / MANIFEST).exists():
        return f"{MANIFEST} is missing, so it was not saved to its end"
    try:
        expected = read_json(folder / MANIFEST, Manifest)["files"]
        strangers = [name for name in expected if not _is_inside(name)]
        if strangers:
            return f"{MANIFEST} names {shown(strangers[0])}, which is no file of the checkpoint"
        names = (path.relative_to(folder).as_posix() for path in _files(folder) if path.suffix in _WEIGHTS)
        unnamed = [name for name in names if name not in expected]
        if unnamed:
            return f"{MANIFEST} says nothing of {unnamed[0]}, which was put there or changed later"
        # Sizes first: a file that was cut off is found without reading the large ones before it.
        for check in (_length_trouble, _content_trouble):
            for name, about in expected.items():
                if not _is_card(Path(name)) and (trouble := check(folder / name, about)):
                    return f"{name} {trouble}"
    except (OSError, CheckpointError) as error:
        return f"{MANIFEST} or a file that it names cannot be read ({error})"
    return None


def unreadable_in(folder: Path) -> str | None:
    """What is visibly wrong with a checkpoint without `complete.json`, which another trainer may have saved.

    The trainer's state is the last file that transformers writes. A changed number inside a readable file is not found.
    """
    if not folder.is_dir():
        return "there is no such folder"
    if not (folder / TRAINER_STATE_NAME).is_file():
        return f"{MANIFEST} and {TRAINER_STATE_NAME} are missing, so it was not saved to its end"
    for path in _files(folder):
        try:
            _read(path)
        except (OSError, CheckpointError) as error:
            return f"{path.relative_to(folder).as_posix()} cannot be read ({error})"
    return None


def newest_first(run: Path) -> list[Path]:
    """The folders `checkpoint-<step>` of a run, the highest step first, whole or not."""
    if not run.is_dir():
        return []
    steps = {
        path: re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name) for path in run.iterdir() if path.is_dir()
    }
    found = {path: int(match[1]) for path, match in steps.items() if match}
    return sorted(found, key=lambda path: found[path], reverse=True)


def last_whole_checkpoint(output_dir: str | Path) -> str | None:
    """The newest whole checkpoint of a run; those that it passes over are named in warnings.

    `trainer.train(resume_from_checkpoint=last_whole_checkpoint("out"))` goes on where a run stopped, and starts it where
    there is nothing to go on from.

    Args:
        output_dir: the run's `output_dir`.

    Returns:
        The checkpoint's path, or None if there is no whole one.
    """
    for folder in newest_first(Path(output_dir)):
        trouble = trouble_with(folder)
        if trouble is None:
            return str(folder)
        warn_passed_over(folder, trouble)
    return None


def warn_passed_over(folder: Path, trouble: str) -> None:
    """Name a checkpoint that is not used, and why."""
    warnings.warn(f"Passing over {folder}: {trouble}.", stacklevel=2)


def rotate(run: Path, limit: int | None, keep: set[Path]) -> None:
    """Delete what exceeds `save_total_limit`: folders that are not whole first, then the oldest.

    Args:
        run: The run's folder.
        limit: How many checkpoints may stay; None or 0 for all.
        keep: Checkpoints that must stay: the one just saved, and the best.
    """
    if not limit or limit < 0:
        return
    folders = [Path(path) for path in sort_checkpoints(str(run), use_mtime=True)]  # the oldest first
    folders.sort(key=lambda folder: (folder / MANIFEST).exists())
    spare = [folder for folder in folders if folder not in keep]
    for folder in spare[: max(0, len(folders) - max(limit, len(keep)))]:
        discard(folder)


def discard(folder: Path) -> None:
    """Delete a checkpoint as far as possible, its `complete.json` first, so that no half of it looks whole."""
    if folder.is_dir():
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)


def _files(folder: Path) -> Iterator[Path]:
    """All files below a checkpoint but its own manifest; sharded ones have subfolders."""
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / MANIFEST)


def _is_card(path: Path) -> bool:
    """Whether a file of a checkpoint, by its path in it, is for people alone."""
    return path.name == CARD or path.parent.name == PICTURES


def _is_inside(name: str) -> bool:
    """Whether a name in a manifest is that of a file below the checkpoint, whatever system wrote it."""
    path = PureWindowsPath(name)  # knows both kinds of slashes, and drives
    return bool(path.parts) and not path.anchor and ".." not in path.parts and "\0" not in name


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _length_trouble(path: Path, about: Entry) -> str | None:
    if not path.is_file():
        return "is missing"
    length = path.stat().st_size
    return None if length == about["bytes"] else f"has {length:,} bytes instead of {about['bytes']:,}"


def _content_trouble(path: Path, about: Entry) -> str | None:
    return None if _hash(path) == about["sha256"] else "holds other bytes than were saved"


def _read(path: Path) -> None:
    """Read a file as far as its format shows damage.

    Raises:
        CheckpointError: It is damaged, or cannot be read.
    """
    if path.suffix == ".json":
        with reading(path):
            json.loads(path.read_text(encoding="utf-8"))
    elif path.suffix == ".safetensors":
        with open_tensors(path):  # compares the header with the file's length
            pass
    elif path.suffix in _WEIGHTS:
        # What torch.save writes, with a checksum for each part.
        with reading(path), zipfile.ZipFile(path) as file:
            damaged = file.testzip()
            if damaged:
                raise ValueError(f"{damaged} in it is damaged")
