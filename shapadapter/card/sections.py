"""The text of a card: sections that are ours as long as nobody has touched them, and everything else, which is the user's."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping

_BEGIN = re.compile(r"^<!-- shapadapter:begin (\w+)", re.MULTILINE)
_SECTION = re.compile(  # line by line, and not past the next beginning: the time grows with the text, not with its square
    r"^<!-- shapadapter:begin (\w+) ([0-9a-f]{12}) -->\n((?:(?!<!-- shapadapter:begin ).*\n)*?)<!-- shapadapter:end \1 -->$",
    re.MULTILINE,
)


def digest(text: str) -> str:
    """By what a text is recognised that nobody has edited; blanks at the ends of lines are no edit."""
    lines = [line.rstrip() for line in text.strip().split("\n")]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]


def is_ours(text: str) -> bool:
    """Whether any section of a card is, or was, written by shapadapter."""
    return _BEGIN.search(text) is not None


def fresh(sections: Mapping[str, str]) -> str:
    """A new text of sections by name. One with nothing to say is there as well, so that it is known not to be deleted."""
    return "\n\n".join(_marked(name, text) for name, text in sections.items()) + "\n"


def merged(text: str, sections: Mapping[str, str]) -> str:
    """An existing text of ours with what its untouched sections say now.

    What the user edited stays; what the user deleted stays away; what the user wrote around the sections stays as it is.

    Args:
        text: of the card, with plain line ends.
        sections: new texts by name.
    """

    def renewed(match: re.Match[str]) -> str:
        """A section as it is to be: new if nobody has touched it."""
        name, sign, old = match.groups()
        return _marked(name, sections[name]) if name in sections and digest(old) == sign else match[0]

    return _SECTION.sub(renewed, text)


def untouched(text: str) -> bool:
    """Whether a card's text holds our sections, all of them as they were written, and nothing else."""
    whole = all(digest(match[3]) == match[2] for match in _SECTION.finditer(text))
    return (
        is_ours(text)
        and whole
        and not re.sub(r"<!-- shapadapter:metadata (?:(?!<!--).)*? -->", "", _SECTION.sub("", text)).strip()
    )


def _marked(name: str, text: str) -> str:
    body = f"\n{text.strip()}\n\n" if text.strip() else ""
    return f"<!-- shapadapter:begin {name} {digest(text)} -->\n{body}<!-- shapadapter:end {name} -->"
