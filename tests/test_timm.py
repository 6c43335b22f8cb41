"""The laws for timm's models, behind transformers' TimmWrapperForImageClassification."""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import families
import pytest
import torch
from families import CLASSES, randomise, shapley, wrap
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from shapadapter.backbone import ForwardCall, default_targets, linear_layers, settle
from shapadapter.core.errors import UnsupportedModelError
from shapadapter.core.shapley import shapley_loss

pytest.importorskip("timm")
pytest.importorskip("torchvision")

from peft import PeftModel
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification, TimmWrapperModel
from zoo import Entry, calibrate
from zoo import inputs as zoo_inputs

PREDICTIONS = ("vote", "classifier")


@dataclass(frozen=True)
class Case:
    """One architecture, and what wrapping must find out about it.

    Attributes:
        architecture: timm's name.
        arguments: of `timm.create_model`, which make it small.
        removal: how its players are removed.
        targets: the layers that LoRA adapts by default, by the last parts of their names.
        size: of the images.
        grid: of the players.
        prefix: tokens before the patches.
        layout: how the final features lie.
    """

    architecture: str
    arguments: dict[str, Any]
    removal: str
    targets: set[str]
    size: tuple[int, int] = (32, 32)
    grid: tuple[int, int] = (4, 4)
    prefix: int = 0
    layout: str = "tokens"

    @property
    def players(self):
        return self.grid[0] * self.grid[1]


_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
_SWIN = {"img_size": 64, "embed_dim": 16, "depths": (1, 1, 2), "num_heads": (1, 2, 4), "window_size": 4}
_WIDE = {"size": (64, 96), "grid": (2, 3), "layout": "channels_first"}
_QKV = {"qkv"}
# The model takes the weights of `qkv` without calling it, so LoRA must go elsewhere.
_BESIDE_QKV = {"proj", "fc1", "fc2"}
_EFFICIENT = {"conv", "conv_pw", "conv_pwl", "conv_reduce", "conv_expand"}
_NF = {"conv", "conv1", "conv2", "conv2b", "conv3", "conv4", "fc1", "fc2", "final_conv"}
_COAT = {"conv2", "conv1_1x1", "conv3_1x1", "expand", "qkv", "proj", "fc1", "fc2"}

CASES = {
    # Only embeddings know places: tokens are dropped.
    "vit": Case("vit_tiny_patch16_224", _VIT, "drop", _QKV, prefix=1),
    "distilled": Case("deit_tiny_distilled_patch16_224", _VIT, "drop", _QKV, prefix=2),
    "registers": Case("vit_small_patch14_reg4_dinov2", {**_VIT, "init_values": 0.5}, "drop", _QKV, prefix=5),
    "map_pool": Case("vit_base_patch16_siglip_224", _VIT, "drop", _QKV),
    "cait": Case("cait_xxs24_224", {**_VIT, "init_values": 0.5}, "drop", _QKV),
    # Relative and rotary positions, with attention that can be masked.
    "beit": Case("beit_base_patch16_224", _VIT, "mask", _BESIDE_QKV, prefix=1),
    "eva02": Case("eva02_tiny_patch14_224", _VIT, "mask", _BESIDE_QKV, prefix=1),
    "dinov3": Case("vit_small_patch16_dinov3", {**_VIT, "init_values": 0.5}, "mask", _QKV, prefix=5),
    "shared_relpos": Case("vit_srelpos_small_patch16_224", _VIT, "mask", _QKV),
    # Tokens that can be neither dropped nor masked.
    "relpos": Case("vit_relpos_small_patch16_224", _VIT, "pixels", _QKV),
    "xcit": Case(
        "xcit_nano_12_p16_224", {"embed_dim": 32, "depth": 2, "eta": 0.5}, "pixels", _QKV, (64, 96), (4, 6), prefix=1
    ),
    # Hierarchies, and convolutional networks.
    "swin": Case("swin_tiny_patch4_window7_224", _SWIN, "pixels", _QKV, (64, 64), layout="channels_last"),
    "resnet": Case("test_resnet", {}, "pixels", {"3", "6", "1", "conv1", "conv2", "conv3"}, **_WIDE),
    "convnext": Case("test_convnext", {}, "pixels", {"fc1", "fc2", "1"}, **_WIDE),
    "efficientnet": Case("test_efficientnet", {}, "pixels", _EFFICIENT | {"conv_exp", "conv_head"}, **_WIDE),
    "mobilenet": Case("mobilenetv3_small_050", {}, "pixels", _EFFICIENT, **_WIDE),
    "nfnet": Case("test_nfnet", {}, "pixels", _NF, **_WIDE),
    "mambaout": Case(
        "test_mambaout", {}, "pixels", {"conv2", "conv", "fc1", "fc2"}, **{**_WIDE, "layout": "channels_last"}
    ),
    "coatnet": Case("test_coatnet", {}, "pixels", _COAT, (160, 160), (5, 5), layout="channels_first"),
}
PAIRS = [(name, prediction) for name in CASES for prediction in PREDICTIONS]
every_case = pytest.mark.parametrize("name", CASES)
every_pair = pytest.mark.parametrize(("name", "prediction"), PAIRS)
each_prediction = pytest.mark.parametrize("prediction", PREDICTIONS)


