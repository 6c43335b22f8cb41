"""What a trainer knows of its data, settings and results, for the model card."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sized
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer
from typing_extensions import override

from shapadapter.adapter import ShapleyLayer
from shapadapter.core.files import naming
from shapadapter.hub.card.facts import read_config, write_record
from shapadapter.hub.card.render import write_card
from shapadapter.training.arguments import ShapleyTrainingArguments
from shapadapter.training.callbacks import CLASSES, explained
from shapadapter.training.publish import own_folder
from shapadapter.visual import sample_pictures

# Names of readers of files, which say nothing about the data.
_READERS = (
    "arrow",
    "audiofolder",
    "csv",
    "generator",
    "imagefolder",
    "json",
    "pandas",
    "parquet",
    "text",
    "webdataset",
)
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
_MANY = 10


def settings(args: Any, config: Any, batch_size: int) -> dict[str, Any]:
    """The arguments that decide about the result.

    Args:
        args: the training arguments.
        config: of the adapter.
        batch_size: images in a step, over all processes.
    """
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
    inner = _innermost(train if train is not None else held_out)
    info = getattr(inner, "info", None)
    sources = [str(url) for url in getattr(info, "download_checksums", None) or {}]
    ids = [url.removeprefix("hf://datasets/").split("@")[0] for url in sources if url.startswith("hf://datasets/")]
    names = [getattr(info, key, None) for key in ("dataset_name", "builder_name")]
    kind = type(inner)
    names += [kind.__name__] if kind.__module__.startswith("torchvision.") and kind.__name__ != "ImageFolder" else []
    name = next((str(name) for name in names if name and str(name) not in _READERS), None)
    counts = {"train_images": _length(train), "eval_images": _length(held_out)}
    found: dict[str, Any] = {"name": name, "id": ids[0] if ids else None, **counts}
    return {key: value for key, value in found.items() if value is not None}


def _innermost(dataset: Any) -> Any:
    """The data set inside of those that change or choose its rows."""
    seen = 0
    while hasattr(dataset, "dataset") and seen < _MANY:
        dataset, seen = dataset.dataset, seen + 1
    return dataset


def _length(dataset: Any) -> int | None:
    if isinstance(dataset, Mapping):
        lengths = [_length(part) for part in dataset.values()]
        return sum(length for length in lengths if length is not None) or None
    try:
        return len(dataset) if isinstance(dataset, Sized) else None
    except TypeError:  # a stream
        return None


def measured(history: list[dict[str, Any]], loaded: tuple[int, int] | None) -> dict[str, Any]:
    """What the evaluations found of the weights as they are.

    Args:
        history: the trainer's log.
        loaded: where the best checkpoint was loaded at the end: how long the log was then, and the checkpoint's step.

    Returns:
        `step` and `values` by name; empty without an evaluation.
    """
    step = -1
    values: dict[str, Any] = {}
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


def versions() -> dict[str, str]:
    """Of the packages on which the numbers depend."""
    return {name: metadata.version(name) for name in ("shapadapter", "torch", "transformers", "peft")}


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
