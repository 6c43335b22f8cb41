"""The fine-tuning script behind `shapadapter train`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL.Image
from datasets import ClassLabel, Dataset, DatasetDict, Image, IterableDataset, IterableDatasetDict, load_dataset
from peft import PeftModel, get_peft_model
from peft.utils import CONFIG_NAME
from transformers import AutoModelForImageClassification, HfArgumentParser, set_seed

from shapadapter.adapter import ShapleyConfig
from shapadapter.core.documents import read_json
from shapadapter.core.errors import ShapleyError, UnreadableImageError
from shapadapter.core.files import report_full_disk
from shapadapter.core.phrases import some
from shapadapter.core.remote import HUB_ERRORS, find_base, hub_trouble, is_path
from shapadapter.data.folders import fifth, image_folder, in_words, list_folder, no_classes
from shapadapter.data.images import open_image
from shapadapter.data.processors import load_processor
from shapadapter.explanation.api import explain
from shapadapter.training.arguments import ShapleyTrainingArguments
from shapadapter.training.checkpoints import discard, last_complete_checkpoint, newest_first, running_alone
from shapadapter.training.trainer import ShapleyTrainer
from shapadapter.visual import gallery


def check_model(name: str) -> None:
    """Refuse what is no base model: a path to no folder, or an adapter."""
    folder = Path(name)
    _refuse_missing(name)
    if not (folder / CONFIG_NAME).is_file():
        return
    base = None
    with suppress(ShapleyError):  # else as the adapter names it, if it can be read
        base = read_json(folder / CONFIG_NAME).get("base_model_name_or_path")
        base = base and find_base(folder, str(base))
    which = f", {base}" if base else ""
    raise ShapleyError(f"{name} is an adapter, not a model to start from: pass its base model{which}.")


def check_data(name: str) -> None:
    """Refuse a path to no folder, and a folder that leaves open what its classes are."""
    _refuse_missing(name)
    if Path(name).is_dir():
        list_folder(Path(name))


def check_output(folder: Path, resumed: str | None, overwrite: bool) -> bool:
    """Refuse to start a training where another one has left an adapter or checkpoints, unless it may go.

    `resumed` is what to go on from, if anything: a path, "True", or "last". Returns whether the training starts from nothing.
    """
    checkpoints = newest_first(folder)
    if resumed not in (None, "False", "false") and (resumed != "last" or checkpoints):
        return False
    left = [path for path in (folder / CONFIG_NAME, *checkpoints) if path.exists()]
    if left and not overwrite:
        raise ShapleyError(
            f"{folder} holds an earlier training ({left[0].name}). Go on with it by --resume-from-checkpoint last, choose another "
            "folder, or pass --overwrite to lose it."
        )
    return True


def beside(name: str) -> str:
    """Where to look for a name that is taken for one on the Hub, though its first part is a folder here; or nothing."""
    parent = Path(name).parent
    return f" There is a folder {parent} here: check the path." if parent.name and parent.is_dir() else ""


def columns(features: Mapping[str, Any], label: str | None, name: str | None, folder: str | None) -> tuple[str, str]:
    """The columns of images and of classes (`label`, if it was named) of a data set or a folder."""
    images = [one for one, feature in features.items() if isinstance(feature, Image)]
    classes = [one for one, feature in features.items() if isinstance(feature, ClassLabel)]
    if folder is not None and (not images or not classes):
        raise no_classes(folder)
    if not images or not classes or (label is not None and label not in classes):
        named = images and label is not None
        wanted = f"a column {label!r} of classes" if named else "a column of images and one of classes"
        raise ShapleyError(
            f"Expected {wanted} (Image and ClassLabel of datasets), got {sorted(features)} from {name}."
        )
    return images[0], label or classes[0]


def _refuse_missing(name: str) -> None:
    if is_path(name) and not Path(name).is_dir():
        raise ShapleyError(f"There is no folder {name}.")


# Of a stream from a folder, to be shared out among processes and workers.
_SHARDS = 256


@dataclass
class ScriptArguments:
    """Model, data and adapter; everything else is a training argument."""

    model_name_or_path: str = field(metadata={"help": "Vision model, on the Hub or in a local folder."})
    dataset_name: str | None = field(default=None, metadata={"help": "Data set on the Hub."})
    image_folder: str | None = field(default=None, metadata={"help": "Local folder, one subfolder per class."})
    label_column: str | None = field(default=None, metadata={"help": "Column of labels, if there are several."})
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    test_split: str | None = field(
        default=None, metadata={"help": "Split to evaluate on: 'test', 'validation', or a fifth of the training."}
    )
    prediction: Literal["vote", "classifier"] = field(
        default="vote", metadata={"help": "The logits: sum of the attributions, or the model's own classifier."}
    )
    tune: Literal["lora", "frozen", "full"] = field(default="lora", metadata={"help": "How the backbone is trained."})
    streaming: bool = field(
        default=False, metadata={"help": "Read the data while training, without storing them; needs --max_steps."}
    )
    lora_rank: int = field(default=16, metadata={"help": "Rank of the LoRA updates."})
    explained_images: int = field(default=8, metadata={"help": "Held-out images to explain at the end."})
    overwrite: bool = field(
        default=False, metadata={"help": "Start again in a folder with an earlier training, which is deleted."}
    )

    def __post_init__(self) -> None:
        if (self.dataset_name is None) == (self.image_folder is None):
            raise ValueError("Pass either --dataset_name or --image_folder.")


def load_images(
    args: ScriptArguments, seed: int, corrupt_images: Literal["fail", "skip"] = "fail"
) -> DatasetDict | IterableDatasetDict:
    """Splits `train` and `test` with the columns `image` and `label`; how many images there are is printed."""
    splits = _chosen(args, corrupt_images)
    alone: list[str] = []
    if "test" not in splits:
        label = splits["train"].features["label"]
        train, test, alone = fifth(splits["train"].with_format("numpy")["label"], label.names, seed)
        if not test:
            raise ShapleyError(
                "Expected two images or more of some class, to hold one out for testing. Pass --test_split."
            )
        splits = DatasetDict({"train": splits["train"].select(train), "test": splits["train"].select(test)})
    if os.environ.get("RANK", "0") == "0":
        note = f"; classes with one image, which is trained on and not tested: {some(alone)}" if alone else ""
        sys.stdout.write(f"{in_words(splits)}{note}\n")
    if not args.streaming:
        return splits
    if isinstance(splits, DatasetDict):
        streams = {name: part.to_iterable_dataset(min(len(part), _SHARDS)) for name, part in splits.items()}
        # Before anything is done with the columns, or a damaged file would end the stream.
        splits = IterableDatasetDict(streams).cast_column("image", Image(decode=False))
    splits["train"] = splits["train"].shuffle(seed=seed, buffer_size=1000)
    return splits


def _chosen(args: ScriptArguments, corrupt_images: Literal["fail", "skip"]) -> DatasetDict | IterableDatasetDict:
    """The splits to train and, if there is one, to test on, with the columns `image` and `label`."""
    if args.image_folder is not None:
        check_data(args.image_folder)
        splits = image_folder(args.image_folder, corrupt_images)
    else:
        splits = load_dataset(args.dataset_name, streaming=args.streaming)
    held_out = args.test_split or next((name for name in ("test", "validation") if name in splits), None)
    held_out = None if held_out == args.train_split and args.test_split is None else held_out
    if held_out is None and isinstance(splits, IterableDatasetDict):
        raise ValueError(f"A stream cannot be split; pass --test_split, one of {list(splits)}.")
    chosen = {"train": args.train_split} if held_out is None else {"train": args.train_split, "test": held_out}
    for name in chosen.values():
        if name not in splits:
            raise ShapleyError(
                f"There is no split {name!r}; there are {', '.join(splits)}. Pass --train_split, --test_split."
            )
    splits = type(splits)({new: splits[old] for new, old in chosen.items()})
    features = splits["train"].features
    image, label = columns(features, args.label_column, args.dataset_name, args.image_folder)
    if isinstance(splits, IterableDatasetDict):
        # Before anything is done with the columns, or a damaged file would end the stream.
        splits = splits.cast_column(image, Image(decode=False))
    splits = splits.select_columns([image, label])
    return splits.rename_columns({old: new for old, new in ((image, "image"), (label, "label")) if old != new})


def readable(rows: Dataset | IterableDataset) -> Iterator[PIL.Image.Image]:
    """The images without the damaged ones, which `--corrupt_images skip` has left out before."""
    for row in rows.cast_column("image", Image(decode=False)):
        with suppress(UnreadableImageError):
            yield open_image(row["image"])


def accuracy(evaluation: tuple[np.ndarray, np.ndarray]) -> dict[str, float]:
    """Share of correct predictions."""
    logits, labels = evaluation
    return {"accuracy": float(np.mean(logits.argmax(axis=-1) == labels))}


def wrapped(args: ScriptArguments, names: list[str]) -> PeftModel:
    """The base model with room for these classes, and an adapter."""
    try:
        base = AutoModelForImageClassification.from_pretrained(
            args.model_name_or_path,
            id2label=dict(enumerate(names)),
            label2id={name: index for index, name in enumerate(names)},
            ignore_mismatched_sizes=True,
        )
    except HUB_ERRORS as error:
        name = args.model_name_or_path
        reason = None if Path(name).is_dir() else hub_trouble(error, name)
        if reason is None:
            raise
        raise ShapleyError(f"{name} is no folder here. {reason}{beside(name)}") from error
    # A checkpoint with as many other classes would leave a classifier that is not new.
    trained = True if args.prediction == "classifier" else None
    config = ShapleyConfig(r=args.lora_rank, prediction=args.prediction, tune=args.tune, train_classifier=trained)
    return get_peft_model(base, config)


def resumed_from(training_args: ShapleyTrainingArguments) -> str | None:
    """What `--resume_from_checkpoint` means: with `last` the newest complete checkpoint, or a fresh start before the first."""
    wish, folder = training_args.resume_from_checkpoint, str(training_args.output_dir)
    return last_complete_checkpoint(folder) if wish == "last" else wish


def clear_output(args: ScriptArguments, training_args: ShapleyTrainingArguments) -> None:
    """Refuse a fresh training in the folder of another one; with `--overwrite` delete the other's checkpoints."""
    folder = Path(str(training_args.output_dir))
    fresh = check_output(folder, training_args.resume_from_checkpoint, args.overwrite)
    if fresh and training_args.should_save:
        for checkpoint in newest_first(folder):  # or the next run could go on from one of them
            discard(checkpoint)