def make(architecture, arguments, model_class=TimmWrapperForImageClassification, **config):
    return model_class(
        TimmWrapperConfig(architecture=architecture, model_args=dict(arguments), num_labels=CLASSES, **config)
    )


@functools.cache
def _cached(name):
    case = CASES[name]
    torch.manual_seed(0)
    model = randomise(make(case.architecture, case.arguments))
    return calibrate(model, Entry("timm", make, size=case.size)).eval()


def base(name):
    """A copy of the case's one base model, frozen: torch multiplies by other kernels where weights ask for gradients."""
    return copy.deepcopy(_cached(name)).requires_grad_(False)


@functools.cache
def _wrapped(name, prediction):
    return wrap(base(name), prediction)


def wrapped(name, prediction="vote"):
    """A copy of a wrapped model: tests may change it."""
    return copy.deepcopy(_wrapped(name, prediction))


def pixels(name, seed=0):
    return zoo_inputs(Entry("timm", make, size=CASES[name].size), seed=seed)["pixel_values"]


def coalitions(name, count=5, seed=0):
    return families.coalitions(2, count, CASES[name].players, seed)


def run(model, images, **kwargs):
    with torch.no_grad():
        return model(pixel_values=images, **kwargs)


def close(one, other, tolerance=1e-6):
    return (one - other).abs().max().item() <= tolerance * max(1.0, other.abs().max().item())


