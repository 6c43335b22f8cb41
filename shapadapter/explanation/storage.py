"""Several tensors and a few words as two files: complete, checked against each other, and read back bit for bit."""

import hashlib
import json
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from shapadapter.core.documents import fault, open_tensors, read_bytes, read_json, reading, shown
from shapadapter.core.errors import CheckpointError
from shapadapter.core.files import write_together

FORMAT = "shapadapter.explanation"
FORMAT_VERSION = 3
"""2 added standard errors, evaluations and the method, 3 the frames of originals; older files are still read."""

TENSORS_NAME = "explanation.safetensors"
JSON_NAME = "explanation.json"


class Words(TypedDict):
    """What `explanation.json` holds."""

    format_version: int
    sha256: str
    labels: list[str]
    method: NotRequired[str]
    shapadapter_version: NotRequired[str | None]


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
    if taken and _about(directory / JSON_NAME).get("format") != FORMAT:
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
    named, path = directory / JSON_NAME, directory / TENSORS_NAME
    expected = f"Expected {JSON_NAME} and {TENSORS_NAME} of an Explanation in {directory}: missing or unreadable."
    try:
        about = read_json(named)
    except CheckpointError as error:
        raise CheckpointError(f"{expected} {error}") from error
    if about.get("format") != FORMAT or not path.exists():
        raise CheckpointError(expected)
    version, writer = about.get("format_version"), about.get("shapadapter_version")
    if version not in range(1, FORMAT_VERSION + 1):
        raise CheckpointError(
            f"Expected format_version 1 to {FORMAT_VERSION} in {directory}, but shapadapter {shown(writer).strip(chr(39))} wrote "
            f"{shown(version)}. Install that version, or a later one."
        )
    if trouble := fault(about, Words, ""):
        raise CheckpointError(f"The Explanation in {directory} is incomplete: of {JSON_NAME} {trouble}.")
    with open_tensors(path):  # a header that announces more than there is, before anything is read
        data = read_bytes(path, path.stat().st_size)
    if hashlib.sha256(data).hexdigest() != about.get("sha256"):
        raise CheckpointError(
            f"{path} ({len(data)} bytes) is not the file that {JSON_NAME} describes: it was cut short, changed or "
            "belongs to another explanation."
        )
    with reading(path):
        return load_tensors(data), about


def _about(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = read_json(path)
    except CheckpointError:
        return {}
    return found


def _version() -> str | None:
    try:
        return metadata.version("shapadapter")
    except metadata.PackageNotFoundError:
        return None
