"""A disk without room, and what is on it."""

from contextlib import contextmanager

import pytest


@contextmanager
def small_disk(most: int):
    """No file can have more bytes; writing more fails half-way, as on a full disk."""
    resource = pytest.importorskip("resource")
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, usual[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
