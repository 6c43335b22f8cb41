"""Tiny random models of every family: every image classifier of transformers, and more."""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import transformers
from families import _IMAGE, _NAMES, _TEXT, _VISION, CLASSES, HEADS, MAKERS, PATCH, PREFIX, SIDE, WIDTH, randomise
from torch import nn
from torch.nn import functional as F

SEQUENCE, READOUT, MATCHING, REFUSED = ("sequence", "readout", "matching", "refused")
NATIVE, INTERPOLATED, FIXED = {}, {"interpolate_pos_encoding": True}, None
END, PAD, WORDS = 98, 1, 8
NAFLEX_SHAPES, NAFLEX_LENGTH = ((4, 4), (3, 5), (2, 6)), 18
IMAGE_START, IMAGE, IMAGE_END = 95, 96, 97


def _pixels(entry, batch, seed, size):
    """Blotches and noise: noise alone looks much the same to a network once it is averaged."""
    generator = torch.Generator().manual_seed(100 + seed)
    blotches = torch.randn(batch, entry.channels, 4, 4, generator=generator)
    noise = torch.randn(batch, entry.channels, *size, generator=generator)
    return {"pixel_values": F.interpolate(blotches, size, mode="bicubic", align_corners=False) + 0.5 * noise}


def _naflex(entry, batch, seed, size):
    """Images of one shape, which depends on the seed, cut into patches and padded: `size` says nothing here."""
    shapes = torch.tensor([NAFLEX_SHAPES[seed % len(NAFLEX_SHAPES)] for _ in range(batch)])
    patches = torch.zeros(batch, NAFLEX_LENGTH, entry.channels * PATCH**2)
    for index, (rows, cols) in enumerate(shapes.tolist()):
        image = _pixels(entry, batch, seed, (rows * PATCH, cols * PATCH))["pixel_values"][index]
        tiles = image.unflatten(1, (rows, PATCH)).unflatten(3, (cols, PATCH)).permute(1, 3, 2, 4, 0)
        patches[index, : rows * cols] = tiles.reshape(rows * cols, -1)
    mask = torch.arange(NAFLEX_LENGTH) < shapes.prod(1, keepdim=True)
    return {"pixel_values": patches, "pixel_attention_mask": mask.long(), "spatial_shapes": shapes}


def _with_texts(images):
    """Adds one text for each class, the same ones for every seed, of unequal lengths."""

    def take(entry, batch, seed, size):
        ids = torch.randint(2, END, (CLASSES, WORDS), generator=torch.Generator().manual_seed(400))
        lengths = WORDS - torch.arange(CLASSES)[:, None] % 3
        place = torch.arange(WORDS)
        ids = ids.where(place < lengths, PAD).where(place != lengths - 1, END)
        return {**images(entry, batch, seed, size), "input_ids": ids, "attention_mask": (place < lengths).long()}

    return take


def _colours(entry, batch, seed, size):
    return {"input_ids": torch.randint(0, 16, (batch, 16), generator=torch.Generator().manual_seed(100 + seed))}


def _prompt(entry, batch, seed, size):
    ids = torch.tensor([2, IMAGE_START, IMAGE, IMAGE, IMAGE, IMAGE, IMAGE_END, 7, 8, 9]).repeat(batch, 1)
    marks = {"attention_mask": torch.ones_like(ids), "token_type_ids": (ids == IMAGE).long()}
    return {**_pixels(entry, batch, seed, size), "input_ids": ids, **marks}


@dataclass(frozen=True)
class Entry:
    """One family: how to make it, what it takes, and where its final feature map comes out."""

    kind: str
    make: Callable[..., nn.Module]
    features: str = ""  # the module whose output is the final map, or holds it as `last_hidden_state`
    shape: tuple[int, ...] = ()  # of that map, for one image of `size`
    layout: str = "CHW"  # or "NC" (`prefix` tokens, then the cells row by row), "units" (hiera), "latents" (perceiver)
    prefix: int = 0
    size: tuple[int, int] = (64, 64)
    channels: int = 3
    resized: dict | None = field(default_factory=dict)  # what forward needs for another, oblong size; None: refuses
    takes: Callable[..., dict] = _pixels

    @property
    def grid(self):
        """Rows and columns of the final map, where it has some (all maps here are square)."""
        if self.layout == "CHW":
            return self.shape[1:]
        return None if self.layout == "latents" else (round((self.shape[0] - self.prefix) ** 0.5),) * 2


