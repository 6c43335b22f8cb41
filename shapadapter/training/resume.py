"""A trainer that is killed at any moment and goes on as if nothing had happened."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from typing_extensions import override

from shapadapter.core.errors import CheckpointError, DiskFullError, ShapleyError
from shapadapter.core.files import free_megabytes
from shapadapter.core.locks import alone_in
from shapadapter.training.checkpoints import (
    MANIFEST,
    discard,
    newest_first,
    rotate,
    seal,
    trouble_with,
    unreadable_in,
    warn_passed_over,
)
from shapadapter.training.publish import PushingTrainer, without_token


class ResumableTrainer(PushingTrainer):
    """`Trainer` whose checkpoints are known to be whole or not, and whose data set knows its epoch after resuming."""

    _saving = False

    # -- saving ------------------------------------------------------------------------------------------------------

    @override
    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """`Trainer`'s checkpoint, declared whole when all processes have written theirs; only then older ones go."""
        run = Path(self._get_output_dir(trial))
        folder = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with self._taken_back_on_failure(folder):
            if self.args.should_save:
                discard(folder)  # what a run that was killed left under this name
            self.accelerator.wait_for_everyone()
            self._write_checkpoint(model, trial, folder)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                seal(folder)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            rotate(run, self.args.save_total_limit, {folder} | ({Path(best)} if best else set()))

    def _write_checkpoint(self, model: Any, trial: Any, folder: Path) -> None:
        # transformers would rotate and push inside, when the new checkpoint is not known to be whole.
        limit, self.args.save_total_limit, self._saving = self.args.save_total_limit, None, True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit, self._saving = limit, False
        if self.args.should_save:
            with without_token(self.args):
                torch.save(self.args, folder / TRAINING_ARGS_NAME)  # again, now with the limit

    @override
    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._saving:
            super()._push_from_checkpoint(checkpoint_folder)

    @contextmanager
    def _taken_back_on_failure(self, folder: Path) -> Iterator[None]:
        """Remove a checkpoint that could not be saved, and say so.

        Raises:
            CheckpointError: with the reason, and the checkpoint to go on from.
        """
        try:
            yield
        except BaseException as error:
            free = free_megabytes(folder)
            reason = error.__cause__ if isinstance(error, DiskFullError) else error  # whose sentence this one replaces
            # Only the process that declares it whole: another one might come too late and take back a whole one.
            if self.args.should_save:
                discard(folder)
            if not isinstance(error, Exception):
                raise
            before = next((one for one in newest_first(folder.parent) if trouble_with(one) is None), None)
            remedy = f"{before} is whole: go on" if before else "There is no earlier one that is whole: start again"
            raise CheckpointError(
                f"Could not save {folder} ({type(reason).__name__}: {reason}; {free:,.1f} MB were free there). "
                f"{remedy} {'with resume_from_checkpoint=True ' if before else ''}when the cause is gone."
            ) from error

    # -- resuming ----------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: Any = None, trial: Any = None, *args: Any, **kwargs: Any) -> Any:
        """`Trainer`'s training, from a whole checkpoint.

        Args:
            resume_from_checkpoint: True for the newest whole checkpoint in `output_dir`, or the path of one.
            trial: as for `Trainer`.
            args: as for `Trainer`.
            kwargs: as for `Trainer`.

        Raises:
            CheckpointError: The checkpoint is not whole, or with True none is.
            ShapleyError: Another run is writing into the same folder.
        """
        with running_alone(self.args, self._get_output_dir(trial)):
            return super().train(self._chosen(resume_from_checkpoint), trial, *args, **kwargs)

    def _chosen(self, wish: Any) -> str | None:
        """The checkpoint to go on from, the same in every process; None to start anew."""
        said = str(wish).lower()  # a command line says True as a word
        if wish is None or said == "false":
            return None
        if said == "true":
            return str(self._newest_whole(Path(str(self.args.output_dir))))
        if trouble := self._trouble(Path(wish)):
            raise CheckpointError(f"Cannot go on from {wish}: {trouble}. {self._instead_of(Path(wish))}")
        return str(wish)

    def _newest_whole(self, run: Path) -> Path:
        troubles = []
        for folder in self._listed(run):
            trouble = self._found_anywhere(trouble_with, folder)
            if trouble is None:
                return folder
            troubles.append(f"{folder.name}: {trouble}")
            if self.is_local_process_zero():
                warn_passed_over(folder, trouble)
        found = f"none is whole ({'; '.join(troubles)})" if troubles else "there is none"
        remedy = f", or pass the path of one without {MANIFEST} to use it nevertheless" if troubles else ""
        raise CheckpointError(
            f"Expected a whole checkpoint in {run} to go on from, but {found}. Start again without "
            f"resume_from_checkpoint{remedy}."
        )

    def _trouble(self, folder: Path) -> str | None:
        """What is wrong with a checkpoint that is called by its name: without `complete.json`, as far as it shows."""
        trouble = self._found_anywhere(trouble_with, folder)
        if trouble is not None and not self._found_anywhere(_has_manifest, folder):
            trouble = self._found_anywhere(unreadable_in, folder)
            if trouble is None and self.is_local_process_zero():
                warnings.warn(
                    f"{folder} has no {MANIFEST}: its files can be read, but whether they are what was saved cannot be "
                    "known. ShapleyTrainer did not save it, or was stopped while it did.",
                    stacklevel=4,
                )
        return trouble

    def _instead_of(self, folder: Path) -> str:
        """What to go on from where this checkpoint is broken."""
        others = (one for one in self._listed(folder.parent) if one.name != folder.name)
        whole = next((one for one in others if self._found_anywhere(trouble_with, one) is None), None)
        return (
            f"Pass {whole} instead." if whole else "No other one beside it is whole: leave resume_from_checkpoint out."
        )

    @override
    def _load_best_model(self) -> None:
        folder = Path(str(self.state.best_model_checkpoint))
        if trouble := self._trouble(folder):
            self.save_model(_internal_call=True)  # not pushed
            raise CheckpointError(
                f"The training is over, but its best model cannot be loaded from {folder}: {trouble}. The model has the "
                f"weights of the last step, which are saved in {self.args.output_dir}; trainer.save_model(folder) saves them "
                "elsewhere."
            )
        super()._load_best_model()

    def _listed(self, run: Path) -> list[Path]:
        """The checkpoints of a run, newest first, as the first process sees them."""
        listed: list[Any] = [newest_first(run)]
        return broadcast_object_list(listed)[0]

    def _found_anywhere(self, judge: Callable[[Path], str | None], folder: Path) -> str | None:
        """What one process on each machine finds, since machines may have disks of their own; the same answer in all."""
        mine = judge(folder) if self.args.local_process_index == 0 else None
        return next((found for found in gather_object([mine]) if found), None)

    @override
    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step >= self.state.max_steps:
            # Resumed from its last checkpoint: transformers would take one step more before it looks.
            self.control.should_training_stop = True
            return None
        # accelerate tells a data set its epoch, but not in an epoch resumed in its middle, nor on several processes.
        dataset = kwargs["train_dataloader"].dataset
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(kwargs["epoch"])
        return super()._run_epoch(*args, **kwargs)


def _has_manifest(folder: Path) -> str | None:
    return MANIFEST if (folder / MANIFEST).exists() else None


@contextmanager
def running_alone(args: Any, folder: str | Path) -> Iterator[None]:
    """`alone_in` for all processes of a training: the main one takes the lock, and if it cannot, all are refused.

    Args:
        args: The training's arguments.
        folder: Where it writes.

    Raises:
        ShapleyError: Another run is writing there.
    """
    with ExitStack() as stack:
        refusal: list[Any] = [None]
        if args.process_index == 0:
            try:
                stack.enter_context(alone_in(Path(folder)))
            except ShapleyError as error:
                refusal = [str(error)]
        if said := broadcast_object_list(refusal)[0]:
            raise ShapleyError(said)
        yield