def with_noise(name, images, present, scale):
    """The images with other pixels wherever `present` (B, N) says absent."""
    case = CASES[name]
    tiles = present.unflatten(1, case.grid)
    for axis in (0, 1):
        tiles = tiles.repeat_interleave(case.size[axis] // case.grid[axis], 1 + axis)
    noise = scale * torch.randn(images.shape, generator=torch.Generator().manual_seed(5))
    return torch.where(tiles[:, None], images, noise)


# -- what is found ----------------------------------------------------------------------------------------------------


@every_case
def test_parts_and_removal(name):
    case, model = CASES[name], base(name)
    state = copy.deepcopy(model.state_dict())
    anatomy, removal = settle(model)
    assert (removal, anatomy.mechanism, anatomy.attentions) == (case.removal, "readout", ())
    assert bool(anatomy.blocks) == (case.removal != "pixels")
    assert (anatomy.layout, anatomy.prefix) == (case.layout, case.prefix)
    assert anatomy.cells(pixels(name)) == case.grid
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@every_case
def test_the_same_parts_whatever_removal_is_asked_for(name):
    """An adapter is saved with the removal that was found, and must find the same features when it is loaded."""
    model = base(name)
    anatomy, removal = settle(model)
    assert settle(model, removal) == (anatomy, removal)
    assert settle(model, "pixels") == (anatomy, "pixels")


@every_case
def test_lora_goes_where_it_is_heard(name):
    case, model = CASES[name], base(name)
    anatomy, _ = settle(model)
    targets = default_targets(model, anatomy)
    assert {target.split(".")[-1] for target in targets} == case.targets
    called = set()
    for part, module in model.named_modules():
        module.register_forward_hook(lambda *_, part=part: called.add(part))
    run(model, pixels(name))
    named = {part for part, _ in model.named_modules() if any(f".{part}".endswith(f".{t}") for t in targets)}
    assert named <= called
    assert set(linear_layers(model, anatomy)) <= called
    assert not named & set(anatomy.behind)


# -- laws -------------------------------------------------------------------------------------------------------------


@every_pair
def test_attributions_and_null_sum_to_the_logits(name, prediction):
    model = wrapped(name, prediction)
    ends = torch.stack([torch.ones(2, CASES[name].players), torch.zeros(2, CASES[name].players)], dim=1).bool()
    output = run(model, pixels(name), coalitions=ends)
    assert output.attributions.shape == (2, CASES[name].players, CLASSES)
    assert output.attributions.std() > 1e-4
    total = output.null_values.double() + output.attributions.double().sum(1)
    assert ((total - output.logits).abs() <= 1e-5 * output.logits.abs().clamp(min=1)).all()
    assert close(output.coalition_values[:, 0], output.logits, 1e-5)
    assert close(output.coalition_values[:, 1], output.null_values, 1e-5)


@every_pair
def test_absent_players_have_no_influence_at_all(name, prediction):
    model = wrapped(name, prediction)
    for seed, scale in enumerate((1.0, 30.0, 1e4)):
        present = torch.rand(2, CASES[name].players, generator=torch.Generator().manual_seed(seed)) < 0.5
        clean = run(model, pixels(name), coalitions=present[:, None]).coalition_values
        dirty = run(model, with_noise(name, pixels(name), present, scale), coalitions=present[:, None])
        assert torch.equal(clean, dirty.coalition_values)
        if present.any(1).all():
            other = run(model, with_noise(name, pixels(name), ~present, scale), coalitions=present[:, None])
            assert not torch.equal(clean, other.coalition_values)


@every_case
def test_frozen_base_and_its_own_head_predict_as_before(name):
    plain = run(base(name), pixels(name)).logits
    assert plain.std() > 1e-3
    model = wrap(base(name), "classifier", tune="frozen")
    assert torch.equal(run(model, pixels(name), coalitions=coalitions(name)).logits, plain)


@every_pair
def test_disabled_or_unloaded_is_bit_identical(name, prediction):
    plain = run(base(name), pixels(name))
    model = wrapped(name, prediction)
    assert not torch.equal(run(model, pixels(name)).logits, plain.logits)
    with model.disable_adapter():
        disabled = run(model, pixels(name))
    assert type(disabled) is type(plain)
    assert torch.equal(disabled.logits, plain.logits)
    assert torch.equal(run(model.unload(), pixels(name)).logits, plain.logits)


@every_pair
def test_saved_and_loaded_is_bit_identical(tmp_path, name, prediction):
    model, chosen = wrapped(name, prediction), coalitions(name)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(name), tmp_path).eval()
    assert loaded.peft_config["default"].removal == CASES[name].removal
    assert shapley(loaded).anatomy == shapley(model).anatomy
    one, other = (run(m, pixels(name), coalitions=chosen) for m in (model, loaded))
    for key in ("logits", "attributions", "null_values", "coalition_values"):
        assert torch.equal(getattr(one, key), getattr(other, key))


def _train(model, name, **kwargs):
    output = model(
        pixel_values=pixels(name), labels=torch.tensor([0, 3]), coalitions=coalitions(name, 3)[:, 1:2], **kwargs
    )
    chosen = coalitions(name, 3)[:, 1:2]
    loss = output.loss + shapley_loss(output.attributions, chosen, output.coalition_values, output.null_values)
    loss.backward()


@every_pair
def test_a_training_step_reaches_all_that_is_trained_and_no_statistics(name, prediction):
    model = wrapped(name, prediction).train()
    buffers = {key: value.clone() for key, value in model.named_buffers()}
    _train(model, name)
    assert any(parameter.requires_grad for parameter in model.parameters())
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, key
            assert parameter.grad.isfinite().all(), key
            assert parameter.grad.any(), key
        else:
            assert parameter.grad is None, key
    for key, value in model.named_buffers():
        assert torch.equal(value, buffers[key]), key


# -- dropping is masking ----------------------------------------------------------------------------------------------


