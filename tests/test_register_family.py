"""A model of one's own: what the page on families says, and what `register_family` refuses."""

import re
from pathlib import Path

import families
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

import shapadapter
from shapadapter import ShapleyConfig, UnsupportedModelError, explain, register_family
from shapadapter.backbone import families as table
from shapadapter.backbone import settle

PAGE = Path(__file__).parents[1] / "docs" / "add-a-family.md"


@pytest.fixture(autouse=True)
def _own_table(monkeypatch):
    monkeypatch.setattr(table, "_FAMILIES", dict(table._FAMILIES))


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), re.DOTALL)


def test_every_block_of_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    found, toy, *rest = blocks("python")
    printed, refused = blocks("text")
    names: dict = {"__name__": "page"}
    exec(compile(found, str(PAGE), "exec"), names)
    assert capsys.readouterr().out == printed
    exec(compile(toy, str(PAGE), "exec"), names)
    with pytest.raises(UnsupportedModelError) as error:
        get_peft_model(names["base"], ShapleyConfig(r=4))
    assert str(error.value) == refused.strip()

    for block in rest:
        exec(compile(block, str(PAGE), "exec"), names)
    model, again, images = names["model"].eval(), names["again"], names["images"]
    config = again.peft_config["default"]
    assert (config.mechanism, config.removal, config.num_classes) == ("readout", "pixels", 3)
    assert names["explanation"].attributions.shape == (4, 4, 4, 3)
    coalitions = families.coalitions(4, 3)
    with torch.no_grad():
        one, other = (wrapped(pixel_values=images[:4], coalitions=coalitions) for wrapped in (model, again))
    for field in ("logits", "attributions", "coalition_values"):
        assert torch.equal(one[field], other[field])
    with torch.no_grad():
        right = model(pixel_values=images).logits.argmax(1) == names["labels"]
    assert right.float().mean() > 0.9

    # The bright middle is what speaks for the class.
    maps = explain(model, images).attributions  # (48, 4, 4, 3)
    own = maps[torch.arange(48), ..., names["labels"]]
    assert own[:, 1:3, 1:3].mean() > own[:, 0].mean()


def test_the_pages_model_keeps_its_scores(tmp_path, monkeypatch):
    """Under the name that was registered: with a frozen backbone `classifier` prediction changes none of them."""
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "page"}
    exec(compile(blocks("python")[1], str(PAGE), "exec"), names)
    register_family(names["SummaryMixer"], features="last_norm", prefix=24)
    with pytest.raises(UnsupportedModelError, match="no classifier"):
        get_peft_model(names["base"], ShapleyConfig(prediction="classifier", tune="frozen"))
    register_family("SummaryMixer", features="last_norm", prefix=24, scores="scores")
    base, images = names["base"].eval(), families.images()
    with torch.no_grad():
        scores = base(images).scores
        output = get_peft_model(base, ShapleyConfig(prediction="classifier", tune="frozen")).eval()(
            pixel_values=images
        )
    assert torch.equal(output.logits, scores)
    assert torch.allclose(output.null_values + output.attributions.sum(1), scores, atol=1e-5)


# -- other layouts ----------------------------------------------------------------------------------------------------


class ToyConfig(PretrainedConfig):
    model_type = "toy"

    def __init__(self, layout="channels_last", **kwargs):
        self.layout = layout
        super().__init__(**kwargs)


class Toy(PreTrainedModel):
    """Its map is followed by another one, on which nothing depends."""

    config_class = ToyConfig
    main_input_name = "pixel_values"

    def __init__(self, config):
        super().__init__(config)
        self.stem = nn.Conv2d(3, 12, 8, 8)
        self.more = nn.Conv2d(12, 12, 1)
        self.map = nn.Identity()
        self.decoy = nn.Conv2d(12, 6, 3, padding=1)
        self.classifier = nn.Linear(12, config.num_labels)
        self.post_init()

    def forward(self, pixel_values, **kwargs):
        hidden = self.more(self.stem(pixel_values).relu())  # (B, D, rows, cols)
        hidden = {
            "channels_first": lambda: hidden,
            "channels_last": lambda: hidden.permute(0, 2, 3, 1),
            "tokens": lambda: hidden.flatten(2).transpose(1, 2),
            "latents": lambda: hidden.mean(dim=3).transpose(1, 2),
        }[self.config.layout]()
        hidden = self.map(hidden)
        width = 1 if self.config.layout == "channels_first" else hidden.ndim - 1
        if self.config.layout == "channels_first":
            self.decoy(hidden)
        pooled = hidden.movedim(width, -1).flatten(1, -2).mean(dim=1)  # (B, D)
        return ImageClassifierOutput(logits=self.classifier(pooled))


def toy(layout):
    torch.manual_seed(0)
    return families.randomise(Toy(ToyConfig(layout, num_labels=3))).eval()