def _make(model, config, **settings):
    """A maker that hands out copies: LevitForImageClassification changes the lists in its config."""

    def make(**own):
        fresh = copy.deepcopy({**_NAMES, **settings, **own})
        return getattr(transformers, model)(getattr(transformers, config)(**fresh))

    return make


def _classifier(family, **settings):
    return _make(f"{family}ForImageClassification", f"{family}Config", **settings)


_TEXT_TOWER = {**_TEXT, "bos_token_id": 2, "eos_token_id": END, "pad_token_id": PAD}


def _matcher(family, vision):
    text = {**_TEXT_TOWER, "projection_dim": 24, "projection_size": WIDTH, "project_dim": 24}
    vision = {**_VISION, "projection_dim": 24, **vision}
    return _make(f"{family}Model", f"{family}Config", text_config=text, vision_config=vision, projection_dim=24)


_BEIT = {**_VISION, **_IMAGE, "layer_scale_init_value": 0.5}
_OWN, _SHARED = {"use_relative_position_bias": True}, {"use_shared_relative_position_bias": True}
_NAFLEX = {"patch_size": PATCH, "num_patches": 16}
_SWIN = {"image_size": 64, "embed_dim": 8, "depths": [2, 2, 1, 1], "num_heads": [1, 2, 4, 4], "window_size": 2}
_STAGES = {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1]}
_PVT = {**_STAGES, "num_attention_heads": [1, 2, 2, 4], "mlp_ratios": [2, 2, 2, 2]}
_FOCALNET = {"image_size": 64, "embed_dim": 8, "hidden_sizes": [16, 32, 32, 32], "depths": [1, 1, 1, 1]}
_HIERA = {"embed_dim": 8, "image_size": [64, 64], "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 4], "mlp_ratio": 2.0}
_LEVIT = {"image_size": 128, "hidden_sizes": [16, 24, 32], "num_attention_heads": [2, 3, 4]}
_LEVIT |= {"key_dim": [4, 4, 4], "depths": [1, 1, 1]}
_CVT = {"embed_dim": [16, 16, 32], "num_heads": [1, 1, 2], "depth": [1, 2, 3], "mlp_ratio": [2.0, 2.0, 2.0]}
_MOBILEVIT = {"image_size": 64, "hidden_sizes": [16, 16, 24], "neck_hidden_sizes": [8, 8, 8, 8, 16, 16, 32]}
_MOBILEVITV2 = {"image_size": 64, "width_multiplier": 0.125, "n_attn_blocks": [1, 1, 1]}
_SWIFTFORMER = {"depths": [2, 1, 1, 2], "embed_dims": [8, 16, 16, 32], "layer_scale_init_value": 0.5}
_EFFICIENTNET = {"width_coefficient": 0.1, "depth_coefficient": 0.3, "hidden_dim": 128}
_MOBILENETV2 = {"depth_multiplier": 0.125, "expand_ratio": 2.0, "finegrained_output": False}
_HGNET = {"embedding_size": 8, "stem_channels": [3, 8, 8], "stage_in_channels": [8, 8, 16, 16]}
_HGNET |= {"stage_mid_channels": [8, 8, 8, 8], "stage_out_channels": [8, 16, 16, 32]}
_HGNET |= {"stage_num_blocks": [1, 1, 1, 1], "stage_numb_of_layers": [2, 2, 2, 2]}
_TEXTNET = {"stem_out_channels": 8, "hidden_sizes": [8, 8, 16, 16, 32]}
_TEXTNET |= {"conv_layer_strides": [[2], [2, 1], [2, 1], [2]]}
_TEXTNET |= {"conv_layer_kernel_sizes": [[[3, 3]], [[3, 3], [1, 3]], [[3, 3], [3, 1]], [[3, 3]]]}
_PERCEIVER = {"num_latents": 8, "d_latents": 32, "qk_channels": 32, "v_channels": 32, "num_self_attends_per_block": 2}
_PERCEIVER |= {"num_self_attention_heads": 4, "num_cross_attention_heads": 1, "image_size": 16}
_DINAT = {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 4], "kernel_size": 3, "dilations": [[1]] * 4}
_IMAGEGPT = {"vocab_size": 17, "n_positions": 16, "n_embd": WIDTH, "n_layer": 2, "n_head": HEADS}
_GEMMA = {**_TEXT, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8}
_SHIELDGEMMA = {"text_config": _GEMMA, "vision_config": {**_VISION, **_IMAGE}, "mm_tokens_per_image": 4}
_SHIELDGEMMA |= {"boi_token_index": IMAGE_START, "image_token_id": IMAGE, "eoi_token_index": IMAGE_END}
_SHIELDGEMMA |= {"yes_token_index": 10, "no_token_index": 11, "id2label": {0: "yes", 1: "no"}, "label2id": None}


