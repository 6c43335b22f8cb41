"""A folder of images as a data set: which folders are splits and which are classes, and no file is lost on the way."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL.Image

from shapadapter.core.errors import ShapleyError
from shapadapter.core.phrases import some
from shapadapter.data.images import DECODING_ERRORS

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""What folders of splits may be called, in any case."""
_ARCHIVES = (".zip", ".tar", ".gz", ".tgz")
_LITTER = ("thumbs.db", "desktop.ini", "__macosx", "@eadir")
"""What systems leave in every folder."""

Split = dict[str, list[Path]]
"""The files of each class."""


@dataclass
class Listing:
    """What a folder holds."""

    splits: dict[str, Split] = field(default_factory=dict)
    unread: list[Path] = field(default_factory=list)
    archives: list[Path] = field(default_factory=list)


def image_folder(folder: str | Path, corrupt_images: Literal["fail", "skip"] = "fail") -> Any:
    """The images of a folder with a subfolder for each class, or with `train/`, `validation/` and `test/` above these.

    `datasets.load_dataset("imagefolder")` makes splits of whatever has "train", "test" or "val" anywhere in its path, and
    leaves out the rest. Here only folders directly in `folder` are splits, and only if all folders there are and hold
    folders themselves: `train` beside `car` and `bus` is a class. Hidden files are passed over; every other file is an
    image of its class, or an error.

    Args:
        folder: with the images.
        corrupt_images: whether a file that is no image is an error ("fail") or named in a warning ("skip").

    Returns:
        A `datasets.DatasetDict` of "train", "validation", "test", as far as there are folders for them (without any: "train"), with the columns
        `image` and `label`, classes numbered by the alphabet.

    Raises:
        ShapleyError: the folder leaves open what is a class, a class has no image, or a file is no image.
        ImportError: datasets is missing.
    """
    if find_spec("datasets") is None:
        raise ImportError('A folder is read as a data set of datasets: pip install "shapadapter[train]"')
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, load_dataset

    listing = list_folder(Path(folder))
    if listing.archives:
        parts: dict[str, list[str]] = {}
        for path in listing.archives:
            parts.setdefault(_split_of(path.name.split(".")[0]) or "train", []).append(str(path))
        return load_dataset("imagefolder", data_files=parts)
    if listing.unread:
        files = f"{len(listing.unread)} files in {folder} are no images that can be read: {some(listing.unread)}."
        if corrupt_images == "fail":
            raise ShapleyError(f"{files} Move them elsewhere, or pass corrupt_images='skip' (--corrupt-images skip).")
        warnings.warn(f"{files} They are left out.", stacklevel=2)
    names = sorted({name for split in listing.splits.values() for name in split})
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    number = {name: index for index, name in enumerate(names)}
    return DatasetDict(
        {
            split: Dataset.from_dict(
                {
                    "image": [_as_stored(path) for files in classes.values() for path in files],
                    "label": [number[name] for name, files in classes.items() for _ in files],
                },
                features=features,
            )
            for split, classes in listing.splits.items()
        }
    )


def list_folder(root: Path) -> Listing:
    """Splits, classes and files of a folder, without opening what is an image by its name."""
    listing = Listing()
    folders, files = _inside(root)
    if not folders:
        listing.archives = [path for path in files if path.suffix.lower() in _ARCHIVES]
        if not listing.archives:
            raise no_classes(str(root))
        return listing
    if lost := _images(files, listing):
        raise ShapleyError(f"{len(lost)} images in {root} are in no class folder: {some(lost)}. Move them into one.")
    for split, folder in _splits(root, folders).items():
        listing.splits[split] = _classes(folder, folders if folder == root else _inside(folder)[0], listing)
        if folder != root and (lost := _images(_inside(folder)[1], listing)):
            raise ShapleyError(f"{len(lost)} images in {folder} are in no class folder: {some(lost)}.")
    _check_classes(root, listing.splits)
    return listing


def _splits(root: Path, folders: Sequence[Path]) -> dict[str, Path]:
    """The folder of each split; the root as "train" where there are none."""
    named = {folder: _split_of(folder.name) for folder in folders}
    called = [folder for folder, split in named.items() if split is not None]
    within = {folder: _inside(folder) for folder in called}
    if not called or (len(called) < len(folders) and not any(inner for inner, _ in within.values())):
        return {"train": root}  # classes, whatever they are called
    if len(called) < len(folders) or not all(inner for inner, _ in within.values()):
        others = [folder.name for folder in folders if folder not in called or not within[folder][0]]
        raise ShapleyError(
            f"{root} leaves open what is a class: {some(f.name for f in called)} are called like splits, and "
            f"{some(others)} beside or among them do not fit. Put class folders into every split, e.g. {root}/train/cat/1.png, "
            f"and nothing beside them; or, if these are classes themselves, one folder down: {root}/train/"
            f"{called[0].name}/1.png."
        )
    twice = [split for split, count in Counter(named.values()).items() if count > 1]
    if twice:
        same = [folder.name for folder in folders if named[folder] == twice[0]]
        raise ShapleyError(f"{root} has several folders for the split {twice[0]}: {', '.join(same)}. Keep one.")
    return {str(named[folder]): folder for folder in folders}


