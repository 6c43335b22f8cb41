"""Blocks of rows and columns as aligned text or Markdown."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH = 120
_NAME = 16


@dataclass(frozen=True)
class Block:
    """One table.

    Attributes:
        title: what it is about.
        columns: heads of the columns after the first.
        rows: a name and a cell for each column; an empty cell says that there is nothing to say.
        note: how to read it.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]
    note: str = ""


def as_text(blocks: Sequence[Block], summary: Sequence[str], notes: Sequence[str]) -> str:
    """All blocks below each other, at most 120 columns wide where the names are not too long."""
    parts = ["\n".join(_wrapped(line) for line in summary if line)]
    for block in blocks:
        widths = [
            max(len(head), *(len(cells[place]) for _, cells in block.rows)) for place, head in enumerate(block.columns)
        ]
        name = max([_NAME, *(len(row) for row, _ in block.rows)])
        lines = [block.title, _line("", block.columns, name, widths)]
        lines += [_line(row, cells, name, widths) for row, cells in block.rows]
        parts.append("\n".join([*lines, *([_wrapped(block.note, "  ")] if block.note else [])]))
    if notes:
        parts.append("\n".join(["Notes", *(_wrapped(note, "  ") for note in notes)]))
    return "\n\n".join(parts)


def as_markdown(blocks: Sequence[Block], summary: Sequence[str], notes: Sequence[str]) -> str:
    """All blocks as Markdown."""
    parts = [line for line in summary if line]
    for block in blocks:
        lines = [f"### {block.title}", "", _cells(["", *block.columns]), "|" + " --- |" * (len(block.columns) + 1)]
        lines += [_cells([row, *cells]) for row, cells in block.rows]
        parts.append("\n".join([*lines, *([f"\n{block.note}"] if block.note else [])]))
    if notes:
        parts.append("\n".join(["### Notes", "", *(f"- {note}" for note in notes)]))
    return "\n\n".join(parts) + "\n"


def _line(name: str, cells: Sequence[str], first: int, widths: Sequence[int]) -> str:
    right = "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
    return f"  {name:<{first}}  {right}".rstrip()


def _cells(values: Sequence[str]) -> str:
    return "| " + " | ".join(value.replace("|", "\\|") for value in values) + " |"


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(text, WIDTH, initial_indent=indent, subsequent_indent=indent)
