"""What a trainer knows of its data, settings and results, for the model card."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Mapping, Sized
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from typing_extensions import override

from shapadapter.adapter import ShapleyLayer
from shapadapter.adapter.saving import publisher, read_config, write_record
from shapadapter.core.files import report_full_disk
from shapadapter.training.arguments import ShapleyTrainingArguments
from shapadapter.training.callbacks import CLASSES, explained
from shapadapter.training.publish import PushingTrainer, own_folder
from shapadapter.visual import sample_pictures

# Names of readers of files, which say nothing about the data.
_READERS = re.compile("arrow|audiofolder|csv|generator|imagefolder|json|pandas|parquet|text|webdataset")
_SETTINGS = (
    "learning_rate",
    "head_learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "optim",
    "weight_decay",
    "max_grad_norm",
    "shapley_weight",
    "shapley_warmup",
    "coalition_pairs",
    "coalition_gradients",
    "coalition_task_weight",
    "class_weights",
    "mixup_alpha",
    "cutmix_alpha",
    "label_smoothing_factor",
    "seed",
)
_ADAPTER = ("tune", "prediction", "removal", "shapley_token", "head_width")
_LORA = ("r", "lora_alpha", "lora_dropout")
_PACKAGES = ("shapadapter", "torch", "transformers", "peft")
_MANY = 10


def settings(args: Any, config: Any, batch_size: int) -> dict[str, Any]:
    """The arguments that decide about the result; `batch_size` counts the images of a step, over all processes."""
    found = {name: _plain(getattr(args, name)) for name in _SETTINGS}
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
    names = (*_ADAPTER, *_LORA) if config.tune == "lora" else _ADAPTER
    own = {name: _plain(getattr(config, name)) for name in names}
    targets = config.target_modules
    modules = targets if isinstance(targets, str) else ", ".join(sorted(targets or ()))
    lora = {"target_modules": modules} if config.tune == "lora" else {}
    known = {"batch_size": batch_size, **found, "precision": precision, **own, **lora}
    # What is off says nothing, but the seed 0 does.
    return {name: value for name, value in known.items() if value not in (None, False, 0) or name == "seed"}


def _plain(value: Any) -> Any:
    """The value as json takes it; of a long list how long it is."""
    value = getattr(value, "value", value)
    if isinstance(value, list | tuple):
        return f"{len(value)} numbers" if len(value) > _MANY else ", ".join(f"{one:g}" for one in value)
    return value if isinstance(value, int | float | str | bool | None) else str(value)


def data(train: Any, held_out: Any) -> dict[str, Any]:
    """Name of the data, if it has one, and numbers of images."""
    inner = train if train is not None else held_out
    for _ in range(_MANY):  # inside of data sets that change or choose rows
        inner = getattr(inner, "dataset", inner)
    info = getattr(inner, "info", None)
    sources = [str(url) for url in getattr(info, "download_checksums", None) or {}]
    ids = [url.removeprefix("hf://datasets/").split("@")[0] for url in sources if url.startswith("hf://datasets/")]
    names = [getattr(info, key, None) for key in ("dataset_name", "builder_name")]
    kind = type(inner)
    names += [kind.__name__] if kind.__module__.startswith("torchvision.") and kind.__name__ != "ImageFolder" else []
    name = next((str(name) for name in names if name and not _READERS.fullmatch(str(name))), None)
    counts = {"train_images": _length(train), "eval_images": _length(held_out)}
    found: dict[str, Any] = {"name": name, "id": ids[0] if ids else None, **counts}
    return {key: value for key, value in found.items() if value is not None}


def _length(dataset: Any) -> int | None:
    if isinstance(dataset, Mapping):
        return sum(_length(part) or 0 for part in dataset.values()) or None
    try:
        return len(dataset) if isinstance(dataset, Sized) else None
    except TypeError:  # a stream
        return None


def measured(history: list[dict[str, Any]], loaded: tuple[int, int] | None) -> dict[str, Any]:
    """What the evaluations found of the weights as they are: `step` and `values` by name; empty without an evaluation.

    `loaded` says where the best checkpoint was loaded at the end: how long the log was then, and the checkpoint's step.
    """
    step, values = -1, dict[str, Any]()
    for place, entry in enumerate(history):
        found = {
            name: value
            for name, value in entry.items()
            if name.startswith(("eval_", "test_")) and isinstance(value, int | float)
        }
        old = loaded is not None and place < loaded[0] and entry.get("step") != loaded[1]
        if not found or old:
            continue
        at = int(entry.get("step", 0)) if loaded is None else loaded[1]
        step, values = at, {**(values if at == step else {}), **found}
    return {"step": step, "values": values} if values else {}


def hardware(world_size: int) -> str:
    """The devices in a word."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return f"{world_size} x {name}" if world_size > 1 or name != "CPU" else name


