"""Run a module under `accelerate launch`, and end all its processes together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

PATIENCE = 15.0
"""Seconds that the processes have to end after an interruption."""


def launch(module: str, arguments: list[str], config: Path | None, *, quiet_output: bool) -> int:
    """Run `python -m module` in as many processes as accelerate is configured for; returns the exit code.

    They are a process group of their own: whoever interrupts this command, by Ctrl-C or by a signal to it alone, interrupts
    all of them, and no training is left behind.

    Args:
        module: of the package.
        arguments: its words.
        config: a file of `accelerate config`; None for accelerate's default.
        quiet_output: whether what is printed goes to the standard error.

    Raises:
        KeyboardInterrupt: it was interrupted or told to end; all processes have ended.
    """
    chosen = [] if config is None else ["--config_file", str(config)]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", *chosen, "-m", module, *arguments]
    with _ends_as_interruptions():
        process = subprocess.Popen(command, stdout=sys.__stderr__ if quiet_output else None, start_new_session=True)
        try:
            return process.wait()
        except KeyboardInterrupt:
            _end(process)
            raise


@contextmanager
def _ends_as_interruptions() -> Iterator[None]:
    """Take what a cluster or a closed terminal sends for a Ctrl-C; what is ignored (`nohup`) stays so."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        """Answer a signal as Python answers Ctrl-C."""
        raise KeyboardInterrupt

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    numbers = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Interrupt all processes; those that do not end within `PATIENCE`, or before a second Ctrl-C, are killed."""
    deadline = time.monotonic() + PATIENCE
    try:
        there = _signal(process, signal.SIGINT)
        while there and time.monotonic() < deadline:
            time.sleep(0.1)
            process.poll()
            there = _signal(process, 0)
    except KeyboardInterrupt:
        pass
    _signal(process, getattr(signal, "SIGKILL", signal.SIGTERM))
    process.wait()


def _signal(process: subprocess.Popen[bytes], number: int) -> bool:
    """Send a signal to all processes, 0 for none; returns whether there was one to take it."""
    try:
        if hasattr(os, "killpg"):
            os.killpg(process.pid, number)  # it leads its group
        elif number:
            process.terminate()
    except (ProcessLookupError, PermissionError):
        return False
    return hasattr(os, "killpg") or process.poll() is None
