"""Finding a model's parts, and refusing the models in which token and removal cannot work."""

import copy

import families
import pytest
import torch
import zoo
from families import CLASSES, DEPTH, FAMILIES, PREFIX, WIDTH, base, images
from laws import LATENTS, MAPS, TOKENS, on
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    BertConfig,
    BertForSequenceClassification,
    CLIPModel,
    Dinov2Model,
    ImageGPTConfig,
    ImageGPTForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ResNetModel,
    SwinConfig,
    SwinForImageClassification,
    SwinModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
    YolosConfig,
    YolosForObjectDetection,
)
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.models.vit.modeling_vit import ViTAttention
from zoo import MATCHING, ZOO

from shapadapter import ShapleyConfig
from shapadapter.adapter.layer import ShapleyLayer
from shapadapter.backbone import default_targets, evaluating, linear_layers, settle
from shapadapter.backbone import families as table
from shapadapter.backbone.families import register_family
from shapadapter.backbone.search import find_readout, find_sequence
from shapadapter.core.errors import ImageError, UnsupportedModelError

BLOCKS = {
    "vit": "vit.layers",
    "deit": "deit.layers",
    "deit_teacher": "deit.layers",
    "vit_msn": "vit.layers",
    "dinov2": "dinov2.encoder.layer",
    "dinov2_registers": "dinov2_with_registers.encoder.layer",
    "ijepa": "ijepa.layers",
    "clip": "vision_model.encoder.layers",
    "metaclip2": "vision_model.encoder.layers",
    "siglip": "vision_model.encoder.layers",
}
every_family = on(FAMILIES, "family")


def run(model, **kwargs):
    with torch.no_grad():
        return model(pixel_values=images(), **kwargs)


