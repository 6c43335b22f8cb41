"""README.md: one generated block between two marks, yaml above it, and whatever the user wrote around both.

The begin mark holds a digest of the block, and a comment in the block those of the metadata that were filled in: what no
longer agrees with its digest was edited, and is the user's. Earlier cards had a pair of marks for each section.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from shapadapter.core.files import break_links, write_together
from shapadapter.core.phrases import one_line
from shapadapter.core.remote import CARD, PICTURES
from shapadapter.hub.card import content
from shapadapter.hub.card.facts import Facts

LONGEST = 1_000_000  # characters of a card that is renewed; a longer one is left as it is
_LONGEST_YAML = 50_000  # characters of yaml that are read, and values in it
_DEEPEST = 100
_LISTS = ("tags", "datasets", "metrics", "model-index")
_BY_TOOLS = ("library_name", "base_model")

_BEGIN = re.compile(r"^<!-- shapadapter:begin (\w+)", re.MULTILINE)
_BLOCK = re.compile(  # line by line, and not past the next beginning: the time grows with the text, not with its square
    r"^<!-- shapadapter:begin (\w+) ([0-9a-f]{12}) -->\n((?:(?!<!-- shapadapter:begin ).*\n)*?)<!-- shapadapter:end \1 -->$",
    re.MULTILINE,
)
_NOTE = re.compile(r"<!-- shapadapter:metadata (\{(?:(?!<!--).)*?\}) -->\n?")  # from the last opening, not from each
_NOTE_OF_ANY_FORM = re.compile(r"<!-- shapadapter:metadata (?:(?!<!--).)*? -->", re.DOTALL)
_YAML = re.compile(r"\A\s*---[ \t]*\n(.*?)^---[ \t]*(?:\n|\Z)", re.MULTILINE | re.DOTALL)
_KEY = re.compile(r"^(?=[^\s#\-])", re.MULTILINE)  # where a line begins that names a key


def write_card(
    folder: Path,
    config: Mapping[str, Any],
    *,
    name: str | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    tags: Sequence[str] = (),
    start: str | None = None,
    remote: Collection[str] = (),
) -> str | None:
    """Write `README.md`, so that it is never seen half-written; the one place where a card is rendered."""
    path = folder / CARD
    break_links(folder, [CARD])
    there = [file.name for file in (folder / PICTURES).glob("*") if file.is_file()]
    facts = Facts(config, name or folder.resolve().name, revision, [*there, *remote], subfolder)
    try:
        card = renewed(
            read_card(path) if start is None else start, content.markdown(facts), content.metadata(facts), tags
        )
    except ValueError as error:
        warnings.warn(f"{path} is left as it is, because {error}.", stacklevel=2)
        return None
    if edited(card):
        warnings.warn(
            f"What is between the marks in {path} was edited and is left as it is. To have it renewed, move your own words "
            "below the end mark and delete what is between the marks.",
            stacklevel=2,
        )
    write_together({path: card.encode()})
    return card


def read_card(path: Path) -> str | None:
    """The text of a card, or so much of it as shows that it is too long; None where there is none."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return file.read(4 * LONGEST + 4).decode("utf-8-sig", "surrogateescape")


def card_metadata(folder: Path) -> dict[str, Any]:
    """The yaml of the card in a folder; empty where it cannot be read."""
    try:
        return read_yaml(split(read_card(folder / CARD) or "")[0])
    except ValueError:
        return {}


# -- the text ---------------------------------------------------------------------------------------------------------


