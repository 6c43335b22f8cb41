"""Parts of sentences: names in a list, what may have been meant, and words of others on one line."""

from __future__ import annotations

import difflib
import re
import shlex
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from shapadapter.core.errors import redacted

_SHOWN = 10
# What turns the direction of writing can make a name read as another one.
_DIRECTION = re.compile("[\u061c\u202a-\u202e\u2066-\u2069\u200e\u200f]")


def some(values: Iterable[object]) -> str:
    """The first ten of several values, and how many there are in all."""
    texts = [str(value) for value in values]
    more = f", ... ({len(texts)} in all)" if len(texts) > _SHOWN else ""
    return ", ".join(texts[:_SHOWN]) + more


def did_you_mean(name: str, known: Sequence[str], otherwise: str = "") -> str:
    """A question for up to three names that have `name` as a word, or are spelled much alike; `otherwise` without any."""
    word = re.compile(rf"(?<!\w){re.escape(name)}(?!\w)", re.IGNORECASE)
    containing = [one for one in known if name and word.search(one)]
    close = list(dict.fromkeys([*containing, *difflib.get_close_matches(name, known)]))[:3]
    return f"Did you mean {' or '.join(map(repr, close))}?" if close else otherwise


def one_line(text: object, limit: int | None = None) -> str:
    """Any value as one line of ordinary characters, without credentials, cut after `limit` characters.

    Neither a terminal nor a browser acts upon it: control characters become blanks, what has no glyph is written out.
    """
    characters = (" " if unicodedata.category(c) in ("Cc", "Zl", "Zp") else c for c in redacted(text))
    line = " ".join(_DIRECTION.sub("", "".join(characters)).split())
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
    return line if limit is None or len(line) <= limit else f"{line[: limit - 1]}…"


def reason(error: BaseException) -> str:
    """The first line of what an error says; its class where it says nothing."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)[:300]


_OPTIONS: ContextVar[Mapping[str, str]] = ContextVar("options", default={})  # noqa: B039 - never written to


@contextmanager
def as_options(options: Mapping[str, str]) -> Iterator[None]:
    """Within it, `argument` names the options of a command, by the arguments that they are handed over as."""
    before = _OPTIONS.set(options)
    try:
        yield
    finally:
        _OPTIONS.reset(before)


def argument(name: str, value: Any = ..., of: str | None = None) -> str:
    """What to type to pass an argument: `base='x'`, or `load(..., base='x')` in Python; `--base x` for a command.

    A value that is left to the reader is `...`, or `[...]` for several. Values are quoted for a shell: names come from
    strangers, too, and what is said is pasted there.
    """
    open_value = "..." if value is ... else "[...]" if value == [...] else None
    option = _OPTIONS.get().get(name)
    if option is None:
        typed = f"{name}={open_value or repr(value)}"
        return typed if of is None else f"{of}(..., {typed})"
    if value is True:
        return option
    return f"{option} {'...' if open_value else shlex.quote(str(value))}"
