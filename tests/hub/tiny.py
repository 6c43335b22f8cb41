"""The base model of these tests: a tiny ViT of 16 players and three classes, which is `ada/tiny-vit` on the server."""

import json
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


def with_code(files, trace):
    """The files of the base, {name: bytes}, as a model of a class of its own, whose code leaves a file where it runs."""
    code = (
        f"open({str(trace)!r}, 'w').close()\n"
        "from transformers import ViTConfig, ViTForImageClassification\n"
        "class OwnConfig(ViTConfig):\n    model_type = 'own'\n"
        "class OwnModel(ViTForImageClassification):\n    config_class = OwnConfig\n"
    )
    config = json.loads(files["config.json"]) | {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForImageClassification": "own.OwnModel"},
    }
    return {**files, "config.json": json.dumps(config).encode(), "own.py": code.encode()}
