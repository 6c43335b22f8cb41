"""Files that anybody may have written: read, checked against a type, and what is wrong with them in one sentence."""

from __future__ import annotations

import json
import math
import re
import stat
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
from functools import cache
from itertools import accumulate
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NotRequired, Union, get_args, get_origin, get_type_hints, is_typeddict
from zipfile import BadZipFile

from safetensors import SafetensorError, safe_open

from shapadapter.core.errors import CheckpointError, ShapleyError
from shapadapter.core.phrases import one_line

LARGEST = 2**64
"""Whole numbers beyond it are no counts, sizes or seeds."""

_SURROGATE = re.compile(r"[\ud800-\udfff]")
_WORDS = {
    bool: "True or False",
    int: "a whole number",
    float: "a finite number",
    str: "a text in UTF-8",
    NoneType: "None",
    Any: "anything",
}


@dataclass(frozen=True)
class Between:
    """A range, ends included, of a number or of the length of a text, list or dict."""

    low: float
    high: float = math.inf

    def words(self, kind: Any) -> str:
        """The range in words, after those of what is in it."""
        of = "" if kind in (int, float) else " of length"
        return f"{of} {self.low:,} or more" if self.high == math.inf else f"{of} {self.low:,} to {self.high:,}"

    def holds(self, value: Any) -> bool:
        """Whether the value is in it."""
        size: Any = value if isinstance(value, Real) else len(value)
        return bool(self.low <= size <= self.high)


class FileName:
    """Marks a text as the name of a file, which may hold bytes that are no UTF-8."""


def fault(value: Any, kind: Any, name: str) -> str | None:
    """What is wrong with a value, as the end of a sentence without its point; None if nothing is."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _marked(value, parts[0], parts[1:], name)
    if origin in (Union, UnionType):
        return _one_of(value, parts, name)
    if is_typeddict(kind):
        return _document(value, kind, name)
    inner = {list: _items, tuple: _places, dict: _pairs}.get(origin)
    if inner is not None:
        return inner(value, parts, name)
    return None if _is(value, kind, origin, parts) else _wrong(value, kind, name)


def described(kind: Any) -> str:
    """A type hint in words."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        ranges = [mark for mark in parts[1:] if isinstance(mark, Between)]
        return described(parts[0]) + "".join(mark.words(parts[0]) for mark in ranges)
    if origin is Literal:
        return f"one of {list(parts)}"
    if origin in (Union, UnionType):
        words = [described(part) for part in sorted(parts, key=lambda part: part is NoneType)]
        return " or ".join(dict.fromkeys(words))
    if origin is tuple and Ellipsis not in parts:
        return f"({', '.join(described(part) for part in parts)})"
    if origin in (list, tuple) and parts:
        return f"a list whose items are each {described(parts[0])}"
    if origin is dict or kind is dict or is_typeddict(kind) or is_dataclass(kind):
        return "a mapping"
    return _WORDS.get(kind) or f"a {getattr(kind, '__name__', kind)}"


def shown(value: Any) -> str:
    """A value in a sentence: short, printable, and whatever it is."""
    if isinstance(value, str):
        return ascii(value if len(value) <= 60 else f"{value[:57]}...")
    if isinstance(value, int) and not -LARGEST <= value <= LARGEST:
        return "a whole number of more than 64 bits"
    if value is None or isinstance(value, bool | int | float):
        return repr(value)
    if isinstance(value, list | tuple | Set | Mapping) and not value:
        return repr(value)
    if isinstance(value, list | tuple) and len(value) <= 4 and all(isinstance(v, bool | Real | str) for v in value):
        return f"{'[' if isinstance(value, list) else '('}{', '.join(map(shown, value))}{']' if isinstance(value, list) else ')'}"
    return f"a {type(value).__name__}"


def _is(value: Any, kind: Any, origin: Any, parts: tuple[Any, ...]) -> bool:
    """Whether a value is of a kind without parts of its own."""
    if kind is Any:
        return True
    if origin is Literal:
        plain = [part for part in parts if isinstance(part, bool) == isinstance(value, bool)]  # True is 1
        return any(isinstance(value, type(part)) and value == part for part in plain)
    if kind is bool or kind is NoneType or kind is None:
        return isinstance(value, bool if kind is bool else NoneType)
    if kind in (int, float):
        if isinstance(value, bool) or not isinstance(value, Integral if kind is int else Real):
            return False
        return abs(int(value)) <= LARGEST if isinstance(value, Integral) else math.isfinite(value)
    if kind is str:
        return isinstance(value, str) and not _SURROGATE.search(value)
    # What is a dataclass in Python is a mapping in a file.
    return isinstance(value, kind) or ((is_dataclass(kind) or kind is dict) and isinstance(value, Mapping))


def _marked(value: Any, kind: Any, marks: tuple[Any, ...], name: str) -> str | None:
    if FileName in marks and isinstance(value, str):
        value = re.sub(r"[\udc80-\udcff]", "?", value)  # how Python writes bytes of a file's name that are no UTF-8
    trouble = fault(value, kind, name)
    outside = trouble is None and any(isinstance(mark, Between) and not mark.holds(value) for mark in marks)
    return _wrong(value, Annotated[(kind, *marks)], name) if outside else trouble


def _one_of(value: Any, parts: tuple[Any, ...], name: str) -> str | None:
    troubles = [fault(value, part, name) for part in parts]
    if None in troubles:
        return None
    real = [trouble for trouble, part in zip(troubles, parts, strict=True) if part is not NoneType]
    # With one way of being there, what is wrong inside says more.
    return real[0] if len(real) == 1 else _wrong(value, Union[parts], name)  # noqa: UP007