def state(model):
    """Everything about a model that wrapping could leave behind."""
    return {
        "modules": [name for name, _ in model.named_modules()],
        "keys": list(model.state_dict()),
        "hooks": [
            (name, len(m._forward_hooks), len(m._forward_pre_hooks))
            for name, m in model.named_modules()
            if m._forward_hooks or m._forward_pre_hooks
        ],
        "patches": [name for name, m in model.named_modules() if "_shapadapter_patch" in vars(m)],
        "configs": [(name, id(m.config)) for name, m in model.named_modules() if hasattr(m, "config")],
        "training": [m.training for m in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
    }


@every_family
def test_the_parts_of_a_sequence_are_found(family):
    model = base(family)
    before = state(model)
    anatomy = find_sequence(model)
    assert (anatomy.kind, anatomy.mechanism, anatomy.layout) == ("classifier", "sequence", "tokens")
    assert tuple(name.rpartition(".")[0] for name in anatomy.blocks) == (BLOCKS[family],) * DEPTH
    assert len(anatomy.attentions) == DEPTH
    assert all(a.startswith(f"{b}.") for a, b in zip(anatomy.attentions, anatomy.blocks, strict=True))
    assert isinstance(model.get_submodule(anatomy.entrance), nn.Conv2d)
    assert anatomy.source == anatomy.blocks[-1]
    assert anatomy.backbone == (BLOCKS[family].split(".")[0],)
    assert any("classifier" in name for name in anatomy.behind)
    assert not any(name.startswith(anatomy.blocks) for name in anatomy.behind)
    assert (anatomy.cell, anatomy.channels, anatomy.width) == ((8, 8), 3, WIDTH)
    assert (anatomy.prefix, anatomy.classes) == (PREFIX[family], CLASSES)
    assert anatomy.cells(images(1, 32, 64)) == (4, 8)
    assert anatomy.seen(images(1, 35, 64), (4, 8)) == (32, 64)
    assert state(model) == before
    assert settle(model) == (anatomy, "drop")
    assert state(model) == before


def test_the_self_test_draws_no_random_numbers():
    model = base("vit")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    settle(model)
    assert torch.equal(torch.get_rng_state(), before)


@on([name for name in TOKENS if name not in FAMILIES])
def test_the_parts_of_other_sequences_are_found(name):
    entry = ZOO[name]
    anatomy, removal = settle(zoo.base(name))
    kind = "headless" if name == "dinov3" else "matching" if entry.kind == MATCHING else "classifier"
    assert (anatomy.kind, anatomy.mechanism, len(anatomy.blocks)) == (kind, "sequence", DEPTH)
    assert (anatomy.prefix, anatomy.width) == (entry.prefix, WIDTH)
    # Relative and rotary positions, and NaFlex' own mask, know no shorter sequence.
    assert removal == ("mask" if name.startswith(("beit", "data2vec", "dinov3", "siglip2")) else "drop")


@on([*MAPS, *LATENTS])
def test_the_final_map_of_everything_else_is_found(name):
    entry, model = ZOO[name], zoo.base(name)
    before = state(model)
    anatomy, removal = settle(model)
    mechanism = "latents" if entry.layout == "latents" else "readout"
    assert (anatomy.kind, anatomy.mechanism, removal) == ("classifier", mechanism, "pixels")
    assert anatomy.classes == CLASSES
    assert not anatomy.blocks + anatomy.attentions
    if entry.layout == "latents":
        assert (anatomy.layout, anatomy.width) == ("latents", entry.shape[1])
    else:
        assert anatomy.cells(**zoo.inputs(entry)) == entry.grid
        assert (anatomy.prefix, anatomy.width) == (entry.prefix, entry.shape[0 if entry.layout == "CHW" else 1])
        assert torch.equal(_read(model, anatomy, entry), zoo.features(model, entry))
    if entry.resized is not None and entry.layout != "latents":
        assert anatomy.cells(torch.zeros(1, 3, 128, 96)) == (128 // anatomy.cell[0], 96 // anatomy.cell[1])
    assert any(name.startswith(("classifier", "fc", "head", "perceiver.decoder")) for name in anatomy.behind)
    assert state(model) == before


def _read(model, anatomy, entry):
    """What comes out where the dry run says that the final features do."""
    caught = []
    hook = model.get_submodule(anatomy.source).register_forward_hook(lambda _, __, output: caught.append(output))
    with hook, torch.no_grad():
        model(**zoo.inputs(entry))
    return caught[-1] if torch.is_tensor(caught[-1]) else caught[-1].last_hidden_state


@pytest.mark.parametrize(
    ("name", "side", "cells"),
    [("resnet", 200, 7), ("convnext", 200, 6), ("efficientnet", 200, 6), ("swin", 200, 7), ("cvt", 200, 13)],
)
def test_incomplete_cells_at_the_border_count_as_the_model_counts_them(name, side, cells):
    model = zoo.base(name)
    anatomy = find_readout(model)
    image = images(1, side, 64)
    assert anatomy.cells(image) == (cells, 64 // anatomy.cell[1])
    rows, _ = zoo.features(model, name, pixel_values=image).shape[-2:] if name != "swin" else (cells, 0)
    assert rows == cells
    assert anatomy.seen(image, (cells, 2))[0] == (side if anatomy.rounds_up else 192)


def test_rectangular_patches():
    model = families.build("vit", patch_size=(8, 16))
    anatomy = find_sequence(model)
    assert anatomy.cell == (8, 16)
    assert anatomy.cells(images()) == (4, 2)
    output = run(families.wrap(model), coalitions=families.coalitions(2, 4, 8))
    assert output.attributions.shape == (2, 8, CLASSES)
    assert torch.allclose(output.coalition_values[:, 0], output.logits, atol=1e-5)


def test_other_channel_counts():
    model = families.build("vit", num_channels=1)
    wrapped = families.wrap(model)
    with torch.no_grad():
        assert wrapped(pixel_values=torch.randn(2, 1, 32, 32)).attributions.shape == (2, 16, CLASSES)


def test_many_blocks_and_a_single_block():
    for depth in (1, 5):
        anatomy = find_sequence(families.build("vit", num_hidden_layers=depth))
        assert len(anatomy.blocks) == depth
        assert families.wrap(families.build("vit", num_hidden_layers=depth)) is not None


def test_two_classes_and_one():
    for classes in (1, 2):
        names = {index: f"class {index}" for index in range(classes)}
        model = families.wrap(families.build("vit", id2label=names, label2id={v: k for k, v in names.items()}))
        assert run(model).attributions.shape == (2, 16, classes)


@every_family
def test_default_targets_and_linear_layers(family):
    model = base(family)
    anatomy = find_sequence(model)
    assert default_targets(model, anatomy) == ["q_proj", "v_proj"]
    names = linear_layers(model, anatomy)
    assert len(names) == 6 * DEPTH
    assert not any("classifier" in name for name in names)


def test_cells_refuse_what_is_no_image():
    anatomy = find_sequence(base("vit"))
    for shape, message in (
        ((3, 32, 32), r"\(batch, 3, height, width\), got \(3, 32, 32\)"),
        ((2, 1, 32, 32), r"got \(2, 1, 32, 32\)"),
        ((2, 3, 8, 8), "8 x 8 pixels holds 1 x 1 patches"),
        ((2, 3, 4, 64), "at least two players"),
    ):
        with pytest.raises(ImageError, match=message):
            anatomy.cells(torch.zeros(shape))


def test_cells_of_patches_need_their_shapes():
    anatomy = find_sequence(zoo.base("siglip2"))
    batch = zoo.inputs("siglip2")
    assert anatomy.cells(**batch) == (4, 4)
    with pytest.raises(ImageError, match="without spatial_shapes"):
        anatomy.cells(batch["pixel_values"])
    with pytest.raises(ImageError, match=r"one grid of patches, got \[\(3, 5\), \(4, 4\)\]"):
        anatomy.cells(batch["pixel_values"], torch.tensor([[4, 4], [3, 5]]))


def test_evaluating_restores_each_modules_own_mode():
    model = base("vit").train()
    model.vit.layers[0].eval()
    before = [m.training for m in model.modules()]
    with evaluating(model):
        assert not any(m.training for m in model.modules())
    assert [m.training for m in model.modules()] == before
    with pytest.raises(ValueError), evaluating(model):
        int("no number")
    assert [m.training for m in model.modules()] == before


# -- refused ----------------------------------------------------------------------------------------------------------


class TwoLists(ViTForImageClassification):
    """Two towers of alike blocks, one after the other."""

    def __init__(self, config):
        super().__init__(config)
        self.more = nn.ModuleList([copy.deepcopy(self.vit.layers[0]), copy.deepcopy(self.vit.layers[1])])

    def forward(self, pixel_values, **kwargs):
        hidden = self.vit(pixel_values, interpolate_pos_encoding=True).last_hidden_state
        for block in self.more:
            hidden = block(hidden)
        return type("Output", (), {"logits": self.classifier(hidden[:, 0])})()


def _vit_config(**kwargs):
    return families.base("vit").config.__class__(**{**families.base("vit").config.to_dict(), **kwargs})


SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
UNSUPPORTED = {
    "bert": (
        lambda: BertForSequenceClassification(
            BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
        ),
        "vision model, got BertForSequenceClassification, whose forward takes no pixel_values",
    ),
    "linear": (lambda: nn.Linear(3, 3), "Hugging Face vision model.*got Linear"),
    "sequential": (lambda: nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.Flatten()), "Hugging Face.*Sequential"),
    "imagegpt": (
        lambda: ImageGPTForImageClassification(
            ImageGPTConfig(vocab_size=9, n_positions=16, n_embd=8, n_layer=1, n_head=2)
        ),
        "ImageGPTForImageClassification is not supported: it reads colour clusters",
    ),
    "hiera_two_pools": (lambda: zoo.base("hiera_two_pools"), "with num_query_pool=2 of 4 stages"),
    "detection": (
        lambda: YolosForObjectDetection(
            YolosConfig(**families._VISION, image_size=[32, 32], patch_size=8, num_detection_tokens=5, num_labels=2)
        ),
        r"scores of shape \(batch, classes\), got \(2, 5, 3\); load the model with AutoModelForImageClassification",
    ),
    "two_lists": (
        lambda: TwoLists(_vit_config()),
        r"found 2: vit\.layers\.0 \.\. vit\.layers\.1; more\.0 \.\. more\.1\..*"
        r"register_family\(type\(model\), features='more\.1'\)",
    ),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_models_are_refused_with_what_was_found(name):
    make, message = UNSUPPORTED[name]
    torch.manual_seed(0)
    model = make()
    before = state(model)
    with pytest.raises(UnsupportedModelError, match=message):
        settle(model)
    assert state(model) == before
    with pytest.raises(UnsupportedModelError, match=message):
        get_peft_model(model, ShapleyConfig(target_modules=["q_proj"]))
    assert state(model) == before


@pytest.mark.parametrize("model", [None, "google/vit-base-patch16-224", ViTForImageClassification])
def test_what_is_no_model_is_refused(model):
    with pytest.raises(UnsupportedModelError, match=rf"AutoModelForImageClassification.*got {type(model).__name__}\."):
        settle(model)


def test_an_explicit_removal_that_needs_tokens_is_refused_without_them():
    for removal in ("drop", "mask"):
        with pytest.raises(UnsupportedModelError, match=f"found none.*removal='{removal}' takes.*leave it at 'auto'"):
            settle(zoo.base("resnet"), removal)
    with pytest.raises(UnsupportedModelError, match="this model takes patches; use removal='mask'"):
        settle(zoo.base("siglip2"), "pixels")


def test_a_model_with_two_lists_can_be_registered(monkeypatch):
    monkeypatch.setattr(table, "_FAMILIES", dict(table._FAMILIES))
    register_family(TwoLists, features="more.1", layout="tokens", prefix=1)
    model = _vit(TwoLists)
    anatomy, removal = settle(model)
    assert (anatomy.source, anatomy.mechanism, anatomy.prefix, removal) == ("more.1", "readout", 1, "pixels")
    assert anatomy.backbone == ("vit", "more")
    output = run(families.wrap(model))
    assert torch.allclose(output.attributions.sum(1) + output.null_values, output.logits, atol=1e-5)


# -- supported, though not at first sight -----------------------------------------------------------------------------

HEADLESS = {
    "vit": (lambda: ViTModel(_vit_config()), "sequence", (8, 8), 1),
    "dinov2": (lambda: Dinov2Model(base("dinov2").config), "sequence", (8, 8), 1),
    "resnet": (
        lambda: ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8] * 4, depths=[1] * 4)),
        "readout",
        (32, 32),
        0,
    ),
    # Its pooler's output (2, 64, 1) could be taken for 64 tokens.
    "swin": (
        lambda: SwinModel(
            SwinConfig(**{**SWIN, "embed_dim": 16, "depths": [1] * 3, "num_heads": [2] * 3, "window_size": 2})
        ),
        "readout",
        (16, 16),
        0,
    ),
}


