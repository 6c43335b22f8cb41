"""Words of others inside Markdown: shown as they are written, never read as markup."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from shapadapter.errors import redacted

# What orders the direction of writing can make a name read as another one.
_DIRECTION = re.compile("[\u202a-\u202e\u2066-\u2069\u200e\u200f]")
_BAR = "\N{DIVIDES}"
_LONG = 80


def one_line(text: Any, limit: int = _LONG) -> str:
    """Any value as one line of ordinary characters, without credentials, cut where it is long."""
    characters = (" " if unicodedata.category(c) in ("Cc", "Zl", "Zp") else c for c in redacted(text))
    known = "".join(characters).encode("utf-8", "replace").decode("utf-8")  # a lone surrogate cannot be written
    line = " ".join(_DIRECTION.sub("", known).split())
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


def code(text: Any, limit: int = _LONG) -> str:
    """A code span, in which Markdown reads nothing: no link, picture, tag or entity."""
    line = one_line(text, limit)
    if not line:
        return "(empty)"
    fence = "`" * (max((len(run) for run in re.findall("`+", line)), default=0) + 1)
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def words(text: Any, limit: int = _LONG) -> str:
    """Ordinary text for a heading or a picture's description, every sign of Markdown and HTML escaped."""
    line = one_line(text, limit).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]#|~!$^@:])", r"\\\1", line)


def table(rows: Sequence[Sequence[str]], head: Sequence[str]) -> str:
    """A table of cells that are Markdown already."""
    lines = [head, ["---"] * len(head), *rows]
    # A bar would end the cell, and GFM has no escape for it that a backslash before it could not undo.
    return "\n".join(f"| {' | '.join(cell.replace('|', _BAR) for cell in line)} |" for line in lines)
