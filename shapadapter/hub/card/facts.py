"""What a card can say: the content of `adapter_config.json` with its record, and words of others made harmless."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shapadapter.adapter.saving import OWN_PICTURE
from shapadapter.core.documents import fault
from shapadapter.core.phrases import one_line

_BAR = "\N{DIVIDES}"
LONG = 80


def code(text: Any, limit: int = LONG) -> str:
    """A code span, in which Markdown reads nothing: no link, picture, tag or entity."""
    line = one_line(text, limit)
    if not line:
        return "(empty)"
    fence = "`" * (max((len(run) for run in re.findall("`+", line)), default=0) + 1)
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def words(text: Any, limit: int = LONG) -> str:
    """Ordinary text for a heading or a picture's description, every character of Markdown and HTML escaped."""
    line = one_line(text, limit).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]#|~!$^@:])", r"\\\1", line)


def table(rows: Sequence[Sequence[str]], head: Sequence[str]) -> str:
    """A table of cells that are Markdown already."""
    lines = [head, ["---"] * len(head), *rows]
    # A bar would end the cell, and GFM has no escape for it that a backslash before it could not undo.
    return "\n".join(f"| {' | '.join(cell.replace('|', _BAR) for cell in line)} |" for line in lines)


# As huggingface_hub allows names of repositories.
_REPOSITORY = re.compile(r"[A-Za-z0-9_][\w.-]{0,95}(/[A-Za-z0-9_][\w.-]{0,95})?", re.ASCII)

MATCHING = "zero-shot-image-classification"
CLASSIFYING = "image-classification"


@dataclass(frozen=True)
class Facts:
    """What is known of an adapter.

    Attributes:
        config: the content of `adapter_config.json`.
        name: by which the adapter is loaded, a folder's name or one on the Hub.
        revision: the branch on the Hub, None for the main one.
        pictures: names of the pictures that are there to be shown.
        subfolder: where the adapter is in the repository; None for the top.
    """

    config: Mapping[str, Any]
    name: str
    revision: str | None = None
    pictures: Sequence[str] = ()
    subfolder: str | None = None

    @property
    def record(self) -> Mapping[str, Any]:
        """What is known of data, training and results."""
        return mapping(self.config.get("record"))

    def of(self, key: str) -> Mapping[str, Any]:
        """A part of the record; empty where it is not known."""
        return mapping(self.record.get(key))

    @property
    def base(self) -> str | None:
        """The base model's name on the Hub; None for one in a folder."""
        return repository(self.of("about").get("finetuned_from")) or repository(
            self.config.get("base_model_name_or_path")
        )

    @property
    def base_name(self) -> str:
        """The last part of the base model's name, which says nothing about where folders are."""
        given = text(self.config.get("base_model_name_or_path")) or self.family or "base model"
        return re.split(r"[\\/]", given.rstrip("\\/"))[-1] or "base model"

    @property
    def family(self) -> str | None:
        """The base model's class."""
        return text(mapping(self.config.get("auto_mapping")).get("base_model_class"))

    @property
    def classes(self) -> list[str]:
        """Names of the classes, in their order; empty where they have none."""
        names = mapping(self.config.get("id2label"))
        try:
            return [str(names[index]) for index in sorted(names, key=int)]
        except (TypeError, ValueError):
            return []

    @property
    def task(self) -> str:
        """As the Hub calls it."""
        kind, family = text(self.record.get("kind")), self.family or ""
        matching = kind == "matching" or (kind is None and not self.classes and not family.endswith("Classification"))
        return MATCHING if matching else CLASSIFYING

    @property
    def quantity(self) -> bool:
        """Whether the model predicts a number instead of classes."""
        problem = self.config.get("problem_type")
        return problem == "regression" or (problem is None and self.config.get("num_classes") == 1)

    @property
    def players(self) -> tuple[int, int] | None:
        """(rows, cols) of the players."""
        for found in (self.config.get("grid"), self.record.get("players"), self.of("evaluation").get("players")):
            if isinstance(found, list | tuple) and len(found) == 2 and all(type(count) is int for count in found):
                return (found[0], found[1])
        return None

    @property
    def title(self) -> str:
        """The name that a person gave: the model's, or that of its repository."""
        given = text(self.of("about").get("model_name"))
        return given or (
            self.name.split("/")[-1] if "/" in self.name else f"{self.base_name} with Shapley attributions"
        )

    @property
    def shown_pictures(self) -> list[Mapping[str, Any]]:
        """`file` and `alt` of the pictures that the record lists and that are there; for the template of the card."""
        known = self.record.get("pictures")
        listed = [mapping(picture) for picture in known] if isinstance(known, list) else []
        return [one for one in listed if one.get("file") in self.pictures and OWN_PICTURE.fullmatch(str(one["file"]))]


def repository(name: Any) -> str | None:
    """A name on the Hub, or None for a path and anything else."""
    given = text(name)
    if given is None or not _REPOSITORY.fullmatch(given) or ".." in given or Path(given).is_dir():
        return None
    return given


def mapping(value: Any) -> Mapping[str, Any]:
    """The value if it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def text(value: Any) -> str | None:
    """The value if it is a text with something in it."""
    return value if isinstance(value, str) and value.strip() else None


def texts(value: Any) -> list[str]:
    """One text or many as a list, each once."""
    listed = value if isinstance(value, list | tuple) else [value]
    return list(dict.fromkeys(one for one in listed if text(one)))


def number(value: Any) -> float | None:
    """The value if it is a finite number."""
    return float(value) if fault(value, float, "it") is None else None


def count(value: Any) -> int | None:
    """The value if it is a whole number."""
    return value if type(value) is int else None
