"""Links that lead out of the folder of a model: refused where it is read or uploaded, replaced where it is written."""

import warnings
from collections.abc import Iterable
from pathlib import Path

from shapadapter.core.errors import CheckpointError

_READ_FOLDERS = ("explanations", "chat_templates")  # of a saved model


def refuse_links(folder: Path, subfolder: str = "") -> None:
    """Refuse a folder, or the model in a subfolder of it, if a file there is a link to something outside `folder`.

    What is saved, copied or uploaded would hold what the link leads to. `folder` itself may be reached by a link.

    Raises:
        CheckpointError: There is such a link.
    """
    place = folder / subfolder
    inside = [place / name for name in _READ_FOLDERS]
    # Other folders are not read; that of a run may have many.
    files = [path for one in (place, *inside) if one.is_dir() for path in sorted(one.iterdir()) if not path.is_dir()]
    for path in (place, *inside, *files):
        refuse_link(path, folder)


def refuse_link(path: Path, folder: Path) -> None:
    """Refuse a path in a folder that leads out of it by a link; the links of the Hub's cache are no such links.

    Raises:
        CheckpointError: It does.
    """
    if leads_out(path, folder):
        raise CheckpointError(
            f"{path} is a link that leads out of {folder}, and what is there is no part of it: delete the link, or put a "
            "copy of what it leads to in its place."
        )


def break_links(folder: Path, names: Iterable[str]) -> None:
    """Delete links out of a folder where files are about to be written: what they lead to would be overwritten."""
    for path in (folder / name for name in names):
        if path.is_symlink() and leads_out(path, folder):
            path.unlink()
            warnings.warn(
                f"{path} was a link that led out of {folder}: what is saved now takes its place.", stacklevel=3
            )


def leads_out(path: Path, folder: Path) -> bool:
    """Whether a path in a folder is elsewhere, because of a link."""
    try:
        root, real = folder.resolve(), path.resolve()
    except (OSError, RuntimeError):  # a link that leads to itself
        return True
    # In the cache, snapshots/<commit>/<file> is a link to blobs/<hash>.
    blobs = [above.parents[1] / "blobs" for above in (root, *root.parents) if above.parent.name == "snapshots"]
    return not real.is_relative_to(root) and real.parent not in blobs
