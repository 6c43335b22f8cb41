"""What the fine-tuning script starts from, looked at before anything is loaded: a base model, and images with classes."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Image
from peft.utils import CONFIG_NAME

from shapadapter.errors import CheckpointError, ShapleyError
from shapadapter.loading import find_base
from shapadapter.reading import read_json
from shapadapter.remote import hub_trouble, is_path

from .checkpoints import newest_first
from .folders import list_folder, no_classes


def check_model(name: str) -> None:
    """Refuse what is no base model.

    Raises:
        ShapleyError: it can only be a folder and is none, or it is an adapter.
    """
    folder = Path(name)
    if not folder.is_dir():
        _refuse_path(name)
        return
    file = folder / CONFIG_NAME
    if not file.is_file():
        return
    base = None
    with suppress(CheckpointError):
        base = read_json(file).get("base_model_name_or_path")
    if base:
        with suppress(ShapleyError):  # else as the adapter names it
            base = find_base(folder, str(base))
    which = f", {base}" if base else ""
    raise ShapleyError(f"{name} is an adapter, not a model to start from: pass its base model{which}.")


def check_data(name: str) -> None:
    """Refuse what can only be a folder and is none, and a folder that leaves open what its classes are.

    Raises:
        ShapleyError: it is one of these.
    """
    if not Path(name).is_dir():
        _refuse_path(name)
        return
    list_folder(Path(name))


def check_output(folder: Path, resumed: str | None, overwrite: bool) -> bool:
    """Refuse to start a training where another one has left an adapter or checkpoints.

    Args:
        folder: of the training.
        resumed: what it is to go on from, if anything: a path, "True", or "last".
        overwrite: whether what is there may go.

    Returns:
        Whether the training starts from nothing.

    Raises:
        ShapleyError: there is something, and nobody said that it may go.
    """
    checkpoints = newest_first(folder)
    if resumed not in (None, "False", "false") and (resumed != "last" or checkpoints):
        return False
    left = [path for path in (folder / CONFIG_NAME, *checkpoints) if path.exists()]
    there = left[0].name if left else None
    if there is not None and not overwrite:
        raise ShapleyError(
            f"{folder} holds an earlier training ({there}). Go on with it by --resume-from-checkpoint last, choose another "
            "folder, or pass --overwrite to lose it."
        )
    return True


def beside(name: str) -> str:
    """Where to look, for a name that is taken for one on the Hub, though its first part is a folder here; or nothing."""
    parent = Path(name).parent
    return f" There is a folder {parent} here: check the path." if parent.name and parent.is_dir() else ""


def columns(features: Mapping[str, Any], label: str | None, name: str | None, folder: str | None) -> tuple[str, str]:
    """The columns of images and of classes.

    Args:
        features: of the data set.
        label: the column of classes, if it was named.
        name: of the data set.
        folder: with the images, instead of a name.

    Raises:
        ShapleyError: one is missing.
    """
    images = [one for one, feature in features.items() if isinstance(feature, Image)]
    classes = [one for one, feature in features.items() if isinstance(feature, ClassLabel)]
    if folder is not None and (not images or not classes):
        raise no_classes(folder)
    if not images or not classes or (label is not None and label not in classes):
        wanted = (
            f"a column {label!r} of classes"
            if images and label is not None
            else "a column of images and one of classes"
        )
        raise ShapleyError(
            f"Expected {wanted} (Image and ClassLabel of datasets), got {sorted(features)} from {name}."
        )
    return images[0], label or classes[0]


def not_loaded(name: str, error: BaseException) -> ShapleyError | None:
    """What an error of loading a model from the Hub means, or None if the error is of another kind."""
    trouble = None if Path(name).is_dir() else hub_trouble(error, name)
    return None if trouble is None else ShapleyError(f"{name} is no folder here. {trouble}{beside(name)}")


def _refuse_path(name: str) -> None:
    if is_path(name):
        raise ShapleyError(f"There is no folder {name}.")
