"""Where the cells of real architectures look, in their usual depth, against what paddings and strides say."""

import pytest
import torch
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    CvtConfig,
    CvtForImageClassification,
    EfficientNetConfig,
    EfficientNetForImageClassification,
    MobileNetV1Config,
    MobileNetV1ForImageClassification,
    PoolFormerConfig,
    PoolFormerForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    SegformerConfig,
    SegformerForImageClassification,
    SwinConfig,
    SwinForImageClassification,
)
from zoo import READOUT, Entry, base, calibrate

from shapadapter.backbone import measure_offset, settle

NARROW = {"hidden_sizes": [16, 32, 64, 128]}
# Configurations of the usual depth and less width, and the offset in pixels by the arithmetic of paddings.
MODELS = {
    "resnet18": (
        lambda: ResNetForImageClassification(
            ResNetConfig(embedding_size=16, depths=[2, 2, 2, 2], layer_type="basic", **NARROW)
        ),
        -15.5,
    ),
    "resnet50": (lambda: ResNetForImageClassification(ResNetConfig(embedding_size=16, **NARROW)), -15.5),
    "efficientnet": (
        lambda: EfficientNetForImageClassification(
            EfficientNetConfig(width_coefficient=0.25, depth_coefficient=1.0, hidden_dim=320)
        ),
        15.5,
    ),
    "mobilenet_v1": (lambda: MobileNetV1ForImageClassification(MobileNetV1Config(depth_multiplier=0.25)), 15.5),
    "convnext": (lambda: ConvNextForImageClassification(ConvNextConfig(**NARROW)), 0.0),
    "swin": (lambda: SwinForImageClassification(SwinConfig(embed_dim=24)), 0.0),
    "segformer": (lambda: SegformerForImageClassification(SegformerConfig()), -15.5),
    "poolformer": (lambda: PoolFormerForImageClassification(PoolFormerConfig(**NARROW)), -14.5),
    "cvt": (
        lambda: CvtForImageClassification(CvtConfig(embed_dim=[16, 48, 96], num_heads=[1, 3, 6], depth=[1, 2, 4])),
        -6.5,
    ),
}


DEFAULT = ("resnet18", "efficientnet", "swin")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.families] * (name not in DEFAULT)) for name in MODELS]
)
def test_the_offset_is_that_of_the_paddings(name):
    """To a tenth of a cell, on average of the axes; random kernels look a little to one side by themselves."""
    make, pixels = MODELS[name]
    model = calibrate(make(), Entry(READOUT, make, size=(224, 224))).eval()
    anatomy, _ = settle(model)
    gradients = [parameter.requires_grad for parameter in model.parameters()]
    down, right = measure_offset(model, anatomy)
    assert abs((down + right) / 2 - pixels / anatomy.cell[0]) < 0.1
    assert abs(down - right) < 0.35
    assert [parameter.requires_grad for parameter in model.parameters()] == gradients
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", ["levit", "pvt"])
def test_a_model_of_one_size_is_measured_at_that_size(name):
    model = base(name)
    anatomy, _ = settle(model)
    assert anatomy.sample in ((128, 128), (64, 64))
    assert all(abs(offset) < 1 for offset in measure_offset(model, anatomy))


@pytest.mark.parametrize("name", ["perceiver_conv", "beit", "siglip2"])
def test_patches_and_latents_have_no_offset(name):
    model = base(name)
    assert measure_offset(model, settle(model)[0]) == (0.0, 0.0)


def test_where_no_gradient_arrives_there_is_no_offset():
    model = base("resnet")
    with torch.no_grad():
        model.resnet.embedder.embedder.convolution.weight.zero_()
        model.resnet.encoder.stages[0].layers[0].layer[0].convolution.weight.zero_()
    anatomy, _ = settle(base("resnet"))
    assert measure_offset(model, anatomy) == (0.0, 0.0)


def test_it_is_the_same_every_time():
    model = base("resnet")
    anatomy, _ = settle(model)
    torch.manual_seed(1)
    once = measure_offset(model, anatomy)
    torch.manual_seed(2)
    assert measure_offset(model.train(), anatomy) == once
    assert model.training