class _Masked(TorchFunctionMode):
    """Inside, attention among all tokens sees `keys` (B, T) bool alone: written apart from the adapter's own mask."""

    def __init__(self, keys):
        super().__init__()
        self.keys, self.calls = keys, 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is F.scaled_dot_product_attention and args[0].shape[2] == self.keys.shape[1]:
            bias = kwargs.pop("attn_mask", None)
            bias = 0.0 if bias is None else bias
            kwargs["attn_mask"] = (
                bias + torch.zeros(self.keys.shape).masked_fill(~self.keys, -torch.inf)[:, None, None]
            )
            self.calls += 1
        return function(*args, **kwargs)


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.removal != "pixels" and n != "cait"])
def test_removal_is_masked_attention(name):
    """Cait is left out: the bias in its talking heads lets masked keys speak, so that masking would be no removal."""
    case, model = CASES[name], wrap(base(name), "classifier", tune="frozen")
    hooks, plain = shapley(model).hooks, base(name)
    present = torch.stack([torch.arange(16) % 3 > 0, torch.arange(16) % 3 < 2])  # 10 and 11 of 16
    present[1, 0] = False
    index = present.nonzero()[:, 1].view(2, 10)
    with torch.no_grad(), hooks.during(ForwardCall(case.players, index, case.removal)) as current:
        model.get_base_model().forward(pixel_values=pixels(name))
    caught = []
    plain.timm_model.blocks[-1].register_forward_hook(lambda *call: caught.append(call[-1]))
    with _Masked(F.pad(present, (case.prefix, 0), value=True)) as mode:
        run(plain, pixels(name))
    assert mode.calls == len(plain.timm_model.blocks)
    expected = caught[0][:, case.prefix :].gather(1, index[..., None].expand(-1, -1, 32))
    assert close(current.features, expected, 1e-5)
    assert not close(current.features, _features(plain, name).gather(1, index[..., None].expand(-1, -1, 32)), 1e-3)


def _features(model, name):
    caught = []
    with model.timm_model.blocks[-1].register_forward_hook(lambda *call: caught.append(call[-1])):
        run(model, pixels(name))
    return caught[0][:, CASES[name].prefix :]


class _Mixing(nn.Module):
    """A block that cannot be masked, and mixes tokens by their place in whatever sequence it is given."""

    def __init__(self, block, mix, scale):
        super().__init__()
        self.block, self.mix, self.scale = block, mix, scale

    def forward(self, x):
        return x + self.scale * (self.block(x) + self.mix(x))


def _nearby(x):
    place = torch.arange(x.shape[1], dtype=x.dtype)
    return torch.softmax(-(place[:, None] - place).abs(), -1) @ x


_MIXES: dict[str, Callable] = {
    "neighbours": lambda x: x.roll(1, 1),
    "distance": _nearby,
    "fourier": lambda x: torch.fft.fft(x, dim=1).real,
}


def _mixing(mix, scale):
    model = base("vit")
    for index, block in enumerate(model.timm_model.blocks):
        model.timm_model.blocks[index] = _Mixing(block, mix, scale)
    return model


@pytest.mark.parametrize("scale", [0.5, 1e-5])
@pytest.mark.parametrize("mix", _MIXES)
def test_dropping_is_refused_where_blocks_count_places(mix, scale):
    """Nothing breaks, nothing leaks and nothing can be masked: only the order of the tokens tells."""
    anatomy, removal = settle(_mixing(_MIXES[mix], scale))
    assert (removal, anatomy.blocks) == ("pixels", ())
    assert settle(_mixing(_MIXES[mix], scale), "pixels") == (anatomy, "pixels")
    with pytest.raises(UnsupportedModelError, match="taken for others"):
        settle(_mixing(_MIXES[mix], scale), "drop")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scale", [0.5, 1e-5])
def test_dropping_is_taken_where_blocks_see_a_set(scale, dtype):
    anatomy, removal = settle(_mixing(torch.zeros_like, scale).to(dtype))
    assert (removal, anatomy.prefix) == ("drop", 1)


# -- roads ------------------------------------------------------------------------------------------------------------


