"""Models that pass on little of an image: new ones, as configurations make them, and blocks that are all but silent."""

import pytest
import torch
import transformers
from families import PATCH, SIDE, randomise
from peft import get_peft_model
from torch import nn
from transformers import (
    Dinov2Config,
    Dinov2ForImageClassification,
    EfficientNetConfig,
    EfficientNetForImageClassification,
)
from zoo import READOUT, SEQUENCE, ZOO, of_kind

from shapadapter import ShapleyConfig, UnsupportedModelError
from shapadapter.backbone import measure_offset, settle

SLOW = ("perceiver_learned", "perceiver_fourier", "hiera_two_pools")
TINY = {
    "EfficientNet": {"width_coefficient": 0.5, "hidden_dim": 640, "depth_coefficient": 0.3},
    "MobileNetV1": {"depth_multiplier": 0.25, "min_depth": 8},
    "MobileNetV2": {"depth_multiplier": 0.25, "expand_ratio": 4.0, "finegrained_output": True},
    "MobileViT": {"hidden_sizes": [12, 16, 20], "neck_hidden_sizes": [8, 8, 16, 16, 32, 32, 32], "image_size": 32},
    "MobileViTV2": {"width_multiplier": 0.25, "n_attn_blocks": [1, 1, 2], "image_size": 64},
    "HGNetV2": {
        "hidden_sizes": [64, 128, 256, 512],
        "stem_channels": [3, 16, 16],
        "stage_in_channels": [16, 64, 128, 256],
        "stage_num_blocks": [1, 1, 2, 1],
    }
    | {"stage_mid_channels": [16, 32, 64, 128], "stage_out_channels": [64, 128, 256, 512]},
    "PPLCNet": {"scale": 0.25},
}
"""As the tests of transformers make them, and `hf-internal-testing/tiny-random-*` on the Hub."""
FRESH = {name: ZOO[name].make for name in of_kind(READOUT, SEQUENCE) if name not in SLOW}
FRESH |= {
    f"tiny {name}": lambda name=name, more=more: getattr(transformers, f"{name}ForImageClassification")(
        getattr(transformers, f"{name}Config")(num_labels=5, **more)
    )
    for name, more in TINY.items()
}


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


DEFAULT = ("vit", "siglip2", "swin", "resnet", "tiny MobileViT", "tiny HGNetV2")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in DEFAULT else pytest.mark.families) for name in FRESH]
)
def test_a_model_is_wrapped_as_its_configuration_makes_it(name):
    model = FRESH[name]().eval()
    before = bits(model)
    anatomy, removal = settle(model)
    assert anatomy.mechanism == "sequence" or removal == "pixels"
    after = bits(model)
    assert all(torch.equal(after[key], before[key]) and after[key].dtype == before[key].dtype for key in before)


def test_a_new_efficientnet_takes_few_small_passes():
    """As deep as the default one of 600 x 600 pixels, whose features are smaller than float32 can hold."""
    config = EfficientNetConfig(num_labels=5, width_coefficient=0.2, hidden_dim=256)
    model, sizes = EfficientNetForImageClassification(config).eval(), []
    with model.efficientnet.embeddings.register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[2:])):
        wrapped = get_peft_model(model, ShapleyConfig(r=2))
    assert len(sizes) <= 7
    assert max(height * width for height, width in sizes) <= 176 * 240
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        output = wrapped(images, coalitions=torch.tensor([[[True, False, True, False, True, False]]]))
    assert output.coalition_values.isfinite().all()
    assert torch.allclose(output.null_values + output.attributions.sum(1), output.logits, atol=1e-5)


@pytest.mark.parametrize("name", ["efficientnet"])
def test_where_the_cells_of_a_new_model_look_is_what_float64_says(name):
    model = FRESH[name]().eval()
    anatomy, _ = settle(model)
    offset = measure_offset(model, anatomy)
    assert 0.1 < max(map(abs, offset)) < 1
    assert measure_offset(model.double(), anatomy) == pytest.approx(offset, abs=0.02)


