"""Augmentations that a resumed run repeats."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from shapadapter.data.images import image_column, open_image
from shapadapter.data.labels import as_row


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
