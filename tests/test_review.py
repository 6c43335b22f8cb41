"""Cases that were once wrong: each was found by reading or by trying, not by a law."""

import functools

import families
import numpy as np
import pytest
import torch
import zoo
from families import base, shapley, wrap
from PIL import Image
from torch import nn
from transformers.models.efficientnet.image_processing_pil_efficientnet import EfficientNetImageProcessorPil
from transformers.models.mobilevit.image_processing_pil_mobilevit import MobileViTImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from shapadapter import PatchGame, ShapleyConfig, ShapleyError, explain
from shapadapter.core.errors import ImageError
from shapadapter.data.collator import ImageCollator
from shapadapter.data.images import prepare_images, unprocess


def run(model, **inputs):
    with torch.no_grad():
        return model(**inputs)


@pytest.mark.parametrize("name", ["efficientnet", "convnext", "convnextv2", "resnet"])
@pytest.mark.parametrize("prediction", ["vote", "classifier"])
def test_an_incomplete_cell_at_the_border_belongs_to_the_last_player(name, prediction):
    """The empty value is asked of one image for all: nothing of that image may be left in it."""
    model = wrap(zoo.base(name), prediction)
    images = zoo.inputs(name, size=(84, 84))["pixel_values"]
    together = run(model, pixel_values=images)
    for index in range(2):
        alone = run(model, pixel_values=images[index : index + 1])
        assert torch.allclose(alone.attributions[0], together.attributions[index], atol=1e-4)
        assert torch.allclose(alone.null_values[0], together.null_values[index], atol=1e-4)
    nobody = torch.zeros(2, 1, together.attributions.shape[1], dtype=torch.bool)
    values = run(model, pixel_values=images, coalitions=nobody).coalition_values
    assert torch.allclose(values[0], values[1], atol=1e-5)


@pytest.mark.parametrize("name", ["resnet", "vit"])
@pytest.mark.parametrize("prediction", ["vote", "classifier"])
def test_a_grid_of_its_own_is_shared_out_in_full_precision(name, prediction):
    entry = zoo.inputs(name) if name in zoo.ZOO else {"pixel_values": families.images()}
    grid = (4, 4) if name == "resnet" else (2, 2)
    model = wrap(zoo.base(name) if name in zoo.ZOO else base(name), prediction, grid=grid)
    everybody = torch.ones(2, 1, grid[0] * grid[1], dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16):
        output = run(model, **entry, coalitions=everybody)
    assert output.attributions.dtype == torch.float32
    gap = output.null_values + output.attributions.sum(1) - output.logits.float()
    assert gap.abs().max() <= 1e-5 * max(1.0, output.logits.abs().max().item())


def test_pictures_are_what_went_in():
    """MobileViT exchanges red and blue, EfficientNet divides by the deviation twice."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    as_it_is = {"do_resize": False, "do_center_crop": False}
    for processor in (
        MobileViTImageProcessorPil(**as_it_is),
        EfficientNetImageProcessorPil(**as_it_is),
        EfficientNetImageProcessorPil(**as_it_is, include_top=False),
        ViTImageProcessorPil(do_resize=False),
    ):
        values = prepare_images([Image.fromarray(pixels)], processor)["pixel_values"]
        back = unprocess(values.float(), processor)[0].permute(1, 2, 0).round()
        assert np.array_equal(back.numpy().astype(np.uint8), pixels), type(processor).__name__


def test_adapters_with_different_classes_on_one_base(tmp_path):
    names = {0: "one", 1: "two", 2: "three"}
    other = families.build("vit", id2label=names, label2id={v: k for k, v in names.items()})
    wrap(other, "vote").save_pretrained(tmp_path)
    five = {"pixel_values": families.images()}
    model = wrap("vit", "vote")
    expected = run(model, **five).logits
    base_weights = {k: v for k, v in base("vit").state_dict().items() if not k.startswith("classifier")}
    assert base_weights  # the base of both has the same backbone
    model.add_adapter("own", ShapleyConfig(prediction="classifier"))
    model.set_adapter("own")
    assert run(model.eval(), **five).logits.shape == (2, 5)
    model.set_adapter("default")
    assert torch.equal(run(model, **five).logits, expected)
    assert shapley(model).classes == 5


def by_name(block, hidden, mask=None, **more):
    return block(hidden_states=hidden, attention_mask=mask, **more)


def test_blocks_that_are_called_by_keyword():
    plain = base("vit")
    layers = plain.vit.layers

    class Called(nn.ModuleList):
        def __iter__(self):
            return iter([functools.partial(by_name, block) for block in nn.ModuleList.__iter__(self)])

    layers.__class__ = Called
    logits = run(plain, pixel_values=families.images()).logits
    model = wrap(plain, "classifier", tune="frozen", trained=False)
    output = run(model, pixel_values=families.images(), coalitions=families.coalitions())
    assert torch.allclose(output.logits, logits, atol=1e-6)
    assert torch.allclose(output.coalition_values[:, 0], output.logits, atol=1e-5)


def test_prepared_images_of_several_sizes_in_a_batch():
    rows = [{"pixel_values": torch.zeros(3, side, side), "label": 0} for side in (32, 48)]
    with pytest.raises(ImageError, match=r"\(3, 32, 32\), \(3, 48, 48\)"):
        ImageCollator()(rows)


def test_a_game_of_texts_needs_texts():
    model = wrap(zoo.base("clip_model"), "vote")
    image = zoo.inputs("clip_model")["pixel_values"][0]
    with pytest.raises(ShapleyError, match="text_embeds"):
        PatchGame(model, image)
    with pytest.raises(ShapleyError, match="without texts"):
        run(model, pixel_values=image[None], coalitions=torch.ones(1, 1, 16, dtype=torch.bool))


def test_patches_without_a_mask():
    model = wrap(zoo.base("siglip2"), "vote")
    inputs = zoo.inputs("siglip2")
    rows, cols = inputs["spatial_shapes"][0].tolist()
    bare = {
        "pixel_values": inputs["pixel_values"][:, : rows * cols],
        "spatial_shapes": inputs["spatial_shapes"],
    }
    chosen = families.coalitions(2, 3, rows * cols)
    with_mask = run(model, **inputs, coalitions=chosen)
    without = run(model, **bare, coalitions=chosen)
    assert torch.allclose(with_mask.coalition_values, without.coalition_values, atol=1e-5)


@pytest.mark.parametrize("grid", [7, (2.0, 2.0), (4,), (0, 4), (1, 1), "44"])
def test_what_is_no_grid(grid):
    with pytest.raises(ValueError, match=r"grid(\[0\])? must be"):
        ShapleyConfig(grid=grid)


def test_a_colour_for_each_channel():
    with pytest.raises(ValueError, match="3 channels"):
        wrap(zoo.base("resnet"), "vote", fill_color=[0.0])


def test_coordinates_of_an_explanation_at_an_odd_size():
    """What lies beyond the last whole cell is not shown; the maps lie over the rest."""
    model = wrap(zoo.base("convnext"), "vote")
    explanation = explain(model, zoo.inputs("convnext", size=(84, 84))["pixel_values"])
    assert explanation.images.shape[1:3] == (64, 64)
    assert explanation.heatmap().shape == (64, 64)


def test_statistics_are_frozen_whatever_the_mode_of_the_whole():
    """A part in training mode inside of a model in evaluation mode, as PEFT and users leave them."""
    model = wrap(zoo.base("resnet"), "vote").eval()
    expected = run(model, **zoo.inputs("resnet")).attributions
    model.get_base_model().resnet.encoder.train()
    assert torch.equal(run(model, **zoo.inputs("resnet")).attributions, expected)
