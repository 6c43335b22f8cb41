"""What is kept of a training to be seen: data, settings, results and pictures for the model card, maps at evaluations."""

from __future__ import annotations

import io
import re
import time
import warnings
from collections.abc import Iterator, Mapping, Sized
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import TrainerCallback
from transformers.integrations.integration_utils import TensorBoardCallback, WandbCallback

from shapadapter.adapter.saving import publisher, read_config, write_record
from shapadapter.core.files import atomic_file
from shapadapter.data.augmentation import seeded
from shapadapter.data.collator import TEXT_COLUMNS, find_column
from shapadapter.data.rows import some_rows
from shapadapter.explanation.api import explain
from shapadapter.explanation.explanation import Explanation
from shapadapter.training.publish import own_folder
from shapadapter.training.validation import are_several
from shapadapter.visual import gallery, sample_pictures

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
_CLASSES = 3  # maps beside each image: those of its likeliest classes


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


class Record:
    """What a trainer keeps of its data, settings and results; the adapter's card is written from it at every save."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self._minutes = 0.0
        self._began: float | None = None
        self._loaded: tuple[int, int] | None = None  # how long the log was when the best weights came, and their step

    @contextmanager
    def timed(self, checkpoint: str | None) -> Iterator[None]:
        """A training, whose minutes add up to those of the run it goes on with."""
        before = (
            {} if checkpoint is None else (read_config(Path(checkpoint)).get("record") or {}).get("training") or {}
        )
        self._minutes, self._loaded = float(before.get("minutes") or 0), None
        self._began = time.monotonic()
        try:
            yield
        finally:
            self._minutes, self._began = self._minutes_so_far(), None

    def _minutes_so_far(self) -> float:
        return self._minutes + (0.0 if self._began is None else (time.monotonic() - self._began) / 60)

    def best_loaded(self) -> None:
        """The model has the weights of the best checkpoint from now on."""
        state = self.trainer.state
        self._loaded = len(state.log_history), int(state.best_global_step or 0)

    def config(self) -> Any:
        """The active adapter's configuration; None while adapters are disabled."""
        name = self.trainer.layer.active
        return None if name is None else self.trainer.accelerator.unwrap_model(self.trainer.model).peft_config[name]

    @contextmanager
    def kept_in(self, folder: Path, with_pictures: bool) -> Iterator[None]:
        """Around the saving of the model: the record goes with it, and pictures of held-out images where they are wanted."""
        drawn = self._draw() if with_pictures else None
        config = self.config()
        if config is None or not self.trainer.args.should_save:
            yield
            return
        config.pictures, listed = drawn or ({}, {})
        config.record = {**self._known(config), **listed}
        try:
            yield
        finally:
            config.pictures = {}  # from now on, they are files
            config.source = own_folder(self.trainer, folder)

    def _known(self, config: Any) -> dict[str, Any]:
        """What is known now; of weights that were not trained here, what was known, and new measurements."""
        trainer, args, state = self.trainer, self.trainer.args, self.trainer.state
        found = dict(config.record or {})
        if state.global_step:
            images = trainer._train_batch_size * args.gradient_accumulation_steps * args.world_size
            found = {name: found[name] for name in ("about", "kind", "players", "quantised") if name in found}
            found["data"] = data(trainer.train_dataset, trainer.eval_dataset)
            found["training"] = {
                "steps": state.global_step if self._loaded is None else self._loaded[1],
                "epochs": round(float(state.epoch or 0), 3),
                "minutes": round(self._minutes_so_far(), 2),
                "hardware": hardware(args.world_size),
                "settings": settings(args, config, images),
            }
            found["versions"] = {name: metadata.version(name) for name in _PACKAGES}
        if metrics := measured(state.log_history, self._loaded):
            images = getattr(trainer.evaluator, "images", None)
            found["metrics"] = {**metrics, **({"evaluator_images": images} if isinstance(images, int) else {})}
        if args.card_images == 0:
            found["pictures"] = []  # none of an earlier run's either
        return found

    def _draw(self) -> tuple[dict[str, bytes], dict[str, Any]] | None:
        """Pictures of held-out images for the card, and what to record of them; every process has to call it."""
        trainer, held_out = self.trainer, self.trainer.eval_dataset
        if are_several(held_out):
            held_out = next(iter(held_out.values()), None)
        if self.config() is None or held_out is None or trainer.args.card_images == 0:
            return None
        try:
            found, labels = explained(trainer, trainer.guarded(held_out), trainer.args.card_images)
        except Exception as error:  # of a data set or collator of the user's: what is trained must not be lost for it
            warnings.warn(f"The card has no pictures: {type(error).__name__}: {error}", stacklevel=3)
            return None
        if not trainer.args.should_save:
            return None
        if not torch.isfinite(found.attributions).all():
            warnings.warn("The card has no pictures: attributions are not finite.", stacklevel=3)
            return None
        classes = isinstance(labels, torch.Tensor) and labels.ndim == 1 and not labels.is_floating_point()
        pictures, listed = sample_pictures(found, _CLASSES, labels.tolist() if classes else None)
        return pictures, {"pictures": listed, "players": list(found.attributions.shape[1:3])}

    def write_card(self, about: dict[str, Any]) -> None:
        """Write the card in `output_dir` with what only a person knows."""
        self.note_about(about)
        config = self.config()
        if config is None or not self.trainer.is_world_process_zero():
            return
        folder = own_folder(self.trainer, Path(str(self.trainer.args.output_dir)))
        folder.mkdir(parents=True, exist_ok=True)
        known = read_config(folder).get("record") or {}
        if known.get("weights") == (config.record or {}).get("weights"):  # else they were not saved to it
            write_record(folder, config.record)
        publisher().write_card(folder, config.to_dict(), tags=config.model_tags)

    def note_about(self, about: dict[str, Any]) -> None:
        """Keep what only a person knows for this card and later ones; arguments as of `create_model_card`."""
        if (config := self.config()) is None:
            return
        given = [about.get(name) or [] for name in ("tags", "tasks")]
        tags = [one for several in given for one in ([several] if isinstance(several, str) else several)]
        about = {name: value for name, value in {**about, "tasks": None, "tags": tags}.items() if value}
        known = {**(config.record or {}).get("about", {}), **about}
        config.record = {**(config.record or {}), **({"about": known} if known else {})}


