"""A tiny wrapped ViT of 9 players (24 x 24 pixels) or 16, four classes, and pictures for it."""

import copy
import functools

import numpy as np
import torch
from families import randomise
from peft import get_peft_model
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from shapadapter import ShapleyConfig

CLASSES = 4
NAMES = dict(enumerate(["ant", "bee", "cat", "dog"]))


@functools.cache
def _bare(rows):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    names = {"id2label": NAMES, "label2id": {label: index for index, label in NAMES.items()}}
    config = ViTConfig(**sizes, image_size=8 * rows, patch_size=8, **names)
    return randomise(ViTForImageClassification(config)).eval()


def bare(rows=3):
    return copy.deepcopy(_bare(rows))


def wrapped(rows=3, **config):
    """A model whose adapter is no longer what it was initialised to."""
    base = bare(rows)  # the first of them draws numbers, too
    torch.manual_seed(1)
    model = get_peft_model(base, ShapleyConfig(r=4, **config)).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def processor(rows=3):
    return ViTImageProcessorPil(size={"height": 8 * rows, "width": 8 * rows})


def pictures(count=8, side=40):
    noise = np.random.default_rng(0).integers(0, 256, (count, 5, 5, 3), dtype=np.uint8)
    return [Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC) for pixels in noise]


def rows_of(count=8, **columns):
    """Rows with an image and a label each, and more columns, which are lists."""
    images = pictures(count)
    more = [{name: values[index] for name, values in columns.items()} for index in range(count)]
    return [{"image": images[index], "label": index % CLASSES, **more[index]} for index in range(count)]


SMALL = {"images": 2, "truth_evaluations": 256, "budgets": (16, 64), "progress": False}
