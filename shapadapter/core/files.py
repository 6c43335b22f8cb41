"""Files and folders that are complete or absent, whatever ends the process that writes them; locks; links that lead out."""

import ctypes
import errno
import hashlib
import itertools
import os
import re
import secrets
import shutil
import socket
import threading
import time
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from shapadapter.core.errors import CheckpointError, DiskFullError, ShapleyError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


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
    two folders in one step, as Linux does, a kill leaves the old one or the new one; elsewhere the next that writes there
    takes back what was killed between two steps.
    """
    final = path.resolve()
    remove_leftovers(final.parent)
    around = temporary_path(final)
    new = around / final.name
    try:
        with report_full_disk(path):
            new.mkdir(parents=True)
            yield new
            for one in (new, *new.rglob("*")):
                (fsync_folder if one.is_dir() else fsync_file)(one)
            for one in final.iterdir() if ours is not None and final.is_dir() else ():
                if one.name in (ours or ()):
                    continue
                if one.is_dir() and not one.is_symlink():
                    shutil.copytree(one, new / one.name, symlinks=True, copy_function=_second_name)
                else:
                    _second_name(one, new / one.name)
        _take_place(new, final)
        fsync_folder(final.parent)
    finally:
        _discard(around)


def _second_name(path: str | Path, other: str | Path) -> None:
    """Give what stays in a folder a name in the new one, too, so that it is never without one; or copy it."""
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


_BEFORE = "before"
_SELF = secrets.token_hex(4)  # another process may have had this one's number before
_COUNT = itertools.count()
_LEFT = re.compile(r"\..*\.shapadapter-([0-9a-f]{8})-(\d+)-([0-9a-f]{8})-\d+\.tmp", re.DOTALL)
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
    return time.time() - path.lstat().st_mtime > 86400


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
        number = getattr(error, "errno", None)
        if number is None and (found := _OF_LIBRARIES.search(str(error))):
            number = int(found[1] or errno.ENOSPC)
        if number not in _FULL:
            raise
        remedy = "Raise the limit of a file's size (ulimit -f)" if number == errno.EFBIG else "Make room there"
        raise DiskFullError(
            number,
            f"{path} could not be written: {os.strerror(number)} ({free_megabytes(path):,.1f} MB are free there). {remedy}, "
            "or choose another place.",
        ) from error


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


LOCK = ".shapadapter.lock"

_guard = threading.Lock()
_held: dict[Path, tuple[int, TextIO | None, int]] = {}
"""By lock file: the process that holds it, its handle, and how many blocks of that process are inside."""


@contextmanager
def alone_in(folder: Path | None) -> Iterator[None]:
    """Keep runs of other processes out of a folder; blocks of one process may be inside each other.

    The system holds the lock, so it ends with its process, however that ends; the file in the folder says who has it. On a
    disk that cannot be written or knows no locks, and on Windows, nothing is locked.
    """
    if folder is None:
        yield
        return
    file, made = folder.resolve() / LOCK, [one for one in (folder, *folder.parents) if not one.exists()]
    with _guard:
        process, handle, depth = _held.get(file, (0, None, 0))
        if process != os.getpid():  # also after a fork, which copies what is noted here but not the lock
            handle, depth = _locked(file, folder), 0
        _held[file] = os.getpid(), handle, depth + 1
    try:
        yield
    finally:
        with _guard:
            process, handle, depth = _held.pop(file)
            if depth > 1:
                _held[file] = process, handle, depth - 1
            elif handle is not None and process == os.getpid():
                with suppress(OSError):
                    file.unlink()
                handle.close()
                with suppress(OSError):  # not empty
                    for one in made:
                        one.rmdir()


def _locked(file: Path, folder: Path) -> TextIO | None:
    """The lock file, open and locked; None where there can be none."""
    while fcntl is not None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            handle = file.open("a+", encoding="utf-8")
        except OSError:
            return None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            with handle:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    return None
                handle.seek(0)
                holder = handle.read(200).strip() or "another process"
                noted = re.fullmatch(r"process (\d+) on (.*)", holder)
                ended = noted is not None and noted[2] == socket.gethostname() and not is_running(int(noted[1]))
                if ended and _is(handle, file):
                    file.unlink()  # what still has it are workers that outlive the process for a moment
                    continue
            raise ShapleyError(
                f"{folder} is in use by another run ({holder}): wait until it has ended, or choose another folder."
            ) from None
        if _is(handle, file):
            with suppress(OSError):  # of a full disk
                handle.truncate(0)
                handle.write(f"process {os.getpid()} on {socket.gethostname()}\n")
                handle.flush()
            return handle
        handle.close()  # who had it has just taken it away
    return None


def _is(handle: TextIO, file: Path) -> bool:
    """Whether an open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(handle.fileno()), file.stat())
    except OSError:
        return False


def refuse_links(folder: Path, subfolder: str = "") -> None:
    """Refuse a folder, or the model in a subfolder of it, if a file there is a link to something outside `folder`.

    What is saved, copied or uploaded would hold what the link leads to. `folder` itself may be reached by a link.
    """
    place = folder / subfolder
    inside = [place / name for name in ("explanations", "chat_templates")]  # other folders, of a run, are not read
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
            warnings.warn(f"{path} was a link that led out of {folder}; what is saved takes its place.", stacklevel=3)


def leads_out(path: Path, folder: Path) -> bool:
    """Whether a path in a folder is elsewhere, because of a link."""
    try:
        root, real = folder.resolve(), path.resolve()
    except (OSError, RuntimeError):  # a link that leads to itself
        return True
    # In the cache, snapshots/<commit>/<file> is a link to blobs/<hash>.
    blobs = [above.parents[1] / "blobs" for above in (root, *root.parents) if above.parent.name == "snapshots"]
    return not real.is_relative_to(root) and real.parent not in blobs
