"""Open files that anybody may have written: what is wrong with one is said in one sentence, with its name."""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

from safetensors import SafetensorError, safe_open

from .errors import CheckpointError, ShapleyError
from .schema import LARGEST, fault

DOCUMENT_BYTES = 64_000_000
"""More than any json or yaml that belongs to an adapter: class names, numbers and words, no pictures."""

_YAML_BYTES = 1_000_000
"""Options that a person wrote."""

_DEPTH = 64
"""Nested deeper is nothing that we write; what copies or compares it would run out of stack."""

# Surrogates without their pair, but those that stand for bytes in the names of files.
_LONE = re.compile(r"[\ud800-\udc7f\udd00-\udfff]")

_KINDS = {stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a pipe", stat.S_ISSOCK: "a socket"}


@contextmanager
def reading(path: Path | str) -> Iterator[None]:
    """Say of whatever a reader of a file may raise which file it was.

    Raises:
        CheckpointError: in place of what was raised.
    """
    try:
        yield
    except ShapleyError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(f"There is no file {path}.") from error
    except MemoryError as error:
        raise CheckpointError(
            f"{path} is damaged and cannot be read: what it announces does not fit into memory."
        ) from error
    except RecursionError as error:
        raise CheckpointError(f"{path} is damaged and cannot be read: it is nested too deeply.") from error
    except (
        OSError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        ArithmeticError,
        SafetensorError,
        BadZipFile,
    ) as error:
        raise CheckpointError(
            f"{path} is damaged and cannot be read ({_told(error)}): it was cut short or changed. Fetch or make it again."
        ) from error


def check_regular(path: Path) -> None:
    """Refuse what is no plain file: a pipe or a device may never end, or never begin.

    Raises:
        CheckpointError: it is none, or not there.
    """
    with reading(path):
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            kind = next((words for test, words in _KINDS.items() if test(mode)), "a device")
            raise CheckpointError(f"{path} is {kind} and cannot be read: expected a file.")


def read_bytes(path: Path, limit: int = DOCUMENT_BYTES) -> bytes:
    """The content of a plain file.

    Raises:
        CheckpointError: it is no plain file, cannot be read, or is longer than `limit` bytes.
    """
    check_regular(path)
    with reading(path), path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise CheckpointError(f"{path} cannot be read: no file of its kind is longer than {limit / 1e6:,.0f} MB.")
    return content


def read_json(path: Path, kind: Any = dict[str, Any]) -> Any:
    """The content of a json file, checked.

    Args:
        path: of the file.
        kind: its schema, a type hint; see `shapadapter.schema`.

    Raises:
        CheckpointError: it cannot be read, or is not of that kind.
    """
    content = read_bytes(path)
    with reading(path):
        return checked(json.loads(content.decode("utf-8-sig")), kind, path)


def read_yaml(path: Path) -> Any:
    """The content of a yaml file, of plain values; None if it is empty.

    Raises:
        CheckpointError: it cannot be read.
        yaml.constructor.ConstructorError: it asks for more than plain values.
    """
    import yaml

    content = read_bytes(path, _YAML_BYTES)
    with reading(path):
        text = content.decode("utf-8-sig")
        # The parser's time grows with the square of what is open.
        if max(accumulate((c in "[{") - (c in "]}") for c in text), default=0) > _DEPTH:
            raise RecursionError
        try:
            return checked(yaml.safe_load(text), Any, path)
        except yaml.constructor.ConstructorError:
            raise
        except yaml.YAMLError as error:
            raise ValueError(str(error)) from error


def checked(value: Any, kind: Any, path: Path) -> Any:
    """What was read from a file, if it is plain and of the kind.

    Raises:
        CheckpointError: it is not.
    """
    trouble = _unplain(value) or fault(value, kind, "")
    if trouble is not None:
        raise CheckpointError(f"{path} is damaged: {trouble}.")
    return value


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """A safetensors file as `safetensors.safe_open` gives it, whose header fits its length.

    Raises:
        CheckpointError: it is no plain file, or damaged.
    """
    check_regular(path)
    with reading(path), safe_open(path, framework="pt") as file:
        yield file


def read_tensors(path: Path) -> dict[str, Any]:
    """All tensors of a safetensors file, by name, on the CPU.

    Raises:
        CheckpointError: it is no plain file, or damaged.
    """
    with open_tensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - the file is no dictionary


def _unplain(value: Any) -> str | None:
    """What json or yaml can hold and nothing here can use: endless numbers and nesting, halves of characters."""
    seen, level = set[int](), [value]
    for _ in range(_DEPTH):
        below: list[Any] = []
        for one in level:
            if isinstance(one, str) and _LONE.search(one):
                return "a text in it holds half of a character (a lone surrogate)"
            if isinstance(one, int) and not -LARGEST <= one <= LARGEST:
                return "a number in it has more than 64 bits"
            if isinstance(one, Mapping | list | tuple | set) and id(one) not in seen:  # yaml may name one many times
                seen.add(id(one))
                below += [*one, *one.values()] if isinstance(one, Mapping) else one
        if not below:
            return None
        level = below
    return "it is nested too deeply"


def _told(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