def _classes(folder: Path, folders: Sequence[Path], listing: Listing) -> Split:
    """The files of the classes in a folder."""
    found: Split = {}
    for place in folders:
        inner, files = _inside(place)
        if inner:
            raise ShapleyError(
                f"The class folder {place} holds folders: {some(one.name for one in inner)}. Are they classes, or parts of "
                f"{place.name}? Move their images to where class folders are, in {folder}."
            )
        found[place.name] = _images(files, listing)
        if not found[place.name]:
            raise ShapleyError(f"The class folder {place} holds no image. Remove it, or put some there.")
        try:
            place.name.encode()
        except UnicodeEncodeError:
            raise ShapleyError(f"The name of the class folder {str(place)!r} is no UTF-8. Rename it.") from None
    return found


def _check_classes(root: Path, splits: Mapping[str, Split]) -> None:
    """Refuse one class by two names, fewer than two, and classes that are not trained on."""
    names = sorted({name for split in splits.values() for name in split})
    if len(names) < 2:
        raise no_classes(str(root))
    lower: dict[str, str] = {}
    for name in names:
        other = lower.setdefault(name.casefold(), name)
        if other != name:
            raise ShapleyError(
                f"{root} has the class folders {other} and {name}, which differ in case alone. Keep one."
            )
    new = [] if "train" not in splits else sorted(set(names) - set(splits["train"]))
    if new:
        raise ShapleyError(
            f"{root} has no images of {some(new)} to train on, in {root}/train. Remove these classes or add some."
        )


def no_classes(folder: str) -> ShapleyError:
    """The error about a folder without class folders."""
    return ShapleyError(
        f"Expected {folder} to hold a subfolder of images for each class, e.g. {folder}/cat/1.png and {folder}/dog/2.png, "
        "and found fewer than two. If it is the folder of one class, pass the one above it."
    )


def _split_of(name: str) -> str | None:
    return next((split for split, names in SPLITS.items() if name.lower() in names), None)


def _inside(folder: Path) -> tuple[list[Path], list[Path]]:
    """The folders and the files in a folder, without what is hidden."""
    folders: list[Path] = []
    files: list[Path] = []
    around = (*folder.resolve().parents, folder.resolve())
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name.lower() in _LITTER:
            continue
        if path.is_symlink() and (not path.exists() or path.resolve() in around):
            where = "the folder it is in" if path.exists() else f"{path.readlink()}, which is not there"
            raise ShapleyError(f"{path} is a link to {where}. Remove it.")
        if not path.is_dir() and not path.is_file():
            raise ShapleyError(f"{path} is neither a file nor a folder, such as a pipe, and may never end. Remove it.")
        (folders if path.is_dir() else files).append(path)
    return folders, files


def _images(files: Sequence[Path], listing: Listing) -> list[Path]:
    """Those that are images, by their names or else by their first bytes; the others are noted as unread."""
    known = {suffix for suffix, kind in PIL.Image.registered_extensions().items() if kind in PIL.Image.OPEN}
    found = [path for path in files if path.suffix.lower() in known or _opens(path)]
    images = set(found)
    listing.unread += [path for path in files if path not in images]
    return found


def _opens(path: Path) -> bool:
    try:
        with path.open("rb") as file, PIL.Image.open(file):
            return path.is_file()
    except (*DECODING_ERRORS, ValueError):
        return False


def _as_stored(path: Path) -> dict[str, Any]:
    """A file as `datasets` keeps it: by its path or, where that is no UTF-8, as Arrow needs it, by its content."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return {"bytes": path.read_bytes(), "path": None}
    return {"bytes": None, "path": str(path)}


def in_words(splits: Mapping[str, Any]) -> str:
    """How many images and classes there are, and how they are split."""
    counts = {name: len(split) if hasattr(split, "__len__") else None for name, split in splits.items()}
    label = next(iter(splits.values())).features["label"]
    known = [count for count in counts.values() if count is not None]
    total = f"{sum(known):,} images" if len(known) == len(counts) else "A stream of images"
    sizes = "/".join(f"{count:,}" if count is not None else "?" for count in counts.values())
    return f"{total}, {label.num_classes} classes, split {sizes} ({'/'.join(counts)})"


def fifth(labels: Sequence[int], names: Sequence[str], seed: int) -> tuple[list[int], list[int], list[str]]:
    """Rows to train on and to test on: a fifth of each class, at least one, where a class has more than one image."""
    draw, numbers = np.random.default_rng(seed), np.asarray(labels)
    test: list[int] = []
    for label in np.unique(numbers):
        rows = np.flatnonzero(numbers == label)
        count = max(1, round(len(rows) / 5)) if len(rows) > 1 else 0
        test += draw.permutation(rows)[:count].tolist()
    alone = [name for index, name in enumerate(names) if int((numbers == index).sum()) == 1]
    held_out = set(test)
    return [index for index in range(len(numbers)) if index not in held_out], sorted(test), alone