def renewed(card: str | None, markdown: str, metadata: Mapping[str, Any], tags: Sequence[str] = ()) -> str:
    """A card with this block and these metadata.

    A card that is not ours keeps its text and gets the metadata that it lacks.
    """
    given = card or ""
    if len(given) > LONGEST:
        raise ValueError(f"it has more than {LONGEST:,} characters")
    if any("\udc80" <= character <= "\udcff" for character in given):
        raise ValueError("it is not in UTF-8")
    head, body = split(given.replace("\r\n", "\n"))
    theirs = read_yaml(head)
    if not body.strip() or _plain(body) == _plain(ModelCard.from_template(ModelCardData()).text):
        # What another tool has filled in of itself says nothing about the user's wishes.
        theirs = {key: value for key, value in theirs.items() if key not in metadata or key not in _BY_TOOLS}
        found, body = _filled(theirs, metadata, {}), f"\n{_block(markdown, metadata)}\n"
    elif _BEGIN.search(body):
        found = _filled(theirs, metadata, _noted(body))
        body = _with_block(body, markdown, metadata)
    else:
        found = {**theirs, **{key: value for key, value in metadata.items() if key not in theirs}}
    if tags:
        found = _filled(found, {"tags": list(tags)}, {})
    card = f"---\n{_written(head, found)}---\n{body}"
    return card.replace("\n", "\r\n") if "\r\n" in given else card


def untouched(card: str) -> bool:
    """Whether a card is ours, and nobody has changed or added anything since it was written."""
    head, body = split(card.replace("\r\n", "\n"))
    try:
        signs = {key: _signs(key, value) for key, value in read_yaml(head).items()}
    except ValueError:
        return False

    def in_any_order(found: Mapping[str, Any]) -> dict[str, Any]:
        return {key: sorted(map(str, one)) if isinstance(one, list) else one for key, one in found.items()}

    around = _NOTE_OF_ANY_FORM.sub("", _BLOCK.sub("", body)).strip()
    as_filled = in_any_order(signs) == in_any_order(_noted(body))
    return bool(_BEGIN.search(body)) and not around and not edited(card) and as_filled


def edited(card: str) -> bool:
    """Whether somebody has changed what is between the marks."""
    return any(_is_edited(match) for match in _BLOCK.finditer(card.replace("\r\n", "\n")))


def _is_edited(match: re.Match[str]) -> bool:
    return bool(match[3].strip()) and _digest(match[3]) != match[2]


# -- the block --------------------------------------------------------------------------------------------------------


def _block(markdown: str, metadata: Mapping[str, Any]) -> str:
    note = json.dumps({key: _signs(key, value) for key, value in metadata.items()})
    return (
        f"<!-- shapadapter:begin card {_digest(markdown)} -->\n\n{markdown.strip()}\n\n"
        f"<!-- shapadapter:metadata {note} -->\n<!-- shapadapter:end card -->"
    )


def _with_block(body: str, markdown: str, metadata: Mapping[str, Any]) -> str:
    """The text with the block as it is now; sections of earlier cards go into it, unless the user has edited them."""
    placed = False

    def put(match: re.Match[str]) -> str:
        nonlocal placed
        if _is_edited(match):
            return match[0] if match[1] == "card" else match[3].strip("\n")
        if placed:
            return "\0"
        placed = True
        return _block(markdown, metadata)

    if _NOTE.search(_BLOCK.sub("", body)):  # earlier cards had it at the end of the text
        body = _BLOCK.sub(put, _NOTE.sub("", body))
        return re.sub(r"\s*\0", "", body).rstrip() + "\n"
    return _BLOCK.sub(put, body)


def _digest(text: str) -> str:
    """Of a text, in which blanks at the ends of lines and our note do not count."""
    lines = [line.rstrip() for line in _NOTE_OF_ANY_FORM.sub("", text).strip().split("\n")]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]


def _plain(form: str) -> str:
    """A card's empty form, as tools write it, without comments and what they fill in: PEFT its version, transformers a sentence."""
    form = re.sub(r"### Framework versions\s+- PEFT \S+", "", form)
    form = re.sub(r"This is the model card of a 🤗 transformers model that has been pushed on the Hub\..*", "", form)
    kept, place = [], 0
    # No pattern: it would look for the end of a comment from every opening of one that has none.
    while (start := form.find("<!--", place)) >= 0 and (end := form.find("-->", start + 4)) >= 0:
        kept.append(form[place:start])
        place = end + 3
    return " ".join("".join([*kept, form[place:]]).split())


