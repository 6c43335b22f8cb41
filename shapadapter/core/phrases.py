"""Parts of sentences: names in a list, what may have been meant, and words of others on one line."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable, Sequence

from shapadapter.core.errors import redacted

_SHOWN = 10
# What turns the direction of writing can make a name read as another one.
_DIRECTION = re.compile("[\u202a-\u202e\u2066-\u2069\u200e\u200f]")


def some(values: Iterable[object]) -> str:
    """The first ten of several values, and how many there are in all."""
    texts = [str(value) for value in values]
    more = f", ... ({len(texts)} in all)" if len(texts) > _SHOWN else ""
    return ", ".join(texts[:_SHOWN]) + more


def closest(name: str, known: Sequence[str], most: int = 3) -> list[str]:
    """The names that may have been meant: those with `name` as a word of theirs, then those spelled much alike."""
    word = re.compile(rf"(?<!\w){re.escape(name)}(?!\w)", re.IGNORECASE)
    containing = [one for one in known if name and word.search(one)]
    return list(dict.fromkeys([*containing, *difflib.get_close_matches(name, known, n=most)]))[:most]


def did_you_mean(name: str, known: Sequence[str], otherwise: str = "") -> str:
    """A question for the names that may have been meant; `otherwise` if none is near."""
    close = closest(name, known)
    return f"Did you mean {' or '.join(map(repr, close))}?" if close else otherwise


def one_line(text: object, limit: int | None = None) -> str:
    """Any value as one line of ordinary characters, without credentials, cut after `limit` characters.

    Neither a terminal nor a browser acts upon it: control characters become blanks, what has no glyph is written out.
    """
    characters = (" " if unicodedata.category(c) in ("Cc", "Zl", "Zp") else c for c in redacted(text))
    line = " ".join(_DIRECTION.sub("", "".join(characters)).split())
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
    return line if limit is None or len(line) <= limit else f"{line[: limit - 1]}…"
