"""Every test starts from the same seed and never asks the network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# On AMD's processors MKL rounds a product by where in memory its factors lie, unless it is told which instructions to use.
# Weights that safetensors reads lie elsewhere than those that were trained; equal ones shall give equal bits.
os.environ.setdefault("MKL_CBWR", "AVX2")

import random
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # So does a shell with what it starts in the background, and processes would hand it on to those that tests interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _seeded():
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - processors and data sets draw from it
    torch.manual_seed(0)
