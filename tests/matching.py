"""Tiny matching models whose text towers know the special tokens of their tokenizers, with pictures to go with them."""

import copy
import functools

import families
import numpy as np
import texts
import zoo
from families import WIDTH
from PIL import Image

from shapadapter.data.collator import prepare_texts, text_rules
from shapadapter.data.images import prepare_images

SIGMOID = ("siglip", "siglip2")
PATCHED = ("siglip2",)
FIELDS = ("logits", "attributions", "null_values", "image_embeds", "embedding_attributions", "null_embeds")

processor = functools.cache(texts.processor)


@functools.cache
def _base(family):
    tokenizer = processor(family).tokenizer
    special = {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    tower = {**zoo._TEXT_TOWER, **special, "eos_token_id": tokenizer.eos_token_id}
    size = {"projection_dim": 24, "projection_size": WIDTH, "project_dim": 24}
    return zoo.build(f"{family}_model", text_config={**tower, **size})


def base(family="clip"):
    """A copy of the family's one base model: the same weights at every call."""
    return copy.deepcopy(_base(family))


@functools.cache
def _wrapped(family, prediction, config):
    return families.wrap(base(family), prediction, **dict(config))


def wrapped(family="clip", prediction="vote", **config):
    """A copy of a wrapped model in eval mode, its adapter stirred unless `trained=False`."""
    return copy.deepcopy(_wrapped(family, prediction, tuple(config.items())))


def pictures(count=3, side=32, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    return [Image.fromarray(pixels) for pixels in noise]


def images(family="clip", count=3, seed=0):
    """What the family's image processor makes of pictures."""
    return prepare_images(pictures(count, seed=seed), processor(family))


def tokens(family, captions):
    """What the family's text tower takes."""
    return prepare_texts(captions, processor(family), text_rules(_base(family)))


def naflex(image, rows, cols, patch=8):
    """An image (3, rows * p, cols * p) as the patches of a NaFlex model, one image in the batch."""
    import torch

    tiles = image.unflatten(1, (rows, patch)).unflatten(3, (cols, patch)).permute(1, 3, 2, 4, 0)
    return {
        "pixel_values": tiles.reshape(1, rows * cols, -1),
        "pixel_attention_mask": torch.ones(1, rows * cols, dtype=torch.long),
        "spatial_shapes": torch.tensor([[rows, cols]]),
    }