def _document(value: Any, kind: Any, name: str) -> str | None:
    if not isinstance(value, Mapping):
        return _wrong(value, kind, name)
    hints = _hints(kind)
    missing = [key for key, (_, required) in hints.items() if required and key not in value]
    if missing:
        return f"{name or 'it'} lacks {missing[0]!r}"
    inside = {key: f"{name}[{key!r}]" if name else key for key in hints}
    return _first(fault(value[key], of, inside[key]) for key, (of, _) in hints.items() if key in value)


def _items(value: Any, parts: tuple[Any, ...], name: str) -> str | None:
    if not isinstance(value, list | tuple | Set):
        return _wrong(value, list[parts], name)  # type: ignore[valid-type]
    return _first(fault(item, parts[0], f"{name}[{index}]") for index, item in enumerate(value))


def _places(value: Any, parts: tuple[Any, ...], name: str) -> str | None:
    if Ellipsis in parts:
        return _items(value, parts[:1], name)
    if not isinstance(value, list | tuple) or len(value) != len(parts):
        return _wrong(value, tuple[parts], name)  # type: ignore[valid-type]
    return _first(fault(item, part, f"{name}[{i}]") for i, (item, part) in enumerate(zip(value, parts, strict=True)))


def _pairs(value: Any, parts: tuple[Any, ...], name: str) -> str | None:
    if not isinstance(value, Mapping):
        return _wrong(value, dict, name)
    keys = _first(fault(key, parts[0], f"a key of {name or 'it'}") for key in value)
    return keys or _first(fault(item, parts[1], f"{name}[{shown(key)}]") for key, item in value.items())


def _wrong(value: Any, kind: Any, name: str) -> str:
    return f"{name or 'it'} must be {described(kind)}, got {shown(value)}"


def _first(troubles: Any) -> str | None:
    return next((trouble for trouble in troubles if trouble is not None), None)


@cache
def _hints(kind: Any) -> dict[str, tuple[Any, bool]]:
    """The fields of a document: what each is, and whether it has to be there."""
    hints = get_type_hints(kind, include_extras=True)
    optional = {key: get_args(hint)[0] for key, hint in hints.items() if get_origin(hint) is NotRequired}
    return {key: (optional.get(key, hint), key not in optional) for key, hint in hints.items()}


DOCUMENT_BYTES = 64_000_000
"""More than any json or yaml that belongs to an adapter: class names, numbers and words, no pictures."""

_YAML_BYTES = 1_000_000
"""Options that a person wrote."""

_DEPTH = 64
"""Nested deeper is nothing that we write; what copies or compares it would run out of stack."""

# Surrogates without their pair, but those that stand for bytes in the names of files.
_HALF_CHARACTER = re.compile(r"[\ud800-\udc7f\udd00-\udfff]")

_KINDS = {stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a pipe", stat.S_ISSOCK: "a socket"}


@contextmanager
def reading(path: Path | str) -> Iterator[None]:
    """Say of whatever a reader of a file may raise which file it was."""
    try:
        yield
    except ShapleyError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(f"There is no file {path}.") from error
    except MemoryError as error:
        raise CheckpointError(
            f"{path} is damaged and cannot be read: its declared size does not fit into memory."
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
            f"{path} is damaged and cannot be read ({one_line(error, 200) or type(error).__name__}): it was cut short or changed. Fetch or make it again."
        ) from error


def check_regular(path: Path) -> None:
    """Refuse what is no plain file: a pipe or a device may never end, or never begin."""
    with reading(path):
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            kind = next((words for test, words in _KINDS.items() if test(mode)), "a device")
            raise CheckpointError(f"{path} is {kind} and cannot be read: expected a file.")


def read_bytes(path: Path, limit: int = DOCUMENT_BYTES) -> bytes:
    """The content of a plain file."""
    check_regular(path)
    with reading(path), path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise CheckpointError(f"{path} cannot be read: no file of its kind is longer than {limit / 1e6:,.0f} MB.")
    return content


def read_json(path: Path, kind: Any = dict[str, Any]) -> Any:
    """The content of a json file, checked."""
    content = read_bytes(path)
    with reading(path):
        return checked(json.loads(content.decode("utf-8-sig")), kind, path)


def read_yaml(path: Path) -> Any:
    """The content of a yaml file, of plain values; None if it is empty."""
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
    """What was read from a file, if it is plain and of the kind."""
    trouble = _unplain(value) or fault(value, kind, "")
    if trouble is not None:
        raise CheckpointError(f"{path} is damaged: {trouble}.")
    return value


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """A safetensors file as `safetensors.safe_open` gives it, whose header fits its length."""
    check_regular(path)
    with reading(path), safe_open(path, framework="pt") as file:
        yield file


def read_tensors(path: Path) -> dict[str, Any]:
    """All tensors of a safetensors file, by name, on the CPU."""
    with open_tensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - the file is no dictionary


def _unplain(value: Any) -> str | None:
    """What json or yaml can hold and nothing here can use: endless numbers and nesting, halves of characters."""
    seen, level = set[int](), [value]
    for _ in range(_DEPTH):
        below: list[Any] = []
        for one in level:
            if isinstance(one, str) and _HALF_CHARACTER.search(one):
                return "a text in it holds an unpaired surrogate"
            if isinstance(one, int) and not -LARGEST <= one <= LARGEST:
                return "a number in it has more than 64 bits"
            if isinstance(one, Mapping | list | tuple | set) and id(one) not in seen:  # yaml may name one many times
                seen.add(id(one))
                below += [*one, *one.values()] if isinstance(one, Mapping) else one
        if not below:
            return None
        level = below
    return "it is nested too deeply"
