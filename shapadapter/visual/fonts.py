"""A font that has the characters of a text, with nothing but Pillow."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from contextlib import suppress

from PIL import ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

# Pillow's own font has no letters but those of English. These come with Linux, Windows and macOS.
_INSTALLED = (
    "DejaVuSans.ttf",
    "NotoSans-Regular.ttf",
    "NotoSansCJK-Regular.ttc",
    "arial.ttf",
    "Arial Unicode.ttf",
    "msyh.ttc",
)


def writable(text: str, size: int) -> tuple[str, Font]:
    """The text and a font that can write it: Pillow's own if it can, else one that is installed.

    If none can, accents go, and what then is missing becomes a question mark: that is told from a letter, a box is not.

    Args:
        text: one line.
        size: of the font, in pixels.
    """
    own = ImageFont.load_default(size=size)
    for font in (own, *_installed(size)):
        if not _missing(text, font):
            return text, font
    bare = "".join(char for char in unicodedata.normalize("NFKD", text) if not unicodedata.combining(char))
    unknown = _missing(bare, own)
    return "".join("?" if char in unknown else char for char in bare), own


def _installed(size: int) -> Iterator[Font]:
    for name in _INSTALLED:
        with suppress(OSError):
            yield ImageFont.truetype(name, size)


def _missing(text: str, font: Font) -> set[str]:
    """The characters that the font draws as it draws what is no character."""
    box = font.getmask("\uffff")
    drawn = {char: font.getmask(char) for char in set(text) if not char.isspace()}
    return {char for char, mask in drawn.items() if (mask.size, bytes(mask)) == (box.size, bytes(box))}
