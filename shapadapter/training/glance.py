"""A look at some rows of a data set that leaves no trace in the training."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sized
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset


def some_rows(dataset: Any, count: int) -> Iterator[Any]:
    """Up to `count` rows, evenly spread over a data set that has a length; the first ones of a stream."""
    streamed = isinstance(dataset, IterableDataset)  # which has the method of data sets by index, but it only raises
    if not streamed and isinstance(dataset, Sized) and hasattr(dataset, "__getitem__"):
        count = min(len(dataset), count)
        return (dataset[index * len(dataset) // count] for index in range(count))
    return itertools.islice(iter(dataset), count)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Draw the same random numbers every time, and put the generators back: augmentations draw from them."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            random.seed(0)
            np.random.seed(0)  # noqa: NPY002
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
