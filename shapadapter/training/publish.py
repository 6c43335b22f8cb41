"""What a trainer uploads: the adapter and what belongs to it, of which others can make use."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME
from transformers import Trainer
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils.hub import PushInProgress, hf_api
from typing_extensions import override

from shapadapter.adapter.saving import publisher
from shapadapter.core.errors import redacted
from shapadapter.core.files import temporary_path
from shapadapter.core.remote import ADAPTER_FILES, PROCESSOR_FILES, hub_trouble, warn_of_local_base

_log = logging.getLogger(__name__)


class PushingTrainer(Trainer):
    """`Trainer` that uploads the adapter's files, the processor's, the card and its pictures, and nothing else.

    `training_args.bin` stays here: it is a pickle, which can run code when it is opened, and it holds paths of this
    computer. The token is in no file at all. With `hub_strategy="checkpoint"` whole checkpoints are uploaded, beside the
    adapter, because that is what it means: pickles of optimiser and random generators are among them.
    """

    push_in_progress: Any

    @override
    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        with without_token(self.args):
            super()._save(output_dir, state_dict)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Save the model and upload it, with its processor and card.

        Args:
            commit_message: of the one commit.
            blocking: whether to wait for the upload.
            token: that may write; by default `hub_token`, or that of `hf auth login`.
            revision: the branch, made if it is not there; by default `hub_revision`.
            private: whether a new repository is private; by default `hub_private_repo`.
            **kwargs: for `create_model_card`.

        Returns:
            What `huggingface_hub` says of the commit, or a future of it if not `blocking`; None but in the first process.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        kwargs.setdefault("model_name", Path(str(self.args.hub_model_id or self.args.output_dir)).name)
        token = token if token is not None else self.args.hub_token
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        given, own = kwargs.get("tags") or [], getattr(self.model, "model_tags", None) or []
        kwargs["tags"] = list(dict.fromkeys([*([given] if isinstance(given, str) else given), *own]))
        self.note_about(**kwargs)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        model: Any = self.accelerator.unwrap_model(self.model)
        warn_of_local_base(next(iter(model.peft_config.values())).base_model_name_or_path)
        branch = revision if revision is not None else self.args.hub_revision
        message = commit_message or "End of training"
        done = self._upload(Path(str(self.args.output_dir)), ADAPTER_FILES, message, token, branch)
        return done.result() if blocking else done

    def note_about(self, **about: Any) -> None:
        """Keep what only a person knows of the model for its card; see `create_model_card`."""

    @override
    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Upload the adapter of a checkpoint in the background, and with some strategies the whole checkpoint."""
        strategy, folder = HubStrategy(self.args.hub_strategy), Path(checkpoint_folder)
        if not self.is_world_process_zero() or strategy == HubStrategy.END:
            return
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if busy and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        steps = self.args.save_strategy == SaveStrategy.STEPS
        moment = f"step {self.state.global_step}" if steps else f"epoch {int(self.state.epoch or 0)}"
        target = (self.args.hub_token, self.args.hub_revision)
        jobs: Any = [self._upload(folder, ADAPTER_FILES, f"Training in progress, {moment}", *target)]
        if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            name = "last-checkpoint" if strategy == HubStrategy.CHECKPOINT else folder.name
            message = f"Training in progress, {moment}, checkpoint"
            jobs.append(self._upload(folder, ("**/*",), message, *target, path_in_repo=name))
        if busy:
            self.push_in_progress.jobs.extend(jobs)
        else:
            self._report_failures()
            self.push_in_progress = PushInProgress(jobs)

    def _upload(
        self,
        folder: Path,
        patterns: Sequence[str],
        message: str,
        token: str | None,
        revision: str | None,
        path_in_repo: str | None = None,
    ) -> Any:
        """One commit in the background; a future of it."""
        run, whole = Path(str(self.args.output_dir)), path_in_repo is not None
        # Of its own, because the checkpoint may be deleted, and the run's folder written anew, before all is uploaded.
        copy = temporary_path(run / "push")
        copy.mkdir()
        try:
            own = folder if whole else own_folder(self, folder)
            for source, wanted in {folder: PROCESSOR_FILES, own: patterns}.items():
                publisher().copy_files(source, copy, wanted, link=folder != run)
        except BaseException:
            shutil.rmtree(copy, ignore_errors=True)
            raise
        options = {"token": token, "revision": revision, "path_in_repo": path_in_repo, "message": message}
        return hf_api().run_as_future(_upload_copy, copy, str(self.hub_model_id), {**options, "card": not whole})

    @override
    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        self._report_failures()

    def _report_failures(self) -> None:
        """Say which uploads during the training failed: the training went on."""
        done, self.push_in_progress = getattr(self, "push_in_progress", None), None
        for job in [] if done is None else done.jobs:
            if error := job.exception():
                trouble = hub_trouble(error, str(self.hub_model_id), self.args.hub_revision)
                # Logged, because warnings of several threads get in each other's way.
                _log.warning("A checkpoint was not pushed. %s", trouble or redacted(error))


def own_folder(trainer: Any, folder: Path) -> Path:
    """Where the trained adapter is in a folder: PEFT gives those that are not called "default" a folder each in it."""
    name = trainer.layer.active
    inside = folder / str(name)
    return inside if name not in (None, "default") and (inside / CONFIG_NAME).is_file() else folder


@contextmanager
def without_token(args: Any) -> Iterator[None]:
    """Hide the token while the arguments are saved."""
    token, args.hub_token = args.hub_token, None
    try:
        yield
    finally:
        args.hub_token = token


def _upload_copy(folder: Path, repo_id: str, options: dict[str, Any]) -> Any:
    """Upload a folder, and delete it."""
    try:
        return publisher().upload(folder, repo_id, **options)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