def _sequence(make, features, tokens, prefix=1, kind=SEQUENCE, size=(SIDE, SIDE), resized=NATIVE, takes=_pixels):
    return Entry(kind, make, features, (tokens, WIDTH), "NC", prefix, size, resized=resized, takes=takes)


def _readout(make, features, shape=(32, 2, 2), **more):
    return Entry(READOUT, make, features, shape, "CHW" if len(shape) == 3 else "NC", **more)


def _levit(model):
    make = _make(model, "LevitConfig", **_LEVIT)
    return _readout(make, "levit", (4, 32), size=(128, 128), resized=FIXED)


def _perceiver(model, width, size=16, resized=NATIVE):
    make = _make(f"PerceiverForImageClassification{model}", "PerceiverConfig", **_PERCEIVER, d_model=width)
    return Entry(READOUT, make, "perceiver", (8, 32), "latents", size=(size, size), resized=resized)


def _matching(family, tokens=17, prefix=1, resized=INTERPOLATED):
    make, takes = _matcher(family, _IMAGE), _with_texts(_pixels)
    return _sequence(make, "vision_model", tokens, prefix, MATCHING, resized=resized, takes=takes)


def _plain(family, features):
    tokens = PREFIX[family] + (SIDE // PATCH) ** 2
    return _sequence(MAKERS[family], features, tokens, PREFIX[family], resized=INTERPOLATED)


ZOO = {
    # Token sequences that know places by their embeddings alone.
    "vit": _plain("vit", "vit"),
    "deit": _plain("deit", "deit"),
    "deit_teacher": _plain("deit_teacher", "deit"),
    "vit_msn": _plain("vit_msn", "vit"),
    "dinov2": _plain("dinov2", "dinov2"),
    "dinov2_registers": _plain("dinov2_registers", "dinov2_with_registers"),
    "ijepa": _plain("ijepa", "ijepa"),
    "clip": _plain("clip", "vision_model"),
    "metaclip2": _plain("metaclip2", "vision_model"),
    "siglip": _plain("siglip", "vision_model"),
    # Other token sequences.
    "beit": _sequence(_classifier("Beit", **_BEIT, **_OWN), "beit", 17),
    "beit_shared": _sequence(_classifier("Beit", **_BEIT, **_SHARED), "beit", 17),
    "data2vec": _sequence(_classifier("Data2VecVision", **_BEIT, **_OWN), "data2vec_vision", 17),
    "data2vec_shared": _sequence(_classifier("Data2VecVision", **_BEIT, **_SHARED), "data2vec_vision", 17),
    "siglip2": _sequence(
        _classifier("Siglip2", text_config=_TEXT_TOWER, vision_config={**_VISION, **_NAFLEX}),
        "vision_model",
        NAFLEX_LENGTH,
        prefix=0,
        takes=_naflex,
    ),
    "dinov3": _sequence(
        _make("DINOv3ViTModel", "DINOv3ViTConfig", **_VISION, **_IMAGE, num_register_tokens=2, layerscale_value=0.5),
        "norm",
        19,
        prefix=3,
    ),
    # Hierarchies and hybrids.
    "swin": _readout(_classifier("Swin", **_SWIN), "swin", (4, 64)),
    "swinv2": _readout(_classifier("Swinv2", **_SWIN), "swinv2", (4, 64)),
    "donut_swin": _readout(_classifier("DonutSwin", **_SWIN), "donut", (4, 64)),
    "focalnet": _readout(_classifier("FocalNet", **_FOCALNET), "focalnet", (4, 64)),
    "hiera": _readout(_classifier("Hiera", **_HIERA), "hiera", (4, 64), resized=INTERPOLATED),
    "hiera_two_pools": Entry(
        READOUT, _classifier("Hiera", **_HIERA, num_query_pool=2), "hiera", (16, 64), "units", resized=INTERPOLATED
    ),
    "pvt": _readout(_classifier("Pvt", **_PVT, image_size=64, num_labels=5), "pvt", (5, 32), prefix=1, resized=FIXED),
    "pvt_v2": _readout(_classifier("PvtV2", **_PVT, image_size=[64, 64]), "pvt_v2"),
    "segformer": _readout(_classifier("Segformer", **_PVT), "segformer"),
    "levit": _levit("LevitForImageClassification"),
    "levit_teacher": _levit("LevitForImageClassificationWithTeacher"),
    "cvt": _readout(_classifier("Cvt", **_CVT), "cvt", (32, 4, 4)),
    "mobilevit": _readout(_classifier("MobileViT", **_MOBILEVIT), "mobilevit"),
    "mobilevitv2": _readout(_classifier("MobileViTV2", **_MOBILEVITV2), "mobilevitv2", (64, 2, 2)),
    "swiftformer": _readout(_classifier("SwiftFormer", **_SWIFTFORMER), "norm"),
    "poolformer": _readout(_classifier("PoolFormer", **_STAGES, layer_scale_init_value=0.5), "norm"),
    # Convolutional networks.
    "resnet": _readout(_classifier("ResNet", **_STAGES, embedding_size=8), "resnet"),
    "regnet": _readout(_classifier("RegNet", **_STAGES, embedding_size=8, groups_width=8), "regnet"),
    "bit": _readout(_classifier("Bit", **_STAGES, embedding_size=8, num_groups=4), "bit"),
    "convnext": _readout(_classifier("ConvNext", **_STAGES, layer_scale_init_value=0.5), "convnext"),
    "convnextv2": _readout(_classifier("ConvNextV2", **_STAGES), "convnextv2"),
    "efficientnet": _readout(_classifier("EfficientNet", **_EFFICIENTNET), "efficientnet", (128, 2, 2)),
    "mobilenet_v1": _readout(_classifier("MobileNetV1", depth_multiplier=0.125), "mobilenet_v1", (128, 2, 2)),
    "mobilenet_v2": _readout(_classifier("MobileNetV2", **_MOBILENETV2), "mobilenet_v2", (160, 2, 2)),
    "hgnet_v2": _readout(_classifier("HGNetV2", **_STAGES, **_HGNET), "encoder"),
    "pp_lcnet": _readout(_classifier("PPLCNet", scale=0.125, class_expand=32), "encoder", (64, 2, 2)),
    "textnet": _readout(_classifier("TextNet", **_TEXTNET), "textnet"),
    # Latents, which have no grid.
    "perceiver_learned": _perceiver("Learned", 512, resized=INTERPOLATED),
    "perceiver_fourier": _perceiver("Fourier", 261),
    "perceiver_conv": _perceiver("ConvProcessing", 322, size=64),
    # Images matched with texts.
    "clip_model": _matching("CLIP"),
    "metaclip2_model": _matching("MetaClip2"),
    "chinese_clip_model": _matching("ChineseCLIP"),
    "altclip_model": _matching("AltCLIP"),
    "siglip_model": _matching("Siglip", 16, 0),
    "siglip2_model": _sequence(
        _matcher("Siglip2", _NAFLEX), "vision_model", NAFLEX_LENGTH, 0, MATCHING, takes=_with_texts(_naflex)
    ),
    # Not for this adapter. Dinat does not even build without natten (ImportError).
    "imagegpt": Entry(REFUSED, _classifier("ImageGPT", **_IMAGEGPT), takes=_colours),
    "shieldgemma2": Entry(REFUSED, _classifier("ShieldGemma2", **_SHIELDGEMMA), size=(SIDE, SIDE), takes=_prompt),
    "dinat": Entry(REFUSED, _classifier("Dinat", **_DINAT)),
}


def of_kind(*kinds):
    """The names of the entries of these kinds, in order."""
    return tuple(name for name, entry in ZOO.items() if entry.kind in kinds)


def build(name, seed=0, size=None, **config):
    """A fresh model in eval mode: nothing in it is zero, and its BatchNorms are neither neutral nor far off.

    `size` is that of the images its BatchNorms are settled on, if the `config` makes it take no others.
    """
    torch.manual_seed(seed)
    entry = ZOO[name]
    model = randomise(entry.make(**config), seed)
    for parameter in model.parameters():
        if not parameter.any():  # Siglip's scale and bias, two scalars
            nn.init.constant_(parameter, 0.5)
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            nn.init.zeros_(module.weight[module.padding_idx])  # as ChineseCLIP does when it is loaded
    return calibrate(model, entry, seed, size).eval()


@functools.cache
def _cached(name):
    return build(name)


def base(name):
    """A copy of the entry's one base model: the same weights at every call."""
    return copy.deepcopy(_cached(name))


@torch.no_grad()
def calibrate(model, entry, seed=0, size=None):
    """Give every BatchNorm about the statistics of some images, disturbed, so that using others shows."""
    generator = torch.Generator().manual_seed(seed + 2)

    def settle(norm, args):
        values = args[0].transpose(0, 1).flatten(1)
        mean, variance = values.mean(1), values.var(1).clamp_min(1e-3)
        noise, factor = torch.randn(2, *mean.shape, generator=generator), torch.rand(mean.shape, generator=generator)
        norm.running_mean.copy_(mean + 0.1 * variance.sqrt() * noise[0])
        norm.running_var.copy_(variance * (0.5 + factor))
        norm.weight.copy_(1 + 0.1 * noise[1])  # some families start them at 0, or near it

    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    handles = [norm.register_forward_pre_hook(settle) for norm in norms]
    if norms:
        model.eval()(**inputs(entry, batch=16, seed=1000 + seed, size=size))
    for handle in handles:
        handle.remove()
    return model.train()  # makes Levit forget the attention biases that it keeps in eval mode


def inputs(entry, batch=2, seed=0, size=None):
    """What the model's forward takes, as keyword arguments; with another `size`, also what that needs."""
    entry = ZOO[entry] if isinstance(entry, str) else entry
    more = {} if size in (None, entry.size) else entry.resized or {}
    return {**entry.takes(entry, batch, seed, size or entry.size), **more}


def logits(output):
    """The logits (B, K) in any of these models' outputs; of the headless dinov3, its pooled features."""
    keys = ("logits", "logits_per_image", "pooler_output", "last_hidden_state")
    return next(output[key] for key in keys if key in output)


@torch.no_grad()
def features(model, entry, **kwargs):
    """The final feature map (B, *entry.shape), caught where the entry says it comes out."""
    entry, caught = ZOO[entry] if isinstance(entry, str) else entry, []
    handle = model.get_submodule(entry.features).register_forward_hook(lambda _, __, output: caught.append(output))
    with handle:
        model(**(kwargs or inputs(entry)))
    return caught[-1] if torch.is_tensor(caught[-1]) else caught[-1].last_hidden_state