class RecordingTrainer(PushingTrainer):
    """`Trainer` that keeps the adapter's record, from which its card is written at every save."""

    args: ShapleyTrainingArguments
    layer: ShapleyLayer
    evaluator: Any
    _saving: bool
    _guarded: Any

    _began: float | None = None
    _minutes = 0.0
    _loaded: tuple[int, int] | None = None  # the length of the log when the best weights were loaded, and their step
    _drawn: tuple[dict[str, bytes], dict[str, Any]] | None = (
        None  # pictures for the save in progress, and what to record
    )

    @override
    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        resumed = kwargs.get("resume_from_checkpoint")
        before = {} if resumed is None else (read_config(Path(resumed)).get("record") or {}).get("training") or {}
        self._minutes = float(before.get("minutes") or 0)
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
        """`Trainer`'s saving, with a model card; one that is not a checkpoint gets pictures of held-out images."""
        pushed = self.args.push_to_hub and not _internal_call  # which saves once more
        self._drawn = None if self._saving or pushed else self._draw()
        try:
            with report_full_disk(Path(str(output_dir or self.args.output_dir))):
                super().save_model(output_dir, _internal_call)
        finally:
            self._drawn = None

    @override
    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        config = self._adapter()
        if not self.args.should_save or config is None:
            super()._save(output_dir, state_dict)
            return
        config.pictures, listed = self._drawn or ({}, {})
        config.record = {**self._record(config), **listed}
        try:
            super()._save(output_dir, state_dict)
        finally:
            config.pictures = {}  # from now on, they are files
            config.source = own_folder(self, Path(output_dir or str(self.args.output_dir)))

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
                "epochs": round(float(self.state.epoch or 0), 3),
                "minutes": round(self._minutes_so_far(), 2),
                "hardware": hardware(self.args.world_size),
                "settings": settings(self.args, config, images),
            }
            found["versions"] = {name: metadata.version(name) for name in _PACKAGES}
        if metrics := measured(self.state.log_history, self._loaded):
            images = getattr(self.evaluator, "images", None)
            found["metrics"] = {**metrics, **({"evaluator_images": images} if isinstance(images, int) else {})}
        if self.args.card_images == 0:
            found["pictures"] = []  # none of an earlier run's either
        return found

    def _draw(self) -> tuple[dict[str, bytes], dict[str, Any]] | None:
        """Pictures of held-out images for the card, and what to record of them; every process has to call it."""
        held_out = self.eval_dataset
        if isinstance(held_out, Mapping) and not hasattr(held_out, "features"):
            held_out = next(iter(held_out.values()), None)
        if self._adapter() is None or held_out is None or self.args.card_images == 0:
            return None
        try:
            found, labels = explained(self, self._guarded(held_out), self.args.card_images)
        except Exception as error:  # of a data set or collator of the user's: what is trained must not be lost for it
            warnings.warn(f"The card has no pictures: {type(error).__name__}: {error}", stacklevel=3)
            return None
        if not self.args.should_save:
            return None
        if not torch.isfinite(found.attributions).all():
            warnings.warn("The card has no pictures: attributions are not finite.", stacklevel=3)
            return None
        classes = isinstance(labels, torch.Tensor) and labels.ndim == 1 and not labels.is_floating_point()
        pictures, listed = sample_pictures(found, CLASSES, labels.tolist() if classes else None)
        return pictures, {"pictures": listed, "players": list(found.attributions.shape[1:3])}

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
        """Write the card in `output_dir` with what only a person knows; it is kept for later saves."""
        self.note_about(**{name: value for name, value in locals().items() if name != "self"})
        config = self._adapter()
        if config is None or not self.is_world_process_zero():
            return
        folder = own_folder(self, Path(str(self.args.output_dir)))
        folder.mkdir(parents=True, exist_ok=True)
        known = read_config(folder).get("record") or {}
        if known.get("weights") == (config.record or {}).get("weights"):  # else they were not saved to it
            write_record(folder, config.record)
        publisher().write_card(folder, config.to_dict(), tags=config.model_tags)

    def note_about(self, **about: Any) -> None:
        """Keep what only a person knows for this card and later ones; arguments as of `create_model_card`."""
        if (config := self._adapter()) is None:
            return
        both = [about.pop(name, None) or [] for name in ("tags", "tasks")]
        about["tags"] = [one for given in both for one in ([given] if isinstance(given, str) else given)]
        known = {**(config.record or {}).get("about", {}), **{name: value for name, value in about.items() if value}}
        config.record = {**(config.record or {}), **({"about": known} if known else {})}
