"""Tiny random models of every supported family: 32 features, 2 blocks, 4 heads, 32 x 32 pixels, 16 patches."""

import copy
import functools
from pathlib import Path

import torch
from transformers import (
    CLIPConfig,
    CLIPForImageClassification,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    IJepaConfig,
    IJepaForImageClassification,
    MetaClip2Config,
    MetaClip2ForImageClassification,
    SiglipConfig,
    SiglipForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTMSNConfig,
    ViTMSNForImageClassification,
)

LABELS = {0: "ant", 1: "bee", 2: "cat", 3: "dog", 4: "eel"}
SIDE, PATCH, PLAYERS, CLASSES, WIDTH, DEPTH, HEADS = 32, 8, 16, 5, 32, 2, 4

_PROCESSOR = Path("/proc/cpuinfo")
_ROUNDS_BY_PLACE = _PROCESSOR.is_file() and "AuthenticAMD" in _PROCESSOR.read_text()

_SIZE = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS}
_VISION = {**_SIZE, "intermediate_size": 64}
_TEXT = {**_VISION, "vocab_size": 99, "max_position_embeddings": 16}
_IMAGE = {"image_size": SIDE, "patch_size": PATCH}
_NAMES = {"id2label": LABELS, "label2id": {label: index for index, label in LABELS.items()}}


def _flat(model_class, config_class, **more):
    return lambda **own: model_class(config_class(**{**_VISION, **_IMAGE, **_NAMES, **more, **own}))


def _matching(model_class, config_class):
    def make(**own):
        names = {key: own.pop(key) for key in tuple(own) if key in ("id2label", "label2id", "num_labels")}
        vision = {**_VISION, **_IMAGE, **own}
        return model_class(config_class(text_config=dict(_TEXT), vision_config=vision, **{**_NAMES, **names}))

    return make


MAKERS = {
    "vit": _flat(ViTForImageClassification, ViTConfig),
    "deit": _flat(DeiTForImageClassification, DeiTConfig),
    "deit_teacher": _flat(DeiTForImageClassificationWithTeacher, DeiTConfig),
    "vit_msn": _flat(ViTMSNForImageClassification, ViTMSNConfig),
    "dinov2": _flat(Dinov2ForImageClassification, Dinov2Config, mlp_ratio=2),
    "dinov2_registers": _flat(
        Dinov2WithRegistersForImageClassification, Dinov2WithRegistersConfig, mlp_ratio=2, num_register_tokens=3
    ),
    "ijepa": _flat(IJepaForImageClassification, IJepaConfig),
    "clip": _matching(CLIPForImageClassification, CLIPConfig),
    "metaclip2": _matching(MetaClip2ForImageClassification, MetaClip2Config),
    "siglip": _matching(SiglipForImageClassification, SiglipConfig),
}
FAMILIES = tuple(MAKERS)
PREFIX = {
    "vit": 1,
    "deit": 2,
    "deit_teacher": 2,
    "vit_msn": 1,
    "dinov2": 1,
    "dinov2_registers": 4,
    "ijepa": 0,
    "clip": 1,
    "metaclip2": 1,
    "siglip": 0,
}


def build(family, seed=0, **config):
    """A fresh model in eval mode; nothing in it is zero, so that nothing is right by accident."""
    torch.manual_seed(seed)
    return randomise(MAKERS[family](**config), seed).eval()


@functools.cache
def _cached(family):
    return build(family)


def base(family):
    """A copy of the family's one base model: the same weights at every call."""
    return copy.deepcopy(_cached(family))


@torch.no_grad()
def randomise(model, seed=0):
    """Replace parameters that initialisation leaves constant (biases, position tables, LayerScale, norms)."""
    generator = torch.Generator().manual_seed(seed + 1)
    for name, parameter in model.named_parameters():
        if parameter.numel() > 1 and parameter.std() < 1e-6:
            noise = 0.1 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_((0.5 if "lambda" in name else parameter.flatten()[0]) + noise)
        elif "position" in name:
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        elif parameter.ndim > 1:
            # The usual 0.02 makes all attention uniform, so that keys and masks hardly matter.
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5)
    return model


def same_bits(one, other):
    """Whether two results of equal weights are equal: in every bit, but for the last ones where a processor rounds by place.

    On AMD's, kernels round by where in memory the weights lie, and those of a file lie elsewhere; what MKL_CBWR mends for
    MKL (see conftest.py) stays for convolutions. A wrong weight is far off.
    """
    close = one.shape == other.shape and (one - other).abs().max() <= 5e-6 * max(1.0, float(other.abs().max()))
    return torch.equal(one, other) or (_ROUNDS_BY_PLACE and bool(close))


def images(batch=2, height=SIDE, width=SIDE, seed=0):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(100 + seed))


def coalitions(batch=2, count=5, players=PLAYERS, seed=0):
    """Random coalitions (B, M, N) of mixed sizes, with the empty and the full one among them."""
    generator = torch.Generator().manual_seed(200 + seed)
    share = torch.rand(batch, count, 1, generator=generator)
    chosen = torch.rand(batch, count, players, generator=generator) < share
    chosen[:, 0], chosen[:, -1] = True, False
    return chosen


@torch.no_grad()
def stir(model, seed=0, only=None):
    """Give an adapter's parameters (LoRA, token, head, null) values as if it had been trained; returns the model."""
    generator = torch.Generator().manual_seed(seed + 7)
    blocks = shapley(model).anatomy.blocks
    for name, parameter in model.named_parameters():
        if "lora_" not in name or (only is not None and only not in name.split(".")):
            continue
        noise = torch.randn(parameter.shape, generator=generator)
        if "shapley_token." in name:
            noise *= 2
        elif "norm" in name:
            noise = 1 + 0.2 * noise
        elif not blocks and "lora_shapley" not in name:  # LoRA of dozens of layers in a row
            noise *= 0.3 / parameter[0].numel() ** 0.5
        else:
            noise *= 0.4
        parameter.copy_(noise)
    return model


def wrap(family_or_model, prediction="vote", trained=True, **config):
    """A wrapped model in eval mode, its adapter stirred unless `trained` is False."""
    from peft import get_peft_model

    from shapadapter import ShapleyConfig

    model = base(family_or_model) if isinstance(family_or_model, str) else family_or_model
    config.setdefault("r", 4)
    # Stirred weights are large, and attributions of a wide branch would be so too: rounding would hide what is looked for.
    config.setdefault("head_width", 64)
    wrapped = get_peft_model(model, ShapleyConfig(prediction=prediction, **config))
    return (stir(wrapped) if trained else wrapped).eval()


def shapley(model):
    """The Shapley layer of a wrapped model."""
    from shapadapter.adapter import ShapleyLayer

    return next(module for module in model.modules() if isinstance(module, ShapleyLayer))


def remove_noise(pixels, coalition, scale=30.0, seed=0):
    """The images (B, 3, H, W) with other pixels wherever `coalition` (B, N) says absent."""
    rows, cols = pixels.shape[2] // PATCH, pixels.shape[3] // PATCH
    absent = ~coalition.unflatten(1, (rows, cols))
    tiles = absent.repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)[:, None]
    noise = scale * torch.randn(pixels.shape, generator=torch.Generator().manual_seed(300 + seed))
    return torch.where(tiles, noise, pixels)
