"""A matplotlib figure that carries its description into the files it is saved as."""

from __future__ import annotations

from os import PathLike, fspath
from pathlib import Path
from typing import Any

from matplotlib import rcParams
from matplotlib.figure import Figure

from shapadapter.atomic import whole_file

_FIELDS = {"png": "Description", "svg": "Description", "pdf": "Subject"}


class DescribedFigure(Figure):
    """A figure with an `alt_text`, which `savefig` writes into PNG, SVG and PDF files.

    Screen readers do not read it there; whoever puts the picture on a page finds it.

    Attributes:
        alt_text: What the figure shows, in words; nothing is written if it is empty.
    """

    alt_text: str = ""

    def savefig(self, fname: Any, *, transparent: bool | None = None, **kwargs: Any) -> None:
        """As matplotlib's own; `metadata` given here wins over the description. A file is never seen half-written.

        Raises:
            DiskFullError: There is no room for the file.
        """
        named = Path(fname).suffix[1:] if isinstance(fname, str | PathLike) else ""
        kind = str(kwargs.get("format") or named or rcParams["savefig.format"]).lower()
        if self.alt_text and kind in _FIELDS:
            kwargs["metadata"] = {_FIELDS[kind]: self.alt_text, **(kwargs.get("metadata") or {})}
        if not isinstance(fname, str | PathLike):
            super().savefig(fname, transparent=transparent, **kwargs)
            return
        path = Path(fname) if named or kwargs.get("format") else Path(f"{fspath(fname)}.{kind}")  # as matplotlib does
        with whole_file(path) as temporary:
            super().savefig(temporary, transparent=transparent, **{**kwargs, "format": kind})