def finish(trainer: ShapleyTrainer, training: dict[str, float], test: Dataset | IterableDataset, count: int) -> None:
    """Save the adapter, measure it, and explain `count` held-out images: explanations.html and attributions.png."""
    trainer.save_model()  # the adapter, with the processor beside it: nothing is lost if measuring fails
    for split, metrics in (("train", training), ("eval", trainer.evaluate())):
        trainer.log_metrics(split, metrics)
        trainer.save_metrics(split, metrics)
    trainer.save_model(_internal_call=True)  # again, with the results in the card; not pushed, as all is at the end
    held_out = list(islice(readable(test.shuffle(seed=trainer.args.seed)), count))
    if not held_out:
        return
    # In every process: under FSDP and ZeRO-3 each holds a part of the weights.
    model: Any = trainer.model
    explanation = explain(model, held_out, trainer.processing_class, top_k=3)
    if trainer.is_world_process_zero():
        folder = Path(str(trainer.args.output_dir))
        explanation.save_html(folder / "explanations.html")
        gallery(explanation).savefig(folder / "attributions.png")


def main(args: ScriptArguments, training_args: ShapleyTrainingArguments) -> None:
    """Train, save, evaluate, explain; while no other run writes into the same folder."""
    with running_alone(training_args, str(training_args.output_dir)):
        _train(args, training_args)


