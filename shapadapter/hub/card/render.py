"""Write a card into a folder, around what the user has written."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from shapadapter.core.errors import CheckpointError
from shapadapter.core.files import write_together
from shapadapter.core.links import break_links
from shapadapter.hub.card import metadata
from shapadapter.hub.card import metadata as sections
from shapadapter.hub.card.content import sections as content
from shapadapter.hub.card.facts import OWN_PICTURE, Facts, pictures_of, repository, text, texts
from shapadapter.hub.card.results import model_index

CARD = "README.md"
PICTURES = "explanations"
LONGEST = 1_000_000
"""Characters of a card that is renewed; a longer one is left as it is."""

_BY_TOOLS = ("library_name", "base_model")
_TAGS = ("shapadapter", "explainability", "shapley-values", "attribution")


def write_card(
    folder: Path,
    config: Mapping[str, Any],
    *,
    pictures: Mapping[str, bytes] | None = None,
    name: str | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    tags: Sequence[str] = (),
    start: str | None = None,
    remote: Collection[str] = (),
) -> str | None:
    """Write `README.md`, and the pictures that it shows, so that neither is ever seen half-written.

    Args:
        folder: the adapter's.
        config: the content of its `adapter_config.json`.
        pictures: contents of pictures to be written, by name; ours that the record does not list are then removed. None
            leaves them alone.
        name: by which the adapter is loaded; by default the folder's own.
        revision: the branch on the Hub.
        subfolder: of the repository, in which the adapter is; None for the top.
        tags: to be added to the metadata.
        start: the card to go on from; by default the one in the folder.
        remote: pictures that are not in the folder, but where it is going.

    Returns:
        The text of the card; None where the one that is there cannot be read and was left as it is.
    """
    path = folder / CARD
    break_links(folder, [CARD])
    here = read_card(path) if start is None else start
    listed = _listed(config)
    if pictures is not None:
        _put_pictures(folder / PICTURES, {f: data for f, data in pictures.items() if f in listed}, listed)
    shown = [file for file in listed if (folder / PICTURES / file).is_file() or file in remote]
    facts = Facts(config, name or folder.resolve().name, revision, shown, subfolder)
    try:
        card = updated(here, facts, tags)
    except ValueError as error:
        warnings.warn(f"{path} is left as it is, because {error}.", stacklevel=2)
        return None
    write_together({path: card.encode()})
    return card


def _listed(config: Mapping[str, Any]) -> list[str]:
    return [str(picture["file"]) for picture in pictures_of(config.get("record"))]


def _put_pictures(folder: Path, new: Mapping[str, bytes], listed: Sequence[str]) -> None:
    if folder.is_symlink():
        raise CheckpointError(
            f"{folder} is a link to another folder: pictures are written into the adapter's own only."
        )
    if new:
        folder.mkdir(exist_ok=True)
        write_together({folder / file: data for file, data in new.items()})
    for path in folder.glob("explanation-*.png"):
        if OWN_PICTURE.fullmatch(path.name) and path.name not in listed:
            path.unlink(missing_ok=True)


def read_pictures(folder: Path, config: Mapping[str, Any]) -> dict[str, bytes]:
    """The pictures that a record names and that are in the folder, by name."""
    paths = [folder / PICTURES / file for file in _listed(config)]
    return {path.name: path.read_bytes() for path in paths if path.is_file() and not path.parent.is_symlink()}


def read_card(path: Path) -> str | None:
    """The text of a card, or so much of it as shows that it is too long; None where there is none."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return file.read(4 * LONGEST + 4).decode("utf-8-sig", "surrogateescape")


def card_metadata(folder: Path) -> dict[str, Any]:
    """The yaml of the card in a folder; empty where it cannot be read."""
    try:
        return metadata.read(metadata.split(read_card(folder / CARD) or "")[0])
    except ValueError:
        return {}


