"""The metadata and the sections of a card: ours as long as nobody has touched them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from itertools import accumulate
from typing import Any

import yaml

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


_BLOCK = re.compile(r"\A\s*---[ \t]*\n(.*?)^---[ \t]*(?:\n|\Z)", re.MULTILINE | re.DOTALL)
_WRITTEN = re.compile(
    r"<!-- shapadapter:metadata (\{(?:(?!<!--).)*?\}) -->\n?"
)  # from the last opening, not from each
_KEY = re.compile(r"^(?=[^\s#\-])", re.MULTILINE)  # where a line begins that names a key
_LONGEST = 50_000
"""Characters of yaml that are read, and values in it."""

_DEEPEST = 100

_LISTS = ("tags", "datasets", "metrics", "model-index")


def split(text: str) -> tuple[str, str]:
    """The yaml of a card, without its fences, and the text below; no yaml where there is none."""
    match = _BLOCK.match(text)
    return (match[1], text[match.end() :]) if match else ("", text)


def read(block: str) -> dict[str, Any]:
    """The yaml of a card as a dict.

    Raises:
        ValueError: it is no yaml, or no mapping.
    """
    if len(block) > _LONGEST:
        raise ValueError(f"the yaml at its top has more than {_LONGEST:,} characters")
    if max(accumulate((sign in "[{") - (sign in "]}") for sign in block), default=0) > _DEEPEST:
        raise ValueError(
            f"the yaml at its top is nested more than {_DEEPEST} deep"
        )  # which takes the parser long to find
    try:
        loader = yaml.SafeLoader(block)
        node = loader.get_single_node()
        if node is not None and _size(node, {}) > _LONGEST:
            raise ValueError("its aliases make it too large")
        found = None if node is None else loader.construct_document(node)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # an impossible date is a ValueError
        raise ValueError(f"the yaml at its top cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict | None):
        raise ValueError("the yaml at its top is no mapping")
    return found or {}


def _size(node: yaml.Node, known: dict[yaml.Node, int]) -> int:
    """How many values there are below a node of yaml, with each alias counted as what it stands for.

    Raises:
        ValueError: it is part of itself.
    """
    if known.setdefault(node, 0) < 0:
        raise ValueError("an alias in it stands for itself")
    if not known[node]:
        known[node] = -1
        below = [one for pair in node.value for one in (pair if isinstance(pair, tuple) else (pair,))]
        known[node] = 1 + sum(_size(one, known) for one in below if isinstance(one, yaml.Node))
    return known[node]


def written(text: str) -> dict[str, Any]:
    """Digests of what was filled in when the card was last written, by key; of lists, of each item."""
    match = _WRITTEN.search(text)
    try:
        found = json.loads(match[1]) if match else {}
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def note(text: str, ours: Mapping[str, Any]) -> str:
    """The text with a comment at its end that says, in digests, what was filled in."""
    signs = {key: [_sign(item) for item in value] if key in _LISTS else _sign(value) for key, value in ours.items()}
    return f"{_WRITTEN.sub('', text).rstrip()}\n\n<!-- shapadapter:metadata {json.dumps(signs)} -->\n"


def filled(theirs: Mapping[str, Any], ours: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """The card's metadata with ours.

    Args:
        theirs: what stands in the card.
        ours: what is known now.
        before: `written` of the card.
    """
    found = dict(theirs)
    for key, value in ours.items():
        if key not in theirs:
            if key not in before:  # else the user has deleted it
                found[key] = value
        elif key in _LISTS:
            signs = before.get(key)
            found[key] = _united(theirs[key], value, signs if isinstance(signs, list) else [])
        elif _sign(theirs[key]) == before.get(key):
            found[key] = value
    for key, signs in before.items():  # what we no longer say
        if key not in ours and key in theirs:
            rest = _united(theirs[key], [], signs) if key in _LISTS and isinstance(signs, list) else []
            if rest or (key not in _LISTS and _sign(theirs[key]) != signs):
                found[key] = rest or theirs[key]
            else:
                del found[key]
    return found


def _united(theirs: Any, ours: list[Any], before: list[str]) -> Any:
    """The user's items and ours; one of ours that is gone was deleted, one that is there but no longer said goes."""
    listed = theirs if isinstance(theirs, list) else [] if theirs is None else [theirs]
    new, there = {_sign(item) for item in ours}, {_sign(item) for item in listed}
    kept = [item for item in listed if _sign(item) in new or _sign(item) not in before]
    if any(isinstance(item, dict) for item in ours):
        # Results have a new sign when a number changes. Where the last ones are gone, the user has edited or deleted them.
        wanted = ours if not before or there & set(before) else []
    else:
        wanted = [item for item in ours if _sign(item) not in before]
    added = [item for item in wanted if _sign(item) not in there]
    return theirs if kept == listed and not added else kept + added


def replaced(block: str, metadata: Mapping[str, Any]) -> str:
    """The yaml with these values, in which keys whose values stay are left letter by letter: comments, quotes, order."""
    theirs = read(block)
    kept = []
    try:
        for part in _KEY.split(block):
            named = read(part)
            changed = any(key not in metadata or metadata[key] != named[key] for key in named)
            kept.append(_dumped({key: metadata[key] for key in named if key in metadata}) if changed else part)
        text = "".join(kept) + _dumped({key: value for key, value in metadata.items() if key not in theirs})
        if read(text) == dict(metadata):
            return text
    except ValueError:  # keys that cannot be read one by one, as those with anchors
        pass
    return _dumped(metadata)


def _dumped(metadata: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(metadata), sort_keys=False, allow_unicode=True, width=10**6) if metadata else ""


def _sign(value: Any) -> str:
    return digest(json.dumps(value, sort_keys=True, default=str))


def untouched_of_metadata(theirs: Mapping[str, Any], before: Mapping[str, Any]) -> bool:
    """Whether metadata holds what was filled in, and nothing else."""
    signs = {key: [_sign(item) for item in value] if key in _LISTS else _sign(value) for key, value in theirs.items()}
    return signs == dict(before)
