"""Several tensors and a few words as two files: complete, checked against each other, and read back bit for bit."""

import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from shapadapter.errors import CheckpointError

FORMAT = "shapadapter.explanation"
FORMAT_VERSION = 2
"""2 added standard errors, evaluations and the method; a file of version 1 has none of them and is still read."""

TENSORS_NAME = "explanation.safetensors"
JSON_NAME = "explanation.json"


def write_explanation(directory: Path, tensors: Mapping[str, Tensor], words: Mapping[str, Any]) -> None:
    """Write `explanation.safetensors` and `explanation.json`.

    Args:
        directory: Created if missing.
        tensors: By name.
        words: What json can hold, by name.

    Raises:
        FileExistsError: If a file of one of the two names is there that is not part of an explanation.
    """
    taken = [name for name in (TENSORS_NAME, JSON_NAME) if (directory / name).exists()]
    if taken and _read_json(directory / JSON_NAME).get("format") != FORMAT:
        raise FileExistsError(f"{directory / taken[0]} is not part of an Explanation: move it or save elsewhere.")
    # Cloned, because safetensors refuses tensors that share memory.
    data = save_tensors({name: value.clone().contiguous() for name, value in tensors.items()})
    about = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "shapadapter_version": _version(),
        "sha256": hashlib.sha256(data).hexdigest(),
        **words,
    }
    directory.mkdir(parents=True, exist_ok=True)
    write_together({directory / JSON_NAME: json.dumps(about, indent=2).encode(), directory / TENSORS_NAME: data})


def read_explanation(directory: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_explanation` wrote.

    Args:
        directory: The directory given to it.

    Returns:
        The tensors and the words, with the format's own words among them.

    Raises:
        CheckpointError: If a file is missing, damaged, of a newer version or does not belong to the other.
    """
    about, path = _read_json(directory / JSON_NAME), directory / TENSORS_NAME
    if about.get("format") != FORMAT or not path.is_file():
        raise CheckpointError(
            f"Expected {JSON_NAME} and {TENSORS_NAME} of an Explanation in {directory}: missing or unreadable."
        )
    version, writer = about.get("format_version"), about.get("shapadapter_version")
    if version not in range(1, FORMAT_VERSION + 1):
        raise CheckpointError(
            f"Expected format_version 1 to {FORMAT_VERSION} in {directory}, but shapadapter {writer} wrote "
            f"{version!r}. Install that version, or a later one."
        )
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != about.get("sha256"):
        raise CheckpointError(
            f"{path} ({len(data)} bytes) is not the file that {JSON_NAME} describes: it was cut short, changed or "
            "belongs to another explanation."
        )
    try:
        return load_tensors(data), about
    except SafetensorError as error:
        raise CheckpointError(f"The Explanation in {directory} is incomplete: {error}") from error


def write_together(contents: Mapping[Path, bytes]) -> None:
    """Write several files so that none is ever seen half-written: each takes its name when all are complete.

    Args:
        contents: What to write, by path. The parent directories must exist.

    Raises:
        OSError: If a file could not be written; those that were there before are then unchanged.
    """
    staged = {path: path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp") for path in contents}
    try:
        for path, temporary in staged.items():
            temporary.write_bytes(contents[path])
            to_disk(temporary)
        for path, temporary in staged.items():
            temporary.replace(path)
    finally:
        for temporary in staged.values():
            temporary.unlink(missing_ok=True)


def to_disk(path: Path) -> None:
    """Wait until a file is on the disk: a power cut loses nothing of it then, and a full network disk has said so.

    Raises:
        OSError: If it cannot be brought there.
    """
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _version() -> str | None:
    try:
        return metadata.version("shapadapter")
    except metadata.PackageNotFoundError:
        return None