def updated(card: str | None, facts: Facts, tags: Sequence[str] = ()) -> str:
    """A card with what is known now.

    A card of ours is renewed section by section, except for what the user has changed. A card that is not ours keeps its
    text and gets the metadata that it lacks.

    Args:
        card: its text, None without one.
        facts: what is known.
        tags: which the user wants added.

    Raises:
        ValueError: its yaml or its text cannot be read.
    """
    whole = card or ""
    if len(whole) > LONGEST:
        raise ValueError(f"it has more than {LONGEST:,} characters")
    if any("\udc80" <= character <= "\udcff" for character in whole):
        raise ValueError("it is not in UTF-8")
    plain = whole.replace("\r\n", "\n")
    block, body = metadata.split(plain)
    theirs, ours = metadata.read(block), known(facts)
    if not body.strip() or _is_template(body):
        # What another tool has filled in of itself says nothing about the user's wishes.
        said = {key: value for key, value in theirs.items() if key not in ours or key not in _BY_TOOLS}
        found, below = metadata.filled(said, ours, {}), metadata.note(f"\n{sections.fresh(content(facts))}", ours)
    elif sections.is_ours(body):
        found = metadata.filled(theirs, ours, metadata.written(body))
        below = metadata.note(sections.merged(body, content(facts)), ours)
    else:
        missing = {key: value for key, value in ours.items() if key not in theirs}
        found, below = {**theirs, **missing}, body
    if tags:
        found = metadata.filled(found, {"tags": list(tags)}, {})
    text = f"---\n{metadata.replaced(block, found)}---\n{below}"
    return text.replace("\n", "\r\n") if "\r\n" in whole else text


def untouched(card: str) -> bool:
    """Whether a card is ours and as it was written."""
    block, body = metadata.split(card.replace("\r\n", "\n"))
    try:
        return sections.untouched(body) and metadata.untouched_of_metadata(
            metadata.read(block), metadata.written(body)
        )
    except ValueError:
        return False


def known(facts: Facts) -> dict[str, Any]:
    """The metadata that we can fill in."""
    about, base, found = facts.of("about"), facts.base, model_index(facts, facts.title)
    datasets = [*texts(about.get("dataset_tags")), *texts(about.get("dataset")), *texts(facts.of("data").get("id"))]
    kinds = [metric["type"] for metric in found[0]["results"][0]["metrics"]] if found else []
    tags = [*_TAGS, *([] if base is None else [f"base_model:adapter:{base}"])]
    tags += ["lora"] if facts.config.get("tune") == "lora" else []
    tags += ["generated_from_trainer"] if facts.of("training") else []
    values: dict[str, Any] = {
        "language": about.get("language"),
        "license": text(about.get("license")),
        "library_name": "peft",
        "base_model": base,
        "base_model_relation": None if base is None else "adapter",
        "pipeline_tag": facts.task,
        "tags": list(dict.fromkeys([*tags, *texts(about.get("tags"))])),
        "datasets": list(dict.fromkeys(name for name in datasets if repository(name))),
        "metrics": list(dict.fromkeys(kinds)),
        "model-index": found,
    }
    return {key: value for key, value in values.items() if value}


def _is_template(body: str) -> bool:
    """Whether it is an empty form that PEFT or transformers puts where there is no card."""
    form = ModelCard.from_template(ModelCardData()).text
    return _bare(body) == _bare(form)


def _bare(form: str) -> str:
    """A form without what its makers fill in: PEFT its version, transformers a sentence."""
    form = re.sub(r"### Framework versions\s+- PEFT \S+", "", form)
    form = re.sub(r"This is the model card of a 🤗 transformers model that has been pushed on the Hub\..*", "", form)
    kept, place = [], 0
    # No pattern: it would look for the end of a comment from every opening of one that has none.
    while (start := form.find("<!--", place)) >= 0 and (end := form.find("-->", start + 4)) >= 0:
        kept.append(form[place:start])
        place = end + 3
    return " ".join("".join([*kept, form[place:]]).split())