# -- the metadata -----------------------------------------------------------------------------------------------------


def split(text: str) -> tuple[str, str]:
    """The yaml of a card, without its fences, and the text below; no yaml where there is none."""
    match = _YAML.match(text)
    return (match[1], text[match.end() :]) if match else ("", text)


def read_yaml(block: str) -> dict[str, Any]:
    """The yaml of a card as a dict."""
    if len(block) > _LONGEST_YAML:
        raise ValueError(f"the yaml at its top has more than {_LONGEST_YAML:,} characters")
    # Which takes the parser long to find.
    if max(accumulate((sign in "[{") - (sign in "]}") for sign in block), default=0) > _DEEPEST:
        raise ValueError(f"the yaml at its top is nested more than {_DEEPEST} deep")
    try:
        loader = yaml.SafeLoader(block)
        node = loader.get_single_node()
        if node is not None and _size(node, {}) > _LONGEST_YAML:
            raise ValueError("its aliases make it too large")
        found = None if node is None else loader.construct_document(node)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # an impossible date is a ValueError
        raise ValueError(f"the yaml at its top cannot be read: {one_line(error)}") from error
    if not isinstance(found, dict | None):
        raise ValueError("the yaml at its top is no mapping")
    return found or {}


def _size(node: yaml.Node, known: dict[yaml.Node, int]) -> int:
    """How many values there are below a node, with each alias counted as what it stands for."""
    if known.setdefault(node, 0) < 0:
        raise ValueError("an alias in it stands for itself")
    if not known[node]:
        known[node] = -1
        below = [one for pair in node.value for one in (pair if isinstance(pair, tuple) else (pair,))]
        known[node] = 1 + sum(_size(one, known) for one in below if isinstance(one, yaml.Node))
    return known[node]


def _noted(text: str) -> dict[str, Any]:
    """Digests of the metadata that were filled in when the card was last written, by key; of lists, of each item."""
    match = _NOTE.search(text)
    try:
        found = json.loads(match[1]) if match else {}
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _filled(theirs: Mapping[str, Any], ours: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata in the card, with ours where the user has neither changed nor deleted what was filled in `before`."""
    found = dict(theirs)
    for key in dict.fromkeys([*ours, *before]):
        if key not in theirs:
            if key not in before:  # else the user has deleted it
                found[key] = ours[key]
            continue
        if key in _LISTS:
            signs = before.get(key)
            found[key] = _united(theirs[key], ours.get(key, []), signs if isinstance(signs, list) else [])
        elif _sign(theirs[key]) == before.get(key):
            found[key] = ours.get(key)
        else:
            continue
        if key not in ours and not found[key]:  # what we no longer say
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


def _written(block: str, metadata: Mapping[str, Any]) -> str:
    """The yaml with these values, in which keys whose values stay are left letter by letter: comments, quotes, order."""
    theirs, kept = read_yaml(block), []
    try:
        for part in _KEY.split(block):
            named = read_yaml(part)
            changed = any(key not in metadata or metadata[key] != named[key] for key in named)
            kept.append(_dumped({key: metadata[key] for key in named if key in metadata}) if changed else part)
        text = "".join(kept) + _dumped({key: value for key, value in metadata.items() if key not in theirs})
        if read_yaml(text) == dict(metadata):
            return text
    except ValueError:  # keys that cannot be read one by one, as those with anchors
        pass
    return _dumped(metadata)


def _dumped(metadata: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(metadata), sort_keys=False, allow_unicode=True, width=10**6) if metadata else ""


def _signs(key: str, value: Any) -> Any:
    return [_sign(item) for item in value] if key in _LISTS and isinstance(value, list) else _sign(value)


def _sign(value: Any) -> str:
    return _digest(json.dumps(value, sort_keys=True, default=str))
