"""A look at some rows of a data set."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sized
from typing import Any

from torch.utils.data import IterableDataset


def some_rows(dataset: Any, count: int) -> Iterator[Any]:
    """Up to `count` rows, evenly spread from the first to the last; of a stream, which has no length, the first ones."""
    streamed = isinstance(dataset, IterableDataset)  # which has the method of data sets by index, but it only raises
    if not streamed and isinstance(dataset, Sized) and hasattr(dataset, "__getitem__"):
        count = min(len(dataset), count)
        # From end to end: a whole share of the length as the step would meet one class only where classes take turns.
        return (dataset[index * (len(dataset) - 1) // max(1, count - 1)] for index in range(count))
    return itertools.islice(iter(dataset), count)
