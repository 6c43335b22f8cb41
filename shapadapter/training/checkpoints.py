"""Checkpoints: written beside their place and renamed once they are on the disk, and judged before one is used."""

from __future__ import annotations

import json
import re
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list, gather_object
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints

from shapadapter.core.documents import open_tensors, reading
from shapadapter.core.errors import CheckpointError, DiskFullError, ShapleyError
from shapadapter.core.files import alone_in, atomic_folder, free_megabytes, fsync_folder, temporary_path

# Saved together or not at all; without one of them transformers starts all of them anew and says nothing.
_STATES = {"optimizer.pt": "optimizer*", "scheduler.pt": "scheduler.pt", "rng_state.pth": "rng_state*"}


def damage_in(folder: Path) -> str | None:
    """What visibly keeps a training from going on from a checkpoint, by the name of the file; None if nothing does.

    What we save takes its name when it is complete. Others may leave half a checkpoint, and disks lose bytes: whether each
    file has its end, and torch's their checksums, is looked at. A changed number in a readable file is not found.
    """
    if not folder.is_dir():
        return "there is no such folder"
    if not (folder / TRAINER_STATE_NAME).is_file():
        return f"{TRAINER_STATE_NAME} is missing, so it was not saved to its end"
    missing = [name for name, pattern in _STATES.items() if not any(folder.glob(pattern))]
    if 0 < len(missing) < len(_STATES) and not any(folder.glob("global_step*")):  # where DeepSpeed keeps its own
        return f"{missing[0]} is missing"
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        try:
            _read(path)
        except (OSError, CheckpointError) as error:
            return f"{path.relative_to(folder).as_posix()} cannot be read ({error})"
    return None


def _read(path: Path) -> None:
    """Read a file as far as its format shows damage."""
    if path.suffix == ".json":
        with reading(path):
            json.loads(path.read_text(encoding="utf-8"))
    elif path.suffix == ".safetensors":
        with open_tensors(path):  # compares the header with the file's length
            pass
    elif path.suffix in (".bin", ".pt", ".pth"):
        # What torch.save writes, with a checksum for each part.
        with reading(path), zipfile.ZipFile(path) as file:
            damaged = file.testzip()
            if damaged:
                raise ValueError(f"{damaged} in it is damaged")


def newest_first(run: Path) -> list[Path]:
    """The folders `checkpoint-<step>` of a run, the highest step first, complete or not."""
    if not run.is_dir():
        return []
    names = {path: re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name) for path in run.iterdir()}
    steps = {path: int(match[1]) for path, match in names.items() if match and path.is_dir()}
    return sorted(steps, key=lambda path: steps[path], reverse=True)


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """The newest checkpoint of a run that a training can go on from; those that it passes over are named in warnings.

    `trainer.train(resume_from_checkpoint=last_complete_checkpoint("out"))` goes on where a run stopped, and starts it where
    there is nothing to go on from.

    Args:
        output_dir: the run's `output_dir`.

    Returns:
        The checkpoint's path, or None if there is none.
    """
    folder, _ = _newest_complete(newest_first(Path(output_dir)), damage_in, warn=True)
    return None if folder is None else str(folder)


def _newest_complete(
    folders: list[Path], judge: Callable[[Path], str | None], warn: bool
) -> tuple[Path | None, list[str]]:
    """The first folder without damage, and what is wrong with those before it."""
    passed: list[str] = []
    for folder in folders:
        damage = judge(folder)
        if damage is None:
            return folder, passed
        passed.append(f"{folder.name}: {damage}")
        if warn:
            warnings.warn(f"Skipping damaged checkpoint {folder}: {damage}.", stacklevel=3)
    return None, passed


def rotate(run: Path, limit: int | None, keep: set[Path]) -> None:
    """Delete the oldest checkpoints beyond `limit` (None or 0 for no limit), but none of `keep`."""
    if not limit or limit < 0:
        return
    folders = [Path(path) for path in sort_checkpoints(str(run), use_mtime=True)]  # the oldest first
    spare = [folder for folder in folders if folder not in keep]
    for folder in spare[: max(0, len(folders) - max(limit, len(keep)))]:
        discard(folder)


def discard(folder: Path) -> None:
    """Delete a checkpoint, whose name goes first: a process that is killed leaves no half of it under that name."""
    nameless = temporary_path(folder)
    with suppress(OSError):  # it is not there
        folder.rename(nameless)
    shutil.rmtree(nameless, ignore_errors=True)


