"""The base model of these tests: a tiny ViT of 16 players and three classes, which is `ada/tiny-vit` on the server."""

from pathlib import Path

import torch
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

HERE = Path(__file__).parent
BASE = "ada/tiny-vit"
NAMES = {0: "red", 1: "green", 2: "blue"}


def save_base(folder, seed=0):
    """The model and its processor as files; another seed gives other weights."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    names = {"id2label": NAMES, "label2id": {name: index for index, name in NAMES.items()}}
    config = ViTConfig(**sizes, image_size=32, patch_size=8, **names)
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder
