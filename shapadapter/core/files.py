"""Files and folders that are complete or absent, whatever ends the process that writes them; links that lead out."""

import ctypes
import errno
import hashlib
import itertools
import os
import re
import secrets
import shutil
import socket
import time
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from shapadapter.core.errors import CheckpointError, DiskFullError, ShapleyError


def write_together(contents: Mapping[Path, bytes], *, tidy: bool = True) -> None:
    """Write several files, each of them atomically, once all are complete; a kill between two leaves new ones and old ones."""
    for directory in {path.parent for path in contents} if tidy else ():
        remove_leftovers(directory)
    staged = {path: temporary_path(path) for path in contents}
    try:
        for path, temporary in staged.items():
            with report_full_disk(path):
                temporary.write_bytes(contents[path])
                fsync_file(temporary)
        for path, temporary in staged.items():
            temporary.replace(path)
        for directory in {path.parent for path in contents}:
            fsync_folder(directory)
    finally:
        for temporary in staged.values():
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield the path of a file to write, which takes the name `path` at the end; after an error nothing of it is left."""
    remove_leftovers(path.parent)
    temporary = temporary_path(path)
    try:
        with report_full_disk(path):
            yield temporary
            fsync_file(temporary)
        temporary.replace(path)
        fsync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path, ours: Collection[str] | None = None) -> Iterator[Path]:
    """Yield a new folder to write into, which takes the place of `path` at the end; after an error nothing of it is left.

    It is called as `path` is, because a model card says by which name its folder is loaded. Where the system can exchange
    two folders in one step, as Linux does, a process that is killed leaves the whole old one or the whole new one. Elsewhere
    it takes two, and what was killed between them is taken back by the next that writes there.
    """
    final = path.resolve()
    remove_leftovers(final.parent)
    around = temporary_path(final)
    new = around / final.name
    try:
        with report_full_disk(path):
            new.mkdir(parents=True)
            yield new
            for file in new.rglob("*"):
                if file.is_file():
                    fsync_file(file)
            if ours is not None and final.is_dir():
                _take_along([one for one in final.iterdir() if one.name not in ours], new)
        _take_place(new, final)
        fsync_folder(final.parent)
    finally:
        _discard(around)


def _take_along(entries: Iterable[Path], folder: Path) -> None:
    """Give files and folders a second name in another folder, so that they are never without one; or copy them."""
    for entry in entries:
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, folder / entry.name, symlinks=True, copy_function=_second_name)
        else:
            _second_name(entry, folder / entry.name)


def _second_name(path: str | Path, other: str | Path) -> None:
    try:
        os.link(path, other, follow_symlinks=False)
    except (OSError, NotImplementedError):  # the disk or the system knows no such thing
        shutil.copy2(path, other, follow_symlinks=False)


def _take_place(new: Path, final: Path) -> None:
    """Give a finished folder its name; what had it before is then beside where the new one was."""
    if not final.exists():
        try:
            new.rename(final)
            return
        except OSError:
            if not final.exists():  # else another process was faster
                raise
    shutil.copymode(final, new)
    if not _exchanged(new, final):
        (new.parent / _BEFORE).mkdir()
        final.rename(new.parent / _BEFORE / final.name)
        new.rename(final)


def _exchanged(one: Path, other: Path) -> bool:
    """Exchange two names in one step; False where the system or the disk cannot."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of linux/fs.h
    return bool(rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0)


# -- what passes, and what is left of it -----------------------------------------------------------------------------

_BEFORE = "before"
_SELF = secrets.token_hex(4)  # another process may have had this one's number before
_COUNT = itertools.count()
_LEFT = re.compile(r"\..*\.shapadapter-([0-9a-f]{8})-(\d+)-([0-9a-f]{8})-\d+\.tmp", re.DOTALL)
_DAY = 86400.0
_NAME_LENGTH = 50  # characters, of four bytes at most: a name may have 255


def temporary_path(path: Path) -> Path:
    """A name beside a path, for what takes its name later or not at all; it says which process of which machine wrote it."""
    mark = f"shapadapter-{_machine()}-{os.getpid()}-{_SELF}-{next(_COUNT)}"
    return path.with_name(f".{path.name[:_NAME_LENGTH]}.{mark}.tmp")


def remove_leftovers(directory: Path) -> None:
    """Delete from a directory what processes that were killed had not finished; of living ones and of others nothing."""
    with suppress(OSError):
        for path in [Path(entry) for entry in os.scandir(directory) if entry.name.endswith(".tmp")]:
            found = _LEFT.fullmatch(path.name)
            if found is not None and _is_left(path, found[1], int(found[2]), found[3]):
                _discard(path)


def _is_left(path: Path, machine: str, process: int, run: str) -> bool:
    """Whether nobody writes it any more: its process has ended, or, on another machine, nothing happened for a day."""
    if machine == _machine() and os.name == "posix":
        return run != _SELF if process == os.getpid() else not is_running(process)
    return time.time() - path.lstat().st_mtime > _DAY


def is_running(process: int) -> bool:
    """Whether there is a process of this number on this machine."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        return True
    return True


def _machine() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _discard(path: Path) -> None:
    """Delete a passing file or folder, after taking back the folder whose place it was about to take."""
    if path.is_dir() and not path.is_symlink():
        for before in (path / _BEFORE).glob("*"):
            if path.name.startswith(f".{before.name[:_NAME_LENGTH]}.") and not (path.parent / before.name).exists():
                before.rename(path.parent / before.name)
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


# -- disks -----------------------------------------------------------------------------------------------------------

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_OF_LIBRARIES = re.compile(
    r"os error (\d+)|No space left|\d+ requested and \d+ written|PytorchStreamWriter|unexpected pos"
)
"""How safetensors and tokenizers, libraries in C, numpy, and torch say that a file could not be written to its end."""


@contextmanager
def report_full_disk(path: Path) -> Iterator[None]:
    """Say in one sentence that there is no room for a file or folder, whatever library found out, and in what words."""
    try:
        yield
    except ShapleyError:
        raise
    except Exception as error:
        number = _no_room(error)
        if number is None:
            raise
        remedy = "Raise the limit of a file's size (ulimit -f)" if number == errno.EFBIG else "Make room there"
        raise DiskFullError(
            number,
            f"{path} could not be written: {os.strerror(number)} ({free_megabytes(path):,.1f} MB are free there). {remedy}, "
            "or choose another place.",
        ) from error


def _no_room(error: Exception) -> int | None:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno if error.errno in _FULL else None
    found = _OF_LIBRARIES.search(str(error))
    if found is None:
        return None
    number = int(found[1]) if found[1] else errno.ENOSPC
    return number if number in _FULL else None


def free_megabytes(path: Path) -> float:
    """Megabytes that are free on the disk of a path, whether there is anything under that name or not."""
    home = next((one for one in (path, *path.resolve().parents) if one.is_dir()), Path())
    return shutil.disk_usage(home).free / 1e6


def fsync_file(path: Path) -> None:
    """Wait until a file is on the disk: a power cut loses nothing of it then, and a full network disk has said so."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def fsync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk, where the system can: else a power cut may undo a renaming."""
    with suppress(OSError):
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


_READ_FOLDERS = ("explanations", "chat_templates")  # of a saved model


def refuse_links(folder: Path, subfolder: str = "") -> None:
    """Refuse a folder, or the model in a subfolder of it, if a file there is a link to something outside `folder`.

    What is saved, copied or uploaded would hold what the link leads to. `folder` itself may be reached by a link.
    """
    place = folder / subfolder
    inside = [place / name for name in _READ_FOLDERS]
    # Other folders are not read; that of a run may have many.
    files = [path for one in (place, *inside) if one.is_dir() for path in sorted(one.iterdir()) if not path.is_dir()]
    for path in (place, *inside, *files):
        refuse_link(path, folder)


def refuse_link(path: Path, folder: Path) -> None:
    """Refuse a path in a folder that leads out of it by a link; the links of the Hub's cache are no such links."""
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
