"""Seeds that depend on what is drawn, not on the order in which it is."""

import zlib

import numpy as np
import torch


def seed_of(seed: int, index: int, purpose: str) -> int:
    """A seed for one purpose and one image: the same in batches of any size, and after an interruption."""
    key = [seed % 2**32, index, zlib.crc32(purpose.encode())]
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def generator_of(seed: int, index: int, purpose: str) -> torch.Generator:
    """A generator with that seed, on the CPU."""
    return torch.Generator().manual_seed(seed_of(seed, index, purpose))