@each_prediction
@pytest.mark.parametrize("name", ["vit", "convnext"])
def test_full_training(tmp_path, name, prediction):
    model = wrap(base(name), prediction, tune="full")
    assert model.peft_config["default"].modules_to_save == ["timm_model"]
    model.train()
    _train(model, name)
    behind = tuple(f"{part.split('.', 1)[1]}." for part in shapley(model).anatomy.behind)
    for key, parameter in model.named_parameters():
        own = key.split("modules_to_save.default.")[-1]
        # A vote leaves out what comes after the features.
        if parameter.requires_grad and not (prediction == "vote" and own.startswith(behind)):
            assert parameter.grad is not None, key
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(name), tmp_path).eval()
    one, other = (run(m, pixels(name), coalitions=coalitions(name)) for m in (model, loaded))
    assert torch.equal(one.attributions, other.attributions)
    assert torch.equal(one.coalition_values, other.coalition_values)
    with model.disable_adapter():
        assert torch.equal(run(model, pixels(name)).logits, run(base(name), pixels(name)).logits)


def test_the_classifier_beside_lora(tmp_path):
    model = wrap(base("vit"), "classifier", modules_to_save=["head"])
    model.train()
    _train(model, "vit")
    assert model.get_base_model().timm_model.head.modules_to_save["default"].weight.grad.any()
    with torch.no_grad():
        model.get_base_model().timm_model.head.modules_to_save["default"].weight.add_(0.1)
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base("vit"), tmp_path).eval()
    assert torch.equal(run(loaded, pixels("vit")).logits, run(model, pixels("vit")).logits)


@pytest.mark.parametrize("name", CASES)
def test_gradient_checkpointing_gives_the_same_gradients(name):
    found = []
    for checkpointing in (False, True):
        model = wrapped(name)
        if checkpointing:
            if not model.get_base_model().supports_gradient_checkpointing:
                pytest.skip("timm has no gradient checkpointing for it")
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)  # some have drop path
        _train(model.train(), name)
        found.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(close(found[1][key], gradient, 1e-6) for key, gradient in found[0].items())


@pytest.mark.parametrize("name", ["vit", "beit", "eva02", "resnet"])
def test_bf16_autocast(name):
    model, chosen = wrapped(name), coalitions(name)
    exact = run(model, pixels(name), coalitions=chosen)
    with torch.autocast("cpu", torch.bfloat16):
        output = run(model, pixels(name), coalitions=chosen)
    assert close(output.null_values + output.attributions.sum(1), output.logits.float(), 1e-2)
    assert close(output.coalition_values, exact.coalition_values, 0.1)


@pytest.mark.parametrize("name", ["vit", "convnext"])
def test_hidden_states_are_those_of_the_base(name):
    expected = run(base(name), pixels(name), output_hidden_states=True)
    model = wrap(base(name), "classifier", tune="frozen")
    got = run(model, pixels(name), output_hidden_states=True, coalitions=coalitions(name))
    assert len(got.hidden_states) == len(expected.hidden_states)
    assert all(torch.equal(a, b) for a, b in zip(got.hidden_states, expected.hidden_states, strict=True))


def test_players_finer_than_patches_are_removed_as_pixels():
    model = wrap(base("vit"), grid=(8, 8))
    assert model.peft_config["default"].removal == "pixels"
    output = run(model, pixels("vit"), coalitions=families.coalitions(2, 3, 64))
    assert output.attributions.shape == (2, 64, CLASSES)
    assert close(output.null_values + output.attributions.sum(1), output.logits, 1e-5)


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_grey_images(name):
    case = CASES[name]
    grey = make(case.architecture, {**case.arguments, "in_chans": 1}).eval()
    model = wrap(grey)
    output = run(model, pixels(name)[:, :1], coalitions=coalitions(name))
    assert close(output.null_values + output.attributions.sum(1), output.logits, 1e-5)


@pytest.mark.parametrize("name", ["vit", "convnext"])
def test_a_model_without_classifier_votes(name):
    case = CASES[name]
    model = wrap(make(case.architecture, case.arguments, TimmWrapperModel).eval())
    assert model.peft_config["default"].removal == case.removal
    output = run(model, pixels(name), coalitions=coalitions(name))
    assert output.attributions.shape == (2, case.players, CLASSES)


def test_the_size_it_was_pretrained_for():
    """Without img_size among the arguments, timm's own table says which size a model takes."""
    small = {"patch_size": 56, "embed_dim": 16, "depth": 1, "num_heads": 2}
    assert settle(make("vit_tiny_patch16_224", small).eval())[0].sample == (224, 224)
    told = make("vit_tiny_patch16_224", {**small, "img_size": 112}, pretrained_cfg={"input_size": [3, 448, 448]})
    assert settle(told.eval())[0].sample == (112, 112)