def _train(args: ScriptArguments, training_args: ShapleyTrainingArguments) -> None:
    check_model(args.model_name_or_path)
    set_seed(training_args.seed)  # adapter and classifier start from random numbers
    with training_args.main_process_first(desc="loading the images"):
        images = load_images(args, training_args.seed, training_args.corrupt_images)
    clear_output(args, training_args)
    trainer = ShapleyTrainer(
        wrapped(args, images["train"].features["label"].names),
        training_args,
        train_dataset=images["train"],
        eval_dataset=images["test"],
        processing_class=load_processor(args.model_name_or_path),
        compute_metrics=accuracy,
    )
    result = trainer.train(resume_from_checkpoint=resumed_from(training_args))
    with report_full_disk(Path(str(training_args.output_dir))):
        finish(trainer, result.metrics, images["test"], args.explained_images)
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset=args.dataset_name)
    trainer.accelerator.end_training()  # torch may abort a process that ends with its group open


def parser() -> Any:
    """What the script takes: its own arguments and those of the training."""
    both: Any = (ScriptArguments, ShapleyTrainingArguments)
    return HfArgumentParser(both)


if __name__ == "__main__":
    try:
        main(*parser().parse_args_into_dataclasses())
    except KeyboardInterrupt:
        sys.exit(130)
    except (ShapleyError, OSError, ValueError) as error:
        sys.exit(f"Error: {error}")
