"""The errors and warnings a user of shapadapter can meet, each with a name of its own."""

import re
from typing import Any

_SECRETS = (
    (re.compile(r"(://)[^\s/?#@:]{0,300}(?::[^\s@]{0,300})?@(?:[^\s/@]{0,300}@)*"), r"\1"),  # before the host
    (re.compile(r"\?[\w.~%+-]+=[^\s'\"`)>]*"), ""),  # a query, which may be signed
    (re.compile(r"\b(?:hf|api)_(?:oauth_|org_)?[A-Za-z0-9]{10,}(?:[.-][\w.-]+)?"), "hf_..."),  # a token of the Hub
)


def redacted(text: Any) -> str:
    """A text without what may be secret in the addresses in it: names, passwords, queries and tokens of the Hub."""
    said = str(text)
    for pattern, instead in _SECRETS:
        said = pattern.sub(instead, said)
    return said


class ShapleyError(Exception):
    """Base class: something shapadapter refuses, with what was expected, what came and what to type.

    No message holds credentials, whatever names and other errors it quotes.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*(redacted(one) if isinstance(one, str) else one for one in args))

    def __str__(self) -> str:
        # It may name a file or a class of somebody else's, with what UTF-8 cannot hold.
        return super().__str__().encode("utf-8", "backslashreplace").decode()


class UnsupportedModelError(ShapleyError, ValueError):
    """The model cannot be wrapped: a part was not found, or the self-test at wrapping time failed."""


class CheckpointError(ShapleyError, ValueError):
    """An adapter does not fit its base model, or its state could not be restored from what would be saved."""


class FieldError(ShapleyError, ValueError):
    """A field of a configuration or an explanation holds what it cannot hold: another type, a number out of range, ..."""


class DiskFullError(ShapleyError, OSError):
    """A file could not be written, because the disk, a quota or a limit of sizes has no room for it."""

    def __str__(self) -> str:
        # OSError puts "[Errno 28]" before the sentence.
        return str(self.strerror)


class ExportError(ShapleyError, RuntimeError):
    """A model could not be exported, or what came out computes something else."""


class ImageError(ShapleyError, ValueError):
    """An image is missing, unreadable or of a kind the model cannot take."""


class UnreadableImageError(ImageError):
    """An image is missing, damaged or no image at all: one that a training may leave out."""


class ClassNotFoundError(ShapleyError, KeyError):
    """A class was asked for that the model does not have."""

    def __str__(self) -> str:
        # KeyError shows the repr of its argument, which turns a readable sentence into an escaped string.
        return str(self.args[0]) if self.args else ""


class ShapleyCollapseWarning(UserWarning):
    """The model has become a constant: the trivial minimum of the Shapley loss."""
