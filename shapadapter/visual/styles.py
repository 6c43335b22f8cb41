"""How the curve of each method looks, the same in figures and on pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle

from .maps import RED

Dashes = tuple[float, ...]


@dataclass(frozen=True)
class Style:
    """A colour such as `#ff0d57`, and lengths of dashes and gaps in widths of the line, none for a solid one."""

    colour: str
    dashes: Dashes


FIRST = "#{:02x}{:02x}{:02x}".format(*RED)
_KNOWN = {
    "shapadapter": Style(FIRST, ()),
    "random": Style("#737373", (3.7, 1.6)),
    "centre": Style("#b3b3b3", (2, 3)),
}
# Okabe and Ito's colours for readers who see few, without those near the red, and without yellow and black: the one
# cannot be seen on a white page, the other not on a dark one.
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#56b4e9", "#cc79a7")
_DASHES: tuple[Dashes, ...] = ((6.4, 1.6, 1, 1.6), (1, 1.65), (7, 1.5), (4, 1, 1, 1, 1, 1))


def styles(methods: Sequence[str]) -> dict[str, Style]:
    """Give each method colour and dashes; dashes differ, too, for prints in grey.

    Args:
        methods: In the order in which they are listed.

    Returns:
        A style by method. Those that know nothing of the model are grey.
    """
    # Of 5 colours and 4 dashes, each with its neighbour, 20 methods differ.
    others = map(Style, cycle(_COLOURS), cycle(_DASHES))
    return {name: _KNOWN.get(name) or next(others) for name in methods}
