"""One run at a time in a folder."""

from __future__ import annotations

import errno
import os
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from shapadapter.core.errors import ShapleyError
from shapadapter.core.files import is_running

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

NAME = ".shapadapter.lock"

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
    file, made = folder.resolve() / NAME, [one for one in (folder, *folder.parents) if not one.exists()]
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
                if _ended(holder) and _is(handle, file):
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


def _ended(holder: str) -> bool:
    """Whether a process that noted itself in a lock file is known to have ended."""
    found = re.fullmatch(r"process (\d+) on (.*)", holder)
    return found is not None and found[2] == socket.gethostname() and not is_running(int(found[1]))


def _is(handle: TextIO, file: Path) -> bool:
    """Whether an open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(handle.fileno()), file.stat())
    except OSError:
        return False
