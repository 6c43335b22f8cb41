"""Processes of their own that import nothing again: forked from the one in which the tests run.

A new interpreter takes ten seconds to import torch, transformers and PEFT. Those that it has to be, because something is
imported there for the first time, are started by the tests that show it.
"""

import contextlib
import logging
import os
import runpy
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


class Done(NamedTuple):
    """How a process ended: its code (that of a signal below zero) and all that it printed."""

    code: int
    printed: str


def begin(action: Callable[[], object], printed: Path, cwd=None, **variables: str) -> int:
    """Call an action in a fork, in a process group of its own; returns the number of the process."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setsid()
        _speak_into(printed)
        os.environ.update(variables)
        os.chdir(cwd or Path.cwd())
        _forget_other_runs()
        action()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _speak_into(file: Path) -> None:
    """Both channels into a file, also for those that have kept pytest's."""
    place = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(place, 1)
    os.dup2(place, 2)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
    warnings.showwarning = lambda *said, **_: sys.stderr.write(warnings.formatwarning(*said[:4]))
    for logger in [logging.root, *map(logging.getLogger, list(logging.root.manager.loggerDict))]:
        for handler in logger.handlers:
            if type(handler) is logging.StreamHandler:
                handler.stream = sys.stderr


def _forget_other_runs() -> None:
    """What accelerate keeps of the trainings before: how many processes there are."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (PartialState, AcceleratorState, GradientState):
        state._reset_state()


def run(action: Callable[[], object], cwd=None, **variables: str) -> Done:
    """Call an action in a process and wait for its end."""
    (done,) = run_all([action], cwd, [variables])
    return done


def run_whole(action: Callable[[], object], cwd=None, **variables: str) -> str:
    """Call an action in a process that has to end without an error; returns what it printed."""
    done = run(action, cwd, **variables)
    assert done.code == 0, done.printed[-8000:]
    return done.printed


def run_all(
    actions: list[Callable[[], object]], cwd=None, variables: list[dict[str, str]] | None = None
) -> list[Done]:
    """Call each action in a process; when one has failed, the others are ended as a launcher ends them."""
    with tempfile.TemporaryDirectory() as home:
        files = [Path(home, str(number)) for number in range(len(actions))]
        given = variables or [{}] * len(actions)
        children = [begin(action, file, cwd, **more) for action, file, more in zip(actions, files, given, strict=True)]
        codes: dict[int, int] = {}
        while left := [child for child in children if child not in codes]:
            for child in left:
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    codes[child] = os.waitstatus_to_exitcode(status)
            if any(codes.values()):
                for child in left:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(child, signal.SIGKILL)
            time.sleep(0.01)
        return [
            Done(codes[child], file.read_text(errors="replace")) for child, file in zip(children, files, strict=True)
        ]


def run_together(action: Callable[[], object], processes: int = 2, cwd=None, **variables: str) -> str:
    """Call one action in processes that find each other as torchrun tells them; returns what they printed."""
    done = run_all([action] * processes, cwd, [{**variables, **place} for place in places(processes)])
    printed = "\n".join(one.printed for one in done)
    assert [one.code for one in done] == [0] * processes, printed[-4000:]
    return printed


def run_as_accelerate(config: Path, action: Callable[[], object], *options: str, **variables: str) -> str:
    """Call an action as `accelerate launch --config_file CONFIG` would run a script; returns what was printed."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    words = ["--config_file", str(config), *options, "script.py"]
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(words))
    told = {name: value for name, value in prepare_multi_gpu_env(args).items() if os.environ.get(name) != value}
    return run_together(action, args.num_processes, **{**told, **variables})


def places(processes: int) -> list[dict[str, str]]:
    """What torchrun sets in the environment of each process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [{**world, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def script(path: Path, *words: object) -> Callable[[], object]:
    """Run a file as a program, with these words on its command line."""

    def action() -> None:
        sys.argv = [str(path), *map(str, words)]
        runpy.run_path(str(path), run_name="__main__")

    return action