@pytest.mark.parametrize("name", HEADLESS)
def test_a_model_without_a_classifier_can_vote(name):
    make, mechanism, cell, prefix = HEADLESS[name]
    model = make().eval()
    model.config.num_labels = 7
    anatomy, _ = settle(model)
    assert (anatomy.kind, anatomy.mechanism, anatomy.cell, anatomy.prefix) == ("headless", mechanism, cell, prefix)
    assert anatomy.classes == 7
    before = state(model)
    with pytest.raises(UnsupportedModelError, match=r"no classifier to predict with\. Use .*prediction='vote'"):
        get_peft_model(model, ShapleyConfig(prediction="classifier"))
    assert state(model) == before
    height, width = (32, 32) if mechanism == "sequence" else (64, 96)
    output = families.wrap(model)(pixel_values=images(2, height, width))
    assert output.logits.shape == (2, 7)
    assert output.attributions.shape == (2, (height // cell[0]) * (width // cell[1]), 7)


def test_a_matching_model_is_recognised_by_its_texts():
    anatomy, removal = settle(CLIPModel(base("clip").config))
    assert (anatomy.kind, anatomy.mechanism, removal) == ("matching", "sequence", "drop")
    assert anatomy.classes == base("clip").config.projection_dim


def test_a_map_that_does_not_grow_with_the_image_is_none():
    class Fixed(ResNetForImageClassification):
        def __init__(self, config):
            super().__init__(config)
            self.resize = nn.AdaptiveAvgPool2d((4, 6))
            self.resnet.pooler = nn.Sequential(self.resize, self.resnet.pooler)
            self.after = nn.Identity()

        def forward(self, pixel_values, **kwargs):
            hidden = self.after(self.resize(self.resnet(pixel_values).last_hidden_state))
            return ImageClassifierOutput(logits=self.classifier(hidden.mean((2, 3), keepdim=True)))

    model = Fixed(ResNetConfig(embedding_size=8, hidden_sizes=[8] * 4, depths=[1] * 4))
    with pytest.raises(UnsupportedModelError, match=r"'after' was taken for .* does not grow.*register_family"):
        settle(model)


def test_patches_that_do_not_divide_the_sample():
    """Patches of 14 pixels, and blocks that mix them by more than attention: the map is read out."""
    model = _mixing(families.build("dinov2", patch_size=14, image_size=56))
    anatomy, removal = settle(model)
    assert (anatomy.mechanism, anatomy.cell, anatomy.prefix, removal) == ("readout", (14, 14), 1, "pixels")
    assert anatomy.cells(images(1, 56, 70)) == (4, 5)


def test_a_refused_model_works_as_before():
    """Swin shrinks its windows for good when it sees a small image, as the dry run's would be."""
    torch.manual_seed(0)
    model = SwinForImageClassification(SwinConfig(**SWIN)).eval()
    logits = run(model).logits
    with pytest.raises(UnsupportedModelError):
        find_sequence(model)
    with pytest.raises(UnsupportedModelError):
        settle(model, "drop")
    assert torch.equal(run(model).logits, logits)
    settle(model)
    assert torch.equal(run(model).logits, logits)


# -- the self-test ----------------------------------------------------------------------------------------------------


class Leaky(ViTForImageClassification):
    """Patches mix before the blocks, so that a removed player is still in its neighbours."""

    def __init__(self, config):
        super().__init__(config)
        embed = self.vit.embeddings.forward
        self.vit.embeddings.forward = lambda *args, **kwargs: self._mix(embed(*args, **kwargs))

    def _mix(self, hidden):
        return hidden + 0.1 * hidden[:, 1:].mean(1, keepdim=True)


class DeafAttention(ViTAttention):
    """Takes an attention mask and ignores it, as several families do."""

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        return super().forward(hidden_states, None, **kwargs)


class TokenMixer(nn.Module):
    """A block part that lets all positions of the sequence see each other, past the attention."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, hidden_states):
        return self.inner(hidden_states) + 0.1 * hidden_states.mean(1, keepdim=True)


def _vit(cls=ViTForImageClassification):
    torch.manual_seed(0)
    return families.randomise(cls(_vit_config())).eval()


def _leaky():
    return _vit(Leaky)


def _deaf():
    model = _vit()
    for block in model.vit.layers:
        block.attention.__class__ = DeafAttention
    return model


def _mixing(model=None):
    """One norm in each block is wrapped, so that positions see each other past the attention."""
    model = _vit() if model is None else model
    for block in model.vit.layers if hasattr(model, "vit") else model.dinov2.encoder.layer:
        name = "layernorm_after" if hasattr(block, "layernorm_after") else "norm2"
        setattr(block, name, TokenMixer(getattr(block, name)))
    return model


FAULTY = {
    "leaky_drop": (_leaky, "drop", "absent patches"),
    "leaky_mask": (_leaky, "mask", "absent patches"),
    "deaf_mask": (_deaf, "mask", "absent patches"),
    "mixing_drop": (_mixing, "drop", "changes the model's own logits"),
    "mixing_mask": (_mixing, "mask", "changes the model's own logits.*leave it at 'auto'"),
}


@pytest.mark.parametrize(
    ("name", "tune"), [(name, "lora") for name in FAULTY] + [("leaky_drop", "frozen"), ("mixing_mask", "frozen")]
)
def test_the_self_test_fails_and_leaves_no_trace(name, tune):
    make, removal, message = FAULTY[name]
    model = make()
    before, logits = state(model), run(model).logits
    with pytest.raises(UnsupportedModelError, match=message):
        get_peft_model(model, ShapleyConfig(removal=removal, tune=tune))
    assert not any(isinstance(m, ShapleyLayer) for m in model.modules())
    assert torch.equal(run(model).logits, logits)
    after = state(model)
    for key in ("hooks", "patches", "configs", "training", "modules", "keys", "requires_grad"):
        assert after[key] == before[key], key


@pytest.mark.parametrize("removal", ["auto", "pixels"])
@pytest.mark.parametrize(("make", "mechanism"), [(_leaky, "sequence"), (_mixing, "readout")])
def test_pixels_are_replaced_where_tokens_cannot_be_removed(make, mechanism, removal):
    """Exact in their own way: what a removed tile showed has no influence, though its token sees other tiles."""
    model = make()
    logits = run(model).logits
    wrapped = families.wrap(model, removal=removal, prediction="classifier", tune="frozen")
    config = wrapped.peft_config["default"]
    assert (config.removal, config.mechanism) == ("pixels", mechanism)
    output = run(wrapped, coalitions=families.coalitions())
    assert torch.allclose(output.logits, logits, atol=1e-6)
    present = families.coalitions()
    dirty = families.remove_noise(images(), present[:, 1])
    with torch.no_grad():
        again = wrapped(pixel_values=dirty, coalitions=present)
    assert torch.equal(again.coalition_values[:, 1], output.coalition_values[:, 1])
    assert not torch.equal(again.logits, output.logits)


def test_a_second_attempt_after_a_failure_is_possible():
    model = _deaf()
    with pytest.raises(UnsupportedModelError, match="absent patches"):
        get_peft_model(model, ShapleyConfig(removal="mask"))
    wrapped = get_peft_model(model, ShapleyConfig(removal="drop"))
    assert run(wrapped).attributions.shape == (2, 16, CLASSES)


def test_a_failing_second_adapter_leaves_the_first_alone():
    model = families.wrap(_deaf(), removal="drop")
    before = run(model, coalitions=families.coalitions())
    with pytest.raises(UnsupportedModelError, match="absent patches"):
        model.add_adapter("other", ShapleyConfig(removal="mask", target_modules=["q_proj"]))
    after = run(model, coalitions=families.coalitions())
    for field in ("logits", "attributions", "coalition_values"):
        assert torch.equal(getattr(after, field), getattr(before, field))
    assert "other" not in model.peft_config
    assert not any(".other" in name for name, _ in model.named_parameters())


def test_a_model_that_breaks_on_a_shorter_sequence_is_refused_by_name():
    class Fixed(ViTAttention):
        def forward(self, hidden_states, *args, **kwargs):
            hidden_states + self.table[:, : hidden_states.shape[1]]  # breaks where a table is too short
            if hidden_states.shape[1] in (7, 8):
                raise RuntimeError("the size of tensor a must match the size of tensor b")
            return super().forward(hidden_states, *args, **kwargs)

    model = _vit()
    for block in model.vit.layers:
        block.attention.__class__ = Fixed
        block.attention.table = torch.zeros(1, 999, 1)
    before = state(model)
    with pytest.raises(UnsupportedModelError):
        get_peft_model(model, ShapleyConfig(removal="drop"))
    assert state(model)["hooks"] == before["hooks"]
    assert state(model)["patches"] == before["patches"]
    auto = get_peft_model(_fixed_copy(model, Fixed), ShapleyConfig())
    assert auto.peft_config["default"].removal == "mask"


def _fixed_copy(model, cls):
    fresh = _vit()
    for block in fresh.vit.layers:
        block.attention.__class__ = cls
        block.attention.table = torch.zeros(1, 999, 1)
    return fresh


def test_auto_falls_back_to_dropping_where_masks_are_ignored():
    wrapped = get_peft_model(_deaf(), ShapleyConfig())
    assert wrapped.peft_config["default"].removal == "drop"


def test_wrapping_keeps_the_training_mode():
    for mode in (True, False):
        wrapped = get_peft_model(base("vit").train(mode), ShapleyConfig())
        # PEFT makes its own new modules in training mode, whatever the base is in.
        modules = [m for n, m in wrapped.get_base_model().named_modules() if "lora_" not in n or "shapley" in n]
        assert {m.training for m in modules if not isinstance(m, LoraLayer)} == {mode}


def test_self_test_in_a_dropout_model_in_training_mode():
    model = families.build("vit", hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5).train()
    assert get_peft_model(model, ShapleyConfig(lora_dropout=0.5)) is not None


def test_a_model_that_takes_one_size_only():
    class OneSize(ViTForImageClassification):
        def forward(self, pixel_values, **kwargs):
            kwargs.pop("interpolate_pos_encoding", None)
            if tuple(pixel_values.shape[2:]) != (32, 32):
                raise ValueError("only 32 x 32")
            return super().forward(pixel_values, **kwargs)

    model = _vit(OneSize)
    assert find_sequence(model).sample == (32, 32)
    assert run(families.wrap(model)).attributions.shape == (2, 16, CLASSES)


def test_the_config_class_has_no_trace_of_us():
    assert "shapadapter" not in str(vars(ViTConfig))


def test_masking_refuses_a_kernel_that_may_ignore_the_mask():
    """A run that was silently not masked would be the worst of bugs."""
    model = families.wrap(families.build("vit"), removal="mask")
    run(model, coalitions=families.coalitions(2, 4, 16))
    sdpa = AttentionInterface()["sdpa"]
    AttentionInterface.register("deaf", lambda module, q, k, v, mask, **kwargs: sdpa(module, q, k, v, None, **kwargs))
    AttentionMaskInterface.register("deaf", AttentionMaskInterface()["sdpa"])
    model.get_base_model().config._attn_implementation = "deaf"
    with pytest.raises(UnsupportedModelError, match="deaf"):
        run(model, coalitions=families.coalitions(2, 4, 16))
