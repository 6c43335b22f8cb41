"""A tiny checkpoint for the demo Space, with class names that nobody wants in a page, and the maps it should draw."""

import numpy as np
import torch
from peft import get_peft_model
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification
from transformers import ViTImageProcessorPil as Processor

from shapadapter import ShapleyConfig
from shapadapter.visual import overlay

SCRIPT = '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script>'
TEMPLATE = "${window.hacked=1} {{7*7}} `**bold**` [x](javascript:window.hacked=1) \u202e"
NAMES = (SCRIPT, TEMPLATE, "plain")


def write_checkpoint(root):
    """The folder of an adapter beside that of its base model, among files that concern nobody."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    names = dict(enumerate(NAMES))
    base = ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=8, id2label=names))
    base.save_pretrained(root / "base-model")
    model = get_peft_model(ViTForImageClassification.from_pretrained(root / "base-model"), ShapleyConfig(r=4))
    torch.manual_seed(1)
    for name, value in model.named_parameters():
        if "shapley" in name:
            torch.nn.init.normal_(value, std=0.3)
    model.save_pretrained(str(root / "adapter"))
    Processor(size={"height": 32, "width": 32}).save_pretrained(root / "adapter")
    (root / "adapter" / "README.md").write_text("---\nlicense: mit\n---\n# Adapter\n")
    for folder in ("adapter", "base-model"):
        for name in ("training_args.bin", "optimizer.pt", "secret.txt", "pytorch_model.bin"):
            (root / folder / name).write_bytes(b"secret")
    return root / "adapter"


def noise(side=64, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def enlarged(explanation):
    return np.asarray(Image.fromarray(explanation.images[0].numpy()).resize((512, 512), Image.Resampling.BICUBIC))


def expected_map(explanation, index, limit, kept=16):
    values = explanation.for_label(index)[0].numpy().copy()
    values.flat[np.abs(values).ravel().argsort()[: values.size - kept]] = 0
    return overlay(enlarged(explanation), values.repeat(128, 0).repeat(128, 1), limit)