class Checkpoints:
    """The checkpoints of a trainer, of which all its processes are told the same."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.unfinished: Path | None = None  # where one is being written

    def save(self, write: Callable[[], None], folder: Path) -> None:
        """Let all processes write a checkpoint, which takes the name `folder` when it is on the disk; then old ones go."""
        args, state = self.trainer.args, self.trainer.state
        best, place = state.best_model_checkpoint, [""]
        try:
            with together(), ExitStack() as stack:
                with together():
                    if args.process_index == 0:
                        place = [str(stack.enter_context(atomic_folder(folder)))]
                self.unfinished = Path(broadcast_object_list(place)[0])
                stack.callback(setattr, self, "unfinished", None)
                with together():
                    write()
                    if state.best_model_checkpoint == str(self.unfinished):
                        state.best_model_checkpoint = str(folder)
                        if args.should_save:
                            state.save_to_json(str(self.unfinished / TRAINER_STATE_NAME))
        except Exception as error:
            state.best_model_checkpoint = best  # not what was given up
            before, _ = _newest_complete(newest_first(folder.parent), damage_in, warn=False)
            resume = f"resume from {before} with resume_from_checkpoint=True"
            raise CheckpointError(
                f"Could not save {folder} ({_reason(error)}; {free_megabytes(folder):,.1f} MB were free there). Remove the "
                f"cause, then {resume if before else 'start again: no earlier one is complete'}."
            ) from error
        unfinished = Path(place[0])
        if args.local_process_index == 0 and unfinished.is_dir():  # another machine, with a disk of its own
            discard(folder)
            unfinished.rename(folder)
            unfinished.parent.rmdir()
            fsync_folder(folder.parent)
        if args.push_to_hub:
            self.trainer.publication.push_checkpoint(folder)
        if args.should_save:
            best = state.best_model_checkpoint
            rotate(folder.parent, args.save_total_limit, {folder} | ({Path(best)} if best else set()))

    def saving_model(self) -> AbstractContextManager[None]:
        """Around the saving of a checkpoint's model: the Trainer lets all processes wait for each other right after it."""
        return nullcontext() if self.unfinished is None else together()

    def chosen(self, wish: Any) -> str | None:
        """The checkpoint to go on from, by what `resume_from_checkpoint` says; None to start anew."""
        said = str(wish).lower()  # a command line says True as a word
        if wish is None or said == "false":
            return None
        if said != "true":
            folder = Path(wish)
            if (damage := self.damage_in(folder)) is None:
                return str(folder)
            others = [one for one in self._listed(folder.parent) if one.name != folder.name]
            other, _ = _newest_complete(others, self.damage_in, warn=False)
            remedy = (
                f"Pass {other} instead"
                if other
                else "No other one beside it is complete: leave resume_from_checkpoint out"
            )
            raise CheckpointError(f"Cannot resume from {folder}: {damage}. {remedy}.")
        run = Path(str(self.trainer.args.output_dir))
        newest, passed = _newest_complete(self._listed(run), self.damage_in, self.trainer.is_local_process_zero())
        if newest is not None:
            return str(newest)
        found = f"none is complete ({'; '.join(passed)})" if passed else "there is none"
        raise CheckpointError(
            f"Expected a complete checkpoint in {run} to resume from, but {found}. Start again without resume_from_checkpoint."
        )

    def damage_in(self, folder: Path) -> str | None:
        """What one process on each machine finds, since machines may have disks of their own; the same in all."""
        mine = damage_in(folder) if self.trainer.args.local_process_index == 0 else None
        return next((found for found in gather_object([mine]) if found), None)

    def check_best(self) -> None:
        """Refuse to load a best model that is damaged, once the weights of the last step are saved."""
        trainer, folder = self.trainer, self.trainer.state.best_model_checkpoint
        if damage := self.damage_in(Path(str(folder))):
            trainer.save_model(_internal_call=True)  # not pushed
            raise CheckpointError(
                f"The training is over, but its best model cannot be loaded from {folder}: {damage}. The model has the "
                f"weights of the last step, which are saved in {trainer.args.output_dir}; trainer.save_model(folder) saves "
                "them elsewhere."
            )

    def _listed(self, run: Path) -> list[Path]:
        """The checkpoints of a run, newest first, as the first process sees them."""
        listed: list[Any] = [newest_first(run)]
        return broadcast_object_list(listed)[0]


def _reason(error: Exception) -> str:
    """What went wrong, without the sentence of a `DiskFullError`, which another one replaces."""
    cause = error.__cause__ if isinstance(error, DiskFullError) and error.__cause__ is not None else error
    return str(cause) if isinstance(cause, ShapleyError) else f"{type(cause).__name__}: {cause}"


@contextmanager
def together() -> Iterator[None]:
    """What fails in one process fails in all: none goes on, or waits for one that has given up."""
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    failures = gather_object([None if error is None else _reason(error)])
    if error is not None:
        raise error
    if found := next(filter(None, failures), None):
        raise ShapleyError(found)


@contextmanager
def running_alone(args: Any, folder: str | Path) -> Iterator[None]:
    """`alone_in` for all processes of a training: the main one takes the lock, and if it cannot, all are refused."""
    with ExitStack() as stack:
        with together():
            if args.process_index == 0:
                stack.enter_context(alone_in(Path(folder)))
        yield
