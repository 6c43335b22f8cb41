"""A module around the wrapped model: what hands its attributes on works, of anything else it is said what is inside."""

import families
import pytest
import torch
from families import base, images, wrap
from peft import get_peft_model
from torch import nn
from transformers import ViTImageProcessor, pipeline

from shapadapter import (
    ShapleyConfig,
    ShapleyError,
    ShapleyTrainer,
    ShapleyTrainingArguments,
    UnsupportedModelError,
    attribute,
    evaluate,
    explain,
)
from shapadapter.explanation.game import PatchGame


class Mine(nn.Module):
    """As a training script has it; with a config it looks like a model of transformers."""

    def __init__(self, net, config=None):
        super().__init__()
        self.net, self.config = net, config

    def forward(self, **inputs):
        return self.net(**inputs).logits


class Listed(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.layers = nn.ModuleList([net])

    def forward(self, **inputs):
        return self.layers[0](**inputs)


OUTER = {
    "data_parallel": (nn.DataParallel, "DataParallel", "outer.module"),
    "own": (Mine, "Mine", "outer.net"),
    "own_config": (lambda model: Mine(model, model.config), "Mine", "outer.net"),
    "listed": (Listed, "Listed", "outer.get_submodule('layers.0')"),
    "twice": (lambda model: nn.DataParallel(Mine(model)), "DataParallel", "outer.module.net"),
}
PROCESSOR = ViTImageProcessor(size={"height": families.SIDE, "width": families.SIDE})
USES = {
    "explain": lambda model, _: explain(model, images()),
    "refine": lambda model, _: explain(model, images(), refine=4),
    "attribute": lambda model, _: attribute(model, images(), method="leave_one_out"),
    "evaluate": lambda model, _: evaluate(model, [{"image": images()[0], "label": 0}], PROCESSOR),
    "game": lambda model, _: PatchGame(model, images(1)),
    "pipeline": lambda model, _: pipeline("image-attribution", model=model, image_processor=PROCESSOR),
    "trainer": lambda model, folder: ShapleyTrainer(
        model, ShapleyTrainingArguments(folder, use_cpu=True, report_to="none"), train_dataset=[]
    ),
}


@pytest.mark.parametrize("name", OUTER)
def test_the_model_inside_is_named(name, tmp_path):
    around, kind, inside = OUTER[name]
    outer = around(wrap("vit"))
    for use in USES if name == "own" else ("explain", "trainer"):
        with pytest.raises(ShapleyError) as caught:
            USES[use](outer, str(tmp_path))
        assert f"got {kind} around it. Pass the model inside: {inside}, as in explain({inside}, ...)." in str(
            caught.value
        )


@pytest.mark.parametrize("name", OUTER)
def test_the_base_inside_is_named_where_it_is_wrapped(name):
    around, kind, inside = OUTER[name]
    with pytest.raises(UnsupportedModelError) as caught:
        get_peft_model(around(base("vit")), ShapleyConfig())
    assert f"got {kind}" in str(caught.value)
    assert f"Wrap the model inside: get_peft_model({inside}, ...)." in str(caught.value)


def test_the_model_inside_explains():
    model = wrap("vit")
    expected = explain(model, images())
    outer = nn.DataParallel(Mine(model))
    for same in (outer.module.net, model.get_base_model()):
        assert torch.allclose(explain(same, images()).attributions, expected.attributions, atol=1e-6)
