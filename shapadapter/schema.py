"""What a value may be, said by a type: one check for the fields of every file that is read, and of every plain object.

A schema is a type hint: `list[int]`, `dict[str, float]`, `Literal[...]`, a `TypedDict` for a whole document, and
`Annotated[int, Between(1, 9)]` for a range. Numbers are finite and of at most 64 bits, and texts can be written as UTF-8.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Set
from dataclasses import dataclass, is_dataclass
from functools import cache
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NotRequired, Union, get_args, get_origin, get_type_hints, is_typeddict

LARGEST = 2**64
"""Whole numbers beyond it are no counts, sizes or seeds."""

_LONE = re.compile(r"[\ud800-\udfff]")
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
    """A range, ends included, of a number or of the length of a text, list or dict.

    Attributes:
        low: the smallest.
        high: the largest.
    """

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
    """What is wrong with a value, as the end of a sentence without its point; None if nothing is.

    Args:
        value: what came.
        kind: what is expected, a type hint.
        name: of the value, for the sentence; empty for a whole document.
    """
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
        return f"a list of which each is {described(parts[0])}"
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
        return isinstance(value, str) and not _LONE.search(value)
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