class Embedding(nn.Module):
    """A patch embedding whose patches know of each other by `leak`, or all show the same with `blind`."""

    def __init__(self, inner, leak=0.0, scale=1.0, blind=False):
        super().__init__()
        self.inner, self.leak, self.scale, self.blind = inner, leak, scale, blind

    def forward(self, *args, **kwargs):
        hidden = self.inner(*args, **kwargs)
        if self.blind:
            return torch.zeros_like(hidden) + self.inner.position_embeddings
        return self.scale * (hidden + self.leak * hidden[:, 1:].mean(1, keepdim=True))


class Beside(nn.Module):
    """A norm beside which something is added to all positions: their mean, or the place as counted from the end."""

    def __init__(self, inner, what):
        super().__init__()
        self.inner, self.what = inner, what

    def forward(self, hidden):
        if self.what == "mean":
            return self.inner(hidden) + 0.1 * hidden.mean(1, keepdim=True)
        return self.inner(hidden) + torch.arange(hidden.shape[1], 0.0, -1).to(hidden).sin()[:, None]


def dinov2(layer_scale, beside=None, dtype=torch.float32, **embedding):
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "mlp_ratio": 2}
    model = Dinov2ForImageClassification(Dinov2Config(**size, image_size=SIDE, patch_size=PATCH, num_labels=5))
    randomise(model)
    for name, parameter in model.named_parameters():
        if "lambda1" in name:
            nn.init.constant_(parameter, layer_scale)
    if embedding:
        model.dinov2.embeddings = Embedding(model.dinov2.embeddings, **embedding)
    for block in model.dinov2.encoder.layer if beside else ():
        block.norm1 = Beside(block.norm1, beside)
    return model.eval().to(dtype)


@pytest.mark.parametrize("layer_scale", [1.0, 1e-6, 1e-9])
def test_silent_blocks_are_a_sequence_all_the_same(layer_scale):
    assert settle(dinov2(layer_scale))[1] == "drop"


@pytest.mark.parametrize(
    ("leak", "scale", "layer_scale"), [(0.1, 1, 1), (0.1, 1e-6, 1e-6), (1e-6, 1, 1), (0.1, 1e-6, 1)]
)
def test_a_leak_is_refused_however_small_the_signals(leak, scale, layer_scale):
    for removal in ("drop", "mask"):
        with pytest.raises(UnsupportedModelError, match="changing absent patches moves the features"):
            settle(dinov2(layer_scale, leak=leak, scale=scale), removal)
    assert settle(dinov2(layer_scale, leak=leak, scale=scale))[1] == "pixels"


@pytest.mark.parametrize("layer_scale", [1.0, 1e-5, 1e-8])
def test_places_are_not_mistaken_however_silent_the_blocks(layer_scale):
    """They are where patches that stand before others are left out."""
    assert settle(dinov2(layer_scale, "place"))[1] == "mask"
    with pytest.raises(UnsupportedModelError, match="the present patches are taken for others"):
        settle(dinov2(layer_scale, "place"), "drop")


@pytest.mark.parametrize("layer_scale", [1.0, 1e-6])
def test_a_token_that_is_heard_is_refused_though_no_head_tells(layer_scale):
    model = dinov2(layer_scale, "mean")
    nn.init.zeros_(model.classifier.weight)
    with pytest.raises(UnsupportedModelError, match="the Shapley token changes the model's own features"):
        settle(model, "mask")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_features_that_do_not_depend_on_the_image_are_refused(dtype):
    model = dinov2(1.0, dtype=dtype, blind=True)
    before = bits(model)
    with pytest.raises(UnsupportedModelError, match="do not depend on the image"):
        get_peft_model(model, ShapleyConfig())
    assert all(torch.equal(tensor, before[key]) for key, tensor in bits(model).items())
