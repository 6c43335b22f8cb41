"""What a trainer knows of its data, settings and results: plain values for the model card, without paths and tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from importlib import metadata
from typing import Any

import torch

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
