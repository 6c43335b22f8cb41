"""Real pictures with known masks: photographs of objects, cut out, on backgrounds of another photograph or of noise.

The objects are the photographic stamps of the drawing program Tux Paint (`apt-get install tuxpaint-stamps-default`, or
`--stamps FOLDER`), the photograph is scikit-learn's `china.jpg`. A test object is never seen in training. The alpha
channel of an object is its mask, so that it is known where the evidence for its class can be.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.random import Generator, SeedSequence, default_rng
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_sample_image
from torch.utils.data import Dataset

STAMPS = Path("/usr/share/tuxpaint/stamps")
FOLDERS = {
    "bird": ["animals/birds"],
    "mammal": ["animals/mammals", "animals/marsupials"],
    "small animal": ["animals/insects", "animals/fish", "animals/shellfish", "animals/amphibians", "animals/lizards"],
    "fruit": ["food/fruit", "food/nuts"],
    "vegetable": ["food/vegetables", "food/spices"],
    "plant": ["plants"],
    "vehicle": ["vehicles"],
    "tool": ["household"],
}
NAMES = tuple(FOLDERS)
SIDE = 112
MEAN, SPREAD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@lru_cache(maxsize=1)
def cut_outs(folder: Path = STAMPS) -> tuple[tuple[int, Image.Image], ...]:
    """Class and RGBA picture of every object, cropped to what is opaque, at most `SIDE` pixels wide and high."""
    if not folder.is_dir():
        raise SystemExit(f"No stamps in {folder}. Type: apt-get install tuxpaint-stamps-default, or pass --stamps.")
    found = []
    for index, places in enumerate(FOLDERS.values()):
        for path in sorted(path for place in places for path in (folder / place).rglob("*.png")):
            picture = Image.open(path).convert("RGBA")
            opaque = np.asarray(picture)[..., 3] > 128  # (H, W)
            # Drawings are not photographs, and a stamp without a transparent part has no mask.
            if "cartoon" not in str(path) and 0.05 < opaque.mean() < 0.98:
                picture = picture.crop(Image.fromarray(opaque).getbbox())
                picture.thumbnail((SIDE, SIDE))
                found.append((index, picture))
    return tuple(found)


def split(folder: Path = STAMPS, share: float = 0.25) -> tuple[list[int], list[int]]:
    """Indices of training and test objects: of each class the same share is held out, always the same objects."""
    classes = np.array([index for index, _ in cut_outs(folder)])  # (O,)
    train: list[int] = []
    test: list[int] = []
    for index in range(len(NAMES)):
        members = default_rng(index).permutation(np.flatnonzero(classes == index)).tolist()
        held_out = round(share * len(members))
        test, train = test + members[:held_out], train + members[held_out:]
    return train, test


class ObjectScenes(Dataset[dict[str, Any]]):
    """Every object on `placements` backgrounds; the same index always gives the same picture.

    Args:
        objects: indices into `cut_outs`.
        placements: pictures of each object.
        seed: of positions, sizes and backgrounds.
        folder: of the stamps.
    """

    def __init__(self, objects: list[int], placements: int, seed: int, folder: Path = STAMPS) -> None:
        self.objects, self.placements, self.seed, self.folder = objects, placements, seed, folder
        self.made: dict[int, tuple[int, NDArray[np.uint8], NDArray[np.bool_]]] = {}

    def __len__(self) -> int:
        return len(self.objects) * self.placements

    def __getitem__(self, item: int) -> dict[str, Any]:
        label, picture, _ = self.scene(item)
        scaled = (picture / 255 - np.array(MEAN)) / np.array(SPREAD)  # (H, W, 3)
        return {"pixel_values": torch.from_numpy(scaled).permute(2, 0, 1).float(), "labels": label}  # (3, H, W)

    def scene(self, item: int) -> tuple[int, NDArray[np.uint8], NDArray[np.bool_]]:
        """Class, picture (H, W, 3) and mask (H, W) of one scene."""
        if not 0 <= item < len(self):
            raise IndexError(f"There is no scene {item} among {len(self)}.")
        if item not in self.made:
            self.made[item] = self._compose(item)
        return self.made[item]

    def _compose(self, item: int) -> tuple[int, NDArray[np.uint8], NDArray[np.bool_]]:
        random = default_rng(SeedSequence([self.seed, item]))
        label, stamp = cut_outs(self.folder)[self.objects[item % len(self.objects)]]
        if random.random() < 0.5:
            stamp = stamp.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        scale = random.uniform(0.45, 0.8) * SIDE / max(stamp.size)
        stamp = stamp.resize((max(4, round(stamp.width * scale)), max(4, round(stamp.height * scale))))
        left, top = (int(random.integers(SIDE - length + 1)) for length in stamp.size)
        scene = Image.fromarray(_background(random))
        scene.paste(stamp, (left, top), stamp)
        mask = Image.new("L", (SIDE, SIDE))
        mask.paste(stamp.getchannel("A"), (left, top))
        bright = np.clip(np.asarray(scene, dtype=float) * random.uniform(0.7, 1.2), 0, 255)  # (H, W, 3)
        return label, bright.astype(np.uint8), np.asarray(mask) > 128


def _background(random: Generator) -> NDArray[np.uint8]:
    """A crop of the photograph, or coloured noise of several scales, (H, W, 3)."""
    if random.random() < 0.5:
        photo = load_photo()
        side = int(random.integers(SIDE, 300))
        top, left = (int(random.integers(length - side)) for length in photo.shape[:2])
        crop = Image.fromarray(photo[top : top + side, left : left + side])
        return np.asarray(crop.resize((SIDE, SIDE)))
    noise = np.zeros((SIDE, SIDE, 3))
    for cells in (2, 5, 14, 40):
        coarse = random.normal(size=(cells, cells, 3)) / cells**0.5
        layers = [Image.fromarray(coarse[..., c].astype(np.float32)).resize((SIDE, SIDE)) for c in range(3)]
        noise += np.stack([np.asarray(layer) for layer in layers], axis=-1)
    return np.clip(random.uniform(60, 190, size=3) + 60 * noise, 0, 255).astype(np.uint8)


@lru_cache(maxsize=1)
def load_photo() -> NDArray[np.uint8]:
    """scikit-learn's photograph of a palace, (427, 640, 3)."""
    return np.asarray(load_sample_image("china.jpg"))
