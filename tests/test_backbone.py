"""Finding a model's parts, and refusing the models in which token and removal cannot work."""

import copy

import families
import pytest
import torch
from families import CLASSES, DEPTH, FAMILIES, PREFIX, WIDTH, base, images
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    BertConfig,
    BertForSequenceClassification,
    CLIPModel,
    ImageGPTConfig,
    ImageGPTForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)
from transformers.models.vit.modeling_vit import ViTAttention

from shapadapter import ShapleyConfig
from shapadapter.adapter.layer import ShapleyLayer
from shapadapter.backbone import choose_removal, default_targets, evaluating, examine, linear_layers
from shapadapter.errors import ShapleyError, UnsupportedModelError

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
every_family = pytest.mark.parametrize("family", FAMILIES)


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
        "seats": [name for name, m in model.named_modules() if "_shapadapter_seat" in vars(m)],
        "configs": [(name, id(m.config)) for name, m in model.named_modules() if hasattr(m, "config")],
        "training": [m.training for m in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
    }


@every_family
def test_examine_finds_the_parts(family):
    model = base(family)
    before = state(model)
    anatomy = examine(model)
    assert tuple(name.rpartition(".")[0] for name in anatomy.blocks) == (BLOCKS[family],) * DEPTH
    assert len(anatomy.attentions) == DEPTH
    assert all(a.startswith(f"{b}.") for a, b in zip(anatomy.attentions, anatomy.blocks, strict=True))
    assert isinstance(model.get_submodule(anatomy.embedding), nn.Conv2d)
    assert (anatomy.patch, anatomy.channels, anatomy.width) == ((8, 8), 3, WIDTH)
    assert (anatomy.prefix, anatomy.classes) == (PREFIX[family], CLASSES)
    assert anatomy.grid(images(1, 32, 64)) == (4, 8)
    assert state(model) == before


@every_family
def test_examining_and_wrapping_draw_no_random_numbers_for_the_test_batch(family):
    model = base(family)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    anatomy = examine(model)
    choose_removal(model, anatomy, "auto")
    assert torch.equal(torch.get_rng_state(), before)


def test_rectangular_patches():
    model = families.build("vit", patch_size=(8, 16))
    anatomy = examine(model)
    assert anatomy.patch == (8, 16)
    assert anatomy.grid(images()) == (4, 2)
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
        anatomy = examine(families.build("vit", num_hidden_layers=depth))
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
    anatomy = examine(model)
    assert default_targets(model, anatomy) == ["q_proj", "v_proj"]
    names = linear_layers(model, anatomy)
    assert len(names) == 6 * DEPTH
    assert not any("classifier" in name for name in names)


def test_grid_refuses_what_is_no_image():
    anatomy = examine(base("vit"))
    for shape in ((3, 32, 32), (2, 1, 32, 32), (2, 3, 8, 8), (2, 3, 4, 64)):
        with pytest.raises(ShapleyError):
            anatomy.grid(torch.zeros(shape))


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


UNSUPPORTED = {
    "resnet": (
        lambda: ResNetForImageClassification(
            ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_labels=3)
        ),
        "convolution that cuts images in patches",
    ),
    "swin": (
        lambda: SwinForImageClassification(
            SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4)
        ),
        "SwinForImageClassification",
    ),
    "headless": (lambda: ViTModel(_vit_config()), r"\.logits"),
    "bert": (
        lambda: BertForSequenceClassification(
            BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
        ),
        "convolution that cuts images in patches",
    ),
    "linear": (lambda: nn.Linear(3, 3), "Hugging Face vision classifier.*Linear"),
    "sequential": (lambda: nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.Flatten()), "Hugging Face.*Sequential"),
    "clip": (lambda: CLIPModel(families.base("clip").config), "forward pass on a tiny batch"),
    "imagegpt": (
        lambda: ImageGPTForImageClassification(
            ImageGPTConfig(vocab_size=9, n_positions=16, n_embd=8, n_layer=1, n_head=2)
        ),
        "convolution that cuts images in patches",
    ),
    "two_lists": (
        lambda: TwoLists(_vit_config()),
        r"found 2: vit\.layers\.0 \.\. vit\.layers\.1; more\.0 \.\. more\.1",
    ),
    "no_model": (lambda: None, "NoneType"),
    "no_model_but_a_name": (lambda: "google/vit-base-patch16-224", "str"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_models_are_refused_with_what_was_found(name):
    make, message = UNSUPPORTED[name]
    torch.manual_seed(0)
    model = make()
    before = state(model) if isinstance(model, nn.Module) else None
    with pytest.raises(UnsupportedModelError, match=message):
        examine(model)
    if isinstance(model, nn.Module):
        assert state(model) == before
        with pytest.raises(UnsupportedModelError, match=message):
            get_peft_model(model, ShapleyConfig(target_modules=["q_proj"]))
        assert state(model) == before


def test_a_refused_model_works_as_before():
    """Swin shrinks its windows for good when it sees a small image, as the dry run's would be."""
    torch.manual_seed(0)
    model = UNSUPPORTED["swin"][0]().eval()
    logits = run(model).logits
    with pytest.raises(UnsupportedModelError):
        examine(model)
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


def _mixing():
    model = _vit()
    for block in model.vit.layers:
        block.layernorm_after = TokenMixer(block.layernorm_after)
    return model


FAULTY = {
    "leaky_auto": (_leaky, "auto", "absent patches"),
    "leaky_drop": (_leaky, "drop", "absent patches"),
    "leaky_mask": (_leaky, "mask", "absent patches"),
    "deaf_mask": (_deaf, "mask", "absent patches"),
    "mixing": (_mixing, "auto", "changes the model's own logits"),
}


@pytest.mark.parametrize("name", FAULTY)
@pytest.mark.parametrize("tune", ["lora", "frozen"])
def test_the_self_test_fails_and_leaves_no_trace(name, tune):
    make, removal, message = FAULTY[name]
    model = make()
    before, logits = state(model), run(model).logits
    with pytest.raises(UnsupportedModelError, match=message):
        get_peft_model(model, ShapleyConfig(removal=removal, tune=tune))
    assert not any(isinstance(m, ShapleyLayer) for m in model.modules())
    assert torch.equal(run(model).logits, logits)
    after = state(model)
    for key in ("hooks", "seats", "configs", "training", "modules", "keys", "requires_grad"):
        assert after[key] == before[key], key


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
    assert state(model)["seats"] == before["seats"]
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
    assert examine(model).sample == (32, 32)
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
