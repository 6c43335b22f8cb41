"""A look at some rows of a data set."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sized
from typing import Any

from torch.utils.data import IterableDataset


def some_rows(dataset: Any, count: int) -> Iterator[Any]:
    """Up to `count` rows, evenly spread over a data set that has a length; the first ones of a stream."""
    streamed = isinstance(dataset, IterableDataset)  # which has the method of data sets by index, but it only raises
    if not streamed and isinstance(dataset, Sized) and hasattr(dataset, "__getitem__"):
        count = min(len(dataset), count)
        return (dataset[index * len(dataset) // count] for index in range(count))
    return itertools.islice(iter(dataset), count)