def explained(trainer: Any, dataset: Any, images: int) -> tuple[Explanation, Any]:
    """Explain some images of a data set as the trainer's model sees them; every process has to call it."""
    with seeded(0), trainer.compute_loss_context_manager():
        rows = list(some_rows(dataset, images))
        texts = None
        if trainer.matching:  # what the images are compared with: their captions, each once
            column = find_column(rows[0], TEXT_COLUMNS)
            assert column is not None, "the collator has refused rows without texts"
            texts = list(dict.fromkeys(row[column] for row in rows))
        batch = trainer.data_collator(rows)
        found = explain(trainer.model, batch, trainer.processing_class, texts=texts, top_k=_CLASSES)
        return found, batch.get("labels")


class AttributionMaps(TrainerCallback):
    """Draw the attribution maps of a few held-out images at each evaluation; `log_attributions=4` adds it.

    The images are spread evenly over the evaluation data and always the same, so that their maps can be followed from
    evaluation to evaluation. The picture goes where the trainer reports to: to TensorBoard and Weights & Biases, else to
    `output_dir/attributions/eval-000100.png`. Training goes on as if nothing had been drawn: model and random generators
    are left as they were.

    Every process runs the forward pass, because a sharded model needs them all, and the main process alone writes.
    """

    def __init__(self, trainer: Any, images: int) -> None:
        self.trainer = trainer
        self.images = images

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Explain, draw and write."""
        explanation, _ = explained(self.trainer, kwargs["eval_dataloader"].dataset, self.images)
        if not state.is_world_process_zero:
            return
        if not torch.isfinite(explanation.attributions).all():
            warnings.warn(f"No maps are drawn at step {state.global_step}: attributions are not finite.", stacklevel=2)
            return
        # Several evaluation sets have prefixes of their own, which stand nowhere but in the metrics' names.
        name = next(key.removesuffix("_runtime") for key in kwargs["metrics"] if key.endswith("_runtime"))
        file = io.BytesIO()
        gallery(explanation, max_classes=_CLASSES).savefig(file, format="png", dpi=100)
        self._write(Image.open(file).convert("RGB"), name, state.global_step, Path(args.output_dir) / "attributions")

    def _write(self, picture: Image.Image, name: str, step: int, folder: Path) -> None:
        taken = False
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                pixels = np.asarray(picture)  # (H, W, 3)
                callback.tb_writer.add_image(f"attributions/{name}", pixels, step, dataformats="HWC")
                taken = True
            elif isinstance(callback, WandbCallback):
                import wandb

                wandb.log({f"attributions/{name}": wandb.Image(picture), "train/global_step": step})
                taken = True
        if not taken:
            folder.mkdir(parents=True, exist_ok=True)
            with atomic_file(folder / f"{name}-{step:06d}.png") as file:
                picture.save(file, format="png")
