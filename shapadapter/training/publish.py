"""What a trainer uploads: the adapter and what belongs to it, of which others can make use."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils.hub import hf_api

from shapadapter.adapter.saving import publisher
from shapadapter.core.errors import redacted
from shapadapter.core.files import temporary_path
from shapadapter.core.remote import ADAPTER_FILES, PROCESSOR_FILES, hub_trouble, warn_of_local_base

_log = logging.getLogger(__name__)


class Publication:
    """Uploads the adapter's files of a trainer, the processor's, the card and its pictures, and nothing else.

    `training_args.bin` stays here: it is a pickle, which can run code when it is opened, and it holds paths of this
    computer. The token is in no file at all. With `hub_strategy="checkpoint"` whole checkpoints are uploaded, beside the
    adapter, because that is what it means: pickles of optimiser and random generators are among them.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self._uploads: list[Future[Any]] = []  # of checkpoints, in the background

    def push(
        self, message: str, blocking: bool, token: str | None, revision: str | None, private: bool | None, about: Any
    ) -> Any:
        """What `ShapleyTrainer.push_to_hub` does; `about` is for the card."""
        trainer, args = self.trainer, self.trainer.args
        trainer.callback_handler.on_push_begin(args, trainer.state, trainer.control)
        token = token if token is not None else args.hub_token
        if trainer.hub_model_id is None:
            trainer.init_hf_repo(token=token, private=private)
        given, own = about.get("tags") or [], getattr(trainer.model, "model_tags", None) or []
        tags = list(dict.fromkeys([*([given] if isinstance(given, str) else given), *own]))
        name = Path(str(args.hub_model_id or args.output_dir)).name
        trainer.record.note_about({"model_name": name, **about, "tags": tags})
        trainer.save_model(_internal_call=True)
        if not trainer.is_world_process_zero():
            return None
        self.finish()
        model: Any = trainer.accelerator.unwrap_model(trainer.model)
        warn_of_local_base(next(iter(model.peft_config.values())).base_model_name_or_path)
        branch = revision if revision is not None else args.hub_revision
        done = self._upload(Path(str(args.output_dir)), ADAPTER_FILES, message, token, branch)
        return done.result() if blocking else done

    def push_checkpoint(self, folder: Path) -> None:
        """Upload the adapter of a checkpoint in the background, and with some strategies the whole checkpoint."""
        trainer, args = self.trainer, self.trainer.args
        strategy = HubStrategy(args.hub_strategy)
        if not trainer.is_world_process_zero() or strategy == HubStrategy.END:
            return
        if all(upload.done() for upload in self._uploads):
            self.finish()
        elif not args.hub_always_push:
            return
        trainer.callback_handler.on_push_begin(args, trainer.state, trainer.control)
        steps = args.save_strategy == SaveStrategy.STEPS
        moment = f"step {trainer.state.global_step}" if steps else f"epoch {int(trainer.state.epoch or 0)}"
        message, target = f"Training in progress, {moment}", (args.hub_token, args.hub_revision)
        self._uploads.append(self._upload(folder, ADAPTER_FILES, message, *target))
        if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            name = "last-checkpoint" if strategy == HubStrategy.CHECKPOINT else folder.name
            self._uploads.append(self._upload(folder, ("**/*",), f"{message}, checkpoint", *target, path_in_repo=name))

    def finish(self) -> None:
        """Wait for the uploads of checkpoints, and say which failed: the training went on."""
        done, self._uploads = self._uploads, []
        wait(done)
        for error in filter(None, (upload.exception() for upload in done)):
            trouble = hub_trouble(error, str(self.trainer.hub_model_id), self.trainer.args.hub_revision)
            # Logged, because warnings of several threads get in each other's way.
            _log.warning("A checkpoint was not pushed. %s", trouble or redacted(error))

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
        run, adapter = Path(str(self.trainer.args.output_dir)), path_in_repo is None
        # Of its own, because the checkpoint may be deleted, and the run's folder written anew, before all is uploaded.
        copy = temporary_path(run / "push")
        copy.mkdir()
        try:
            own = own_folder(self.trainer, folder) if adapter else folder
            for source, wanted in {folder: PROCESSOR_FILES, own: patterns}.items():
                publisher().copy_files(source, copy, wanted, link=folder != run)
        except BaseException:
            shutil.rmtree(copy, ignore_errors=True)
            raise
        options = {"token": token, "revision": revision, "path_in_repo": path_in_repo, "message": message}
        return hf_api().run_as_future(_upload_copy, copy, str(self.trainer.hub_model_id), {**options, "card": adapter})


def _upload_copy(folder: Path, repo_id: str, options: dict[str, Any]) -> Any:
    """Upload a folder, and delete it."""
    try:
        return publisher().upload(folder, repo_id, **options)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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
