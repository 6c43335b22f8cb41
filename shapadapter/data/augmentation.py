"""Augmentations that a resumed run repeats: a transform of each image, and images mixed with each other."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from shapadapter.data.images import image_column, open_image
from shapadapter.data.labels import as_row, as_shares


class Augmented(Dataset):
    """A data set by index whose images go through a random transform, the same one for the same seed, epoch and row.

    The transform is called with an upright RGB image and returns what the model sees:

    - a float tensor (3, H, W), which is taken as it is: crop, turn, scale and normalise as the model expects it;
    - an image or array from 0 to 255, or a uint8 tensor (3, H, W), which goes through the image processor as usual.

    While it runs, the generators of Python, NumPy and torch are seeded with (seed, epoch, index), and afterwards they are
    put back. So neither the number of data-loader workers nor an interruption changes what a row becomes, and every
    epoch shows another picture. A transform with a generator of its own has to seed it from one of these.

    Args:
        dataset: rows by index, as dicts with an image column or as pairs (image, label).
        transform: an image to an image or tensor.
        seed: of the augmentations.

    Examples:
        With the transforms of torchvision::

            views = v2.Compose([v2.RandomResizedCrop(224), v2.RandomHorizontalFlip(), v2.PILToTensor(),
                                v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])
            ShapleyTrainer(model, args, train_dataset=Augmented(dataset, views, seed=args.seed), ...)
    """

    def __init__(self, dataset: Any, transform: Callable[[Any], Any], seed: int = 0) -> None:
        self.dataset = dataset
        self.transform = transform
        self.seed = seed
        # Shared with data-loader workers that live longer than an epoch.
        self._epoch = torch.zeros((), dtype=torch.int64, device="cpu").share_memory_()

    @property
    def features(self) -> Any:
        """What the data set tells about its columns, names of classes among it."""
        return getattr(self.dataset, "features", None)

    def __len__(self) -> int:
        return len(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        """Show other pictures from now on; the trainer calls it."""
        self._epoch.fill_(epoch)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = as_row(self.dataset[index])
        column = image_column(row)
        given = row.pop(column)
        image = given if isinstance(given, Tensor | np.ndarray) else open_image(given)
        with seeded(self.seed, int(self._epoch), index % len(self)):
            view = self.transform(image)
        ready = isinstance(view, Tensor) and view.is_floating_point()
        return {**row, "pixel_values" if ready else column: view}


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Draw the random numbers of this key, on the CPU, and put the generators back afterwards; a GPU's goes on as it was."""
    words: Sequence[int] = np.random.SeedSequence(key).generate_state(3).tolist()
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    try:
        random.seed(words[0])
        np.random.seed(words[1])  # noqa: NPY002
        torch.default_generator.manual_seed(words[2])
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])


@dataclass(frozen=True)
class Mix:
    """How the images of one micro-batch are mixed.

    Attributes:
        partners: (B,) which image is mixed in.
        share: of the own image, 0 to 1.
        box: (top, left, height, width) in players of the part that is the partner's; None to blend all pixels.
    """

    partners: Tensor
    share: float
    box: tuple[int, int, int, int] | None


def draw_mix(images: int, players: tuple[int, int], alphas: tuple[float, float], key: tuple[int, ...]) -> Mix:
    """Draw a mix of B images: the share from Beta(alpha, alpha), mixup or cutmix with equal chances where both are on.

    A cutmix box has about the share of players (rows, cols) that Beta says, and the label's share is the one it really has.
    """
    generator = np.random.default_rng(np.random.SeedSequence(key))
    cuts = bool(generator.integers(2)) if min(alphas) > 0 else alphas[1] > 0
    share = float(generator.beta(alphas[cuts], alphas[cuts]))
    partners = torch.from_numpy(generator.permutation(images))  # (B,)
    if not cuts:
        return Mix(partners, share, None)
    side = (1 - share) ** 0.5
    height, width = (round(side * length) for length in players)
    top, left = (
        int(generator.integers(0, length - part + 1)) for length, part in zip(players, (height, width), strict=True)
    )
    return Mix(partners, 1 - height * width / (players[0] * players[1]), (top, left, height, width))


def mix_pictures(pixels: Tensor, mix: Mix, tiling: Any) -> Tensor:
    """The mixed images (B, C, H, W): mixup (Zhang et al. 2018) blends, cutmix (Yun et al. 2019) puts in whole players."""
    others = pixels[mix.partners.to(pixels.device, non_blocking=True)]  # (B, C, H, W)
    if mix.box is None:
        return mix.share * pixels + (1 - mix.share) * others
    (top, left, height, width), (rows, cols) = mix.box, tiling.players
    down, up = (round(row * tiling.seen[0] / rows) for row in (top, top + height))
    start, end = (round(col * tiling.seen[1] / cols) for col in (left, left + width))
    mixed = pixels.clone()
    mixed[..., down:up, start:end] = others[..., down:up, start:end]
    return mixed


def mix_labels(labels: Tensor, mix: Mix, classes: int) -> Tensor:
    """What is in the mixed images: class indices (B,) to shares (B, K)."""
    shares = as_shares(labels, classes)  # (B, K)
    return mix.share * shares + (1 - mix.share) * shares[mix.partners.to(labels.device, non_blocking=True)]
