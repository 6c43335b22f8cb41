"""The model card of a training: what is known goes into the adapter's record, and pictures are drawn for it."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer
from typing_extensions import override

from shapadapter.adapter import ShapleyLayer
from shapadapter.atomic import naming
from shapadapter.card import read_config, write_card, write_record
from shapadapter.visual import sample_pictures

from .arguments import ShapleyTrainingArguments
from .describing import data, hardware, measured, settings, versions
from .pushing import own_folder
from .watching import CLASSES, explained


class CardingTrainer(Trainer):
    """`Trainer` that keeps the adapter's record, from which its card is written at every save."""

    args: ShapleyTrainingArguments
    layer: ShapleyLayer
    evaluator: Any
    _saving: bool
    _guarded: Any

    _began: float | None = None
    _minutes = 0.0
    _loaded: tuple[int, int] | None = None  # the length of the log when the best weights were loaded, and their step

    @override
    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        resumed = kwargs.get("resume_from_checkpoint")
        self._minutes = 0.0 if resumed is None else _minutes_of(Path(resumed))
        self._began, self._loaded = time.monotonic(), None
        try:
            return super()._inner_training_loop(*args, **kwargs)
        finally:
            self._minutes, self._began = self._minutes_so_far(), None

    def _minutes_so_far(self) -> float:
        return self._minutes + (0.0 if self._began is None else (time.monotonic() - self._began) / 60)

    @override
    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._loaded = len(self.state.log_history), int(self.state.best_global_step or 0)

    # -- saving ------------------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """`Trainer`'s saving, with a model card; one that is not a checkpoint gets pictures of held-out images.

        Raises:
            DiskFullError: There is no room for it.
        """
        with naming(Path(str(output_dir or self.args.output_dir))):
            super().save_model(output_dir, _internal_call)
        pushed = self.args.push_to_hub and not _internal_call  # which has saved and drawn
        if not self._saving and not pushed:
            self._draw(Path(str(output_dir or self.args.output_dir)))

    @override
    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        config = self._adapter()
        if self.args.should_save and config is not None:
            config.record = self._record(config)
            config.pictures = {}
        super()._save(output_dir, state_dict)

    def _adapter(self) -> Any:
        """The active adapter's configuration; None while adapters are disabled."""
        name = self.layer.active
        return None if name is None else self.accelerator.unwrap_model(self.model).peft_config[name]

    def _record(self, config: Any) -> dict[str, Any]:
        """What is known now; of weights that were not trained here, what was known, and new measurements."""
        found = dict(config.record or {})
        steps = self.state.global_step
        if steps:
            images = self._train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
            found = {name: found[name] for name in ("about", "kind", "players", "quantised") if name in found}
            found["data"] = data(self.train_dataset, self.eval_dataset)
            found["training"] = {
                "steps": steps if self._loaded is None else self._loaded[1],
                "epochs": round(steps * self._epochs_a_step(), 3),
                "minutes": round(self._minutes_so_far(), 2),
                "hardware": hardware(self.args.world_size),
                "settings": settings(self.args, config, images),
            }
            found["versions"] = versions()
        if metrics := measured(self.state.log_history, self._loaded):
            images = getattr(self.evaluator, "images", None)
            found["metrics"] = {**metrics, **({"evaluator_images": images} if isinstance(images, int) else {})}
        if self.args.card_images == 0:
            found["pictures"] = []  # none of an earlier run's either
        return found

    def _epochs_a_step(self) -> float:
        return (self.state.epoch or 0) / max(1, self.state.global_step)

    # -- pictures ----------------------------------------------------------------------------------------------------

    def _draw(self, folder: Path) -> None:
        """Draw held-out images for the card; every process has to call it."""
        config, held_out = self._adapter(), self.eval_dataset
        if isinstance(held_out, Mapping) and not hasattr(held_out, "features"):
            held_out = next(iter(held_out.values()), None)
        if config is None or held_out is None or self.args.card_images == 0:
            return
        try:
            found, labels = explained(self, self._guarded(held_out), self.args.card_images)
        except Exception as error:  # of a data set or collator of the user's: what is trained must not be lost for it
            words = f"The model is saved, but its card has no pictures: {type(error).__name__}: {error}"
            warnings.warn(words, stacklevel=3)
            return
        folder = own_folder(self, folder)
        if not self.args.should_save or not read_config(folder):
            return
        if not torch.isfinite(found.attributions).all():
            warnings.warn("The card has no pictures: attributions are not finite.", stacklevel=3)
            return
        classes = isinstance(labels, torch.Tensor) and labels.ndim == 1 and not labels.is_floating_point()
        numbers = labels.tolist() if classes else None
        config.pictures, listed = sample_pictures(found, CLASSES, numbers)
        config.record = {**(config.record or {}), "pictures": listed, "players": list(found.attributions.shape[1:3])}
        self._rewrite(config, folder)

    def _rewrite(self, config: Any, folder: Path) -> None:
        """Renew the card of a folder and, where these weights were saved to it, record and pictures."""
        known = read_config(folder).get("record") or {}
        same = known.get("weights") == (config.record or {}).get("weights")
        if same:
            write_record(folder, config.record)
        write_card(folder, config.to_dict(), pictures=config.pictures if same else None, tags=config.model_tags)

    # -- the card ----------------------------------------------------------------------------------------------------

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Write the card in `output_dir` with what only a person knows; it is kept for later saves.

        Args:
            language: of the texts, for a model that matches images with texts.
            license: its identifier on the Hub, such as "apache-2.0".
            tags: added to the metadata.
            model_name: the card's title.
            finetuned_from: name of the base model on the Hub, where the model does not know it.
            tasks: added to the tags.
            dataset_tags: names of data sets on the Hub.
            dataset: the data, in words or as names on the Hub.
            dataset_args: which part of the data.
        """
        config = self._adapter()
        if config is None or not self.is_world_process_zero():
            return
        wanted = [one for given in (tags, tasks) for one in ([given] if isinstance(given, str) else given or [])]
        said = {
            "language": language,
            "license": license,
            "tags": wanted,
            "model_name": model_name,
            "finetuned_from": finetuned_from,
            "dataset_tags": dataset_tags,
            "dataset": dataset,
            "dataset_args": dataset_args,
        }
        about = {**(config.record or {}).get("about", {}), **{name: value for name, value in said.items() if value}}
        config.record = {**(config.record or {}), **({"about": about} if about else {})}
        folder = own_folder(self, Path(str(self.args.output_dir)))
        folder.mkdir(parents=True, exist_ok=True)
        self._rewrite(config, folder)


def _minutes_of(checkpoint: Path) -> float:
    """How long the training had taken when a checkpoint was saved."""
    training = (read_config(checkpoint).get("record") or {}).get("training") or {}
    return float(training.get("minutes") or 0)