@pytest.mark.parametrize("layout", ["channels_first", "channels_last", "tokens", "latents"])
@pytest.mark.parametrize("prediction", ["vote", "classifier"])
def test_every_layout(layout, prediction, tmp_path):
    register_family(Toy, features="map", layout=layout)
    model = toy(layout)
    anatomy, removal = settle(model)
    assert (anatomy.source, anatomy.layout, anatomy.width, removal) == ("map", layout, 12, "pixels")
    if layout != "latents":
        assert anatomy.cell == (8, 8)
    model.save_pretrained(tmp_path / "base")
    wrapped = families.wrap(model, prediction, grid=(4, 4))
    images, coalitions = families.images(), families.coalitions()
    with torch.no_grad():
        output = wrapped(pixel_values=images, coalitions=coalitions)
    assert output.attributions.shape == (2, 16, 3)
    assert torch.allclose(output.null_values + output.attributions.sum(1), output.logits, atol=1e-5)
    assert torch.allclose(output.coalition_values[:, 0], output.logits, atol=1e-5)
    assert torch.allclose(output.coalition_values[:, -1], output.null_values, atol=1e-5)

    wrapped.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(Toy.from_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(again(pixel_values=images).attributions, output.attributions)


def test_without_the_call_the_last_map_on_which_all_depends_is_read():
    assert settle(toy("channels_first"))[0].source == "map"
    register_family(Toy, features="stem")
    anatomy, _ = settle(toy("channels_first"))
    assert (anatomy.source, anatomy.layout, anatomy.width) == ("stem", "channels_first", 12)


class TwoWays(Toy):
    """Its scores come from two maps of different depths."""

    def forward(self, pixel_values, **kwargs):
        first, second = self.stem(pixel_values), self.more(self.stem(pixel_values[..., :-8, :-8]))
        return ImageClassifierOutput(logits=self.classifier(first.mean((2, 3)) + second.amax((2, 3))))


def test_scores_from_two_maps_are_refused_unless_one_is_named():
    model = families.randomise(TwoWays(ToyConfig(num_labels=3)))
    with pytest.raises(UnsupportedModelError, match=r"found none\. If there is one, name the module"):
        settle(model)
    register_family(TwoWays, features="stem")
    with pytest.raises(UnsupportedModelError, match="'stem' is no feature map"):  # its second call sees another image
        settle(model)


class Residual(Toy):
    """The last module with a map is a branch, past which the features go on."""

    def forward(self, pixel_values, **kwargs):
        hidden = self.stem(pixel_values)
        for layer in (self.more, self.again):
            hidden = hidden + layer(hidden.relu())
        return ImageClassifierOutput(logits=self.classifier(self.sum(hidden).mean((2, 3))))

    def __init__(self, config):
        super().__init__(config)
        self.again = nn.Conv2d(12, 12, 1)
        self.sum = nn.Identity()


def test_a_branch_is_not_taken_for_the_features():
    model = families.randomise(Residual(ToyConfig(num_labels=3)))
    assert settle(model)[0].source == "sum"
    model.sum.forward = lambda hidden: hidden.mean((2, 3), keepdim=True)
    with pytest.raises(
        UnsupportedModelError, match="through which all flows is that of 'stem', but 2 layers run behind"
    ):
        settle(model)
    model.again = model.more = nn.Identity()
    model.stem = nn.Sequential(nn.Conv2d(3, 12, 8, 8), nn.Conv2d(12, 12, 1))
    assert settle(model)[0].source == "stem.1"


def test_subclasses_are_meant_as_well_and_the_nearest_counts():
    class Child(Toy):
        pass

    class Grandchild(Child):
        pass

    register_family(Toy, features="map")
    register_family(Child, features="decoy")
    for cls, source in ((Toy, "map"), (Child, "decoy"), (Grandchild, "decoy")):
        assert settle(cls(ToyConfig("channels_first", num_labels=3)))[0].source == source


def test_a_later_call_counts():
    register_family("Toy", features="decoy")
    register_family(Toy, features="map")
    assert settle(toy("channels_first"))[0].source == "map"


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"features": "mop"}, "features='mop' was registered, but no module of that name returned a tensor"),
        (
            {"features": "map", "layout": "channels_last"},
            "channels_last.* does not grow|is no feature map|does not grow",
        ),
        (
            {"features": "map", "layout": "tokens"},
            r"output \(2, 12, 16, 24\) of 'map' is no feature map of layout='tokens'",
        ),
        (
            {"features": "map", "layout": "latents"},
            r"\(2, 12, 16, 24\) of 'map' is no feature map of layout='latents'",
        ),
        ({"features": "map", "prefix": 2}, "layout='tokens' with prefix=2 on images of 128 x 192"),
        ({"features": "classifier"}, r"output \(2, 3\) of 'classifier' is no feature map of layout=None"),
    ],
)
def test_what_is_registered_wrongly_is_refused(told, message):
    register_family(Toy, **told)
    with pytest.raises(UnsupportedModelError, match=message):
        settle(toy("channels_first"))


def test_a_wrong_prefix_is_refused():
    register_family(Toy, features="map", layout="tokens", prefix=1)
    with pytest.raises(UnsupportedModelError, match="with prefix=1"):
        settle(toy("tokens"))


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"features": "map", "layout": "NCHW"}, r"layout must be one of \['tokens', .*got 'NCHW'"),
        ({"layout": "tokens"}, r"name the module, features='\.\.\.'"),
        ({"prefix": 2}, r"name the module, features='\.\.\.'"),
        ({"features": "map", "prefix": -1}, "got -1"),
        ({"features": "map", "layout": "channels_first", "prefix": 2}, "got 2 with 'channels_first'"),
    ],
)
def test_a_call_that_makes_no_sense_is_refused_at_once(told, message):
    before = dict(table._FAMILIES)
    with pytest.raises(ValueError, match=message):
        register_family(Toy, **told)
    assert before == table._FAMILIES


def test_it_is_a_name_of_the_package():
    assert "register_family" in shapadapter.__all__
    assert shapadapter.register_family is table.register_family
