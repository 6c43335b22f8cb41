"""The laws of the game and of the adapter, for every family of the zoo."""

import copy
import dataclasses
import functools
import math

import families
import pytest
import torch
import zoo
from families import CLASSES, FAMILIES, PATCH, shapley, wrap
from peft import AutoPeftModel, PeftModel
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import AutoModelForImageClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
from zoo import FIXED, MATCHING, READOUT, REFUSED, SEQUENCE, ZOO, of_kind

from shapadapter import ShapleyConfig, ShapleyOutput, UnsupportedModelError
from shapadapter.backbone import original_name
from shapadapter.backbone.families import refused_families
from shapadapter.core.errors import CheckpointError, ImageError
from shapadapter.core.losses import shapley_loss

PATCHED = ("siglip2", "siglip2_model")
"""Their images come as patches, and their padding is masked already."""
RELATIVE = ("beit", "beit_shared", "data2vec", "data2vec_shared", "dinov3")
"""Their tokens know each other's distance, so that none can be left out."""
UNORDERED = ("hiera_two_pools",)
TOKENS = of_kind(SEQUENCE, MATCHING)
MAPS = tuple(name for name in of_kind(READOUT) if name not in UNORDERED and ZOO[name].layout != "latents")
LATENTS = tuple(name for name in of_kind(READOUT) if ZOO[name].layout == "latents")
NAMES = (*TOKENS, *MAPS, *LATENTS)
RESIZED = tuple(name for name in NAMES if ZOO[name].resized is not FIXED and name not in PATCHED)
MATCHERS = of_kind(MATCHING)
SLOW = ("perceiver_learned", "perceiver_fourier")
"""Every pixel is an input of theirs; what perceiver_conv shows need not be shown again."""
CHECKPOINTED = (*TOKENS, "swin", "swinv2", "donut_swin", "focalnet", "hiera", "pvt_v2", "segformer")
CHECKPOINTED += ("mobilevit", "mobilevitv2", "swiftformer", "pp_lcnet")
PAIRS = [(name, how) for name in NAMES for how in ("vote", "classifier") if (name, how) != ("dinov3", "classifier")]

OWN = ("pixel_values", "pixel_attention_mask", "spatial_shapes")
"""What each image has for itself; texts are the same for all."""

every_family = pytest.mark.parametrize("name", NAMES)
every_pair = pytest.mark.parametrize(("name", "prediction"), PAIRS)
most_pairs = pytest.mark.parametrize(("name", "prediction"), [pair for pair in PAIRS if pair[0] not in SLOW])
every_classifier = pytest.mark.parametrize("name", [name for name, how in PAIRS if how == "classifier"])


def removals(name):
    """How players can be removed, the default first."""
    if name in PATCHED:
        return ("mask",)
    if name in RELATIVE:
        return "mask", "pixels"
    return ("drop", "mask", "pixels") if name in TOKENS else ("pixels",)


every_removal = pytest.mark.parametrize(
    ("name", "prediction", "removal"), [(*pair, removal) for pair in PAIRS for removal in removals(pair[0])]
)


def players(name):
    """Rows and columns of the players at the entry's own size."""
    return ZOO[name].grid or (2, 2)


def count(name):
    return math.prod(players(name))


@functools.cache
def _wrapped(name, prediction, config):
    return wrap(zoo.base(name), prediction, **dict(config))


def wrapped(name, prediction="vote", **config):
    """A wrapped model in eval mode, the same one at every call: for tests that only look."""
    default = config.get("removal") == removals(name)[0]
    return _wrapped(name, prediction, tuple((k, v) for k, v in config.items() if not (default and k == "removal")))


def own(name, prediction="vote", **config):
    """A copy of it, for tests that change it."""
    return copy.deepcopy(wrapped(name, prediction, **config))


def regridded(name, prediction, grid):
    """A copy with other players, without measuring again where its cells look."""
    model = own(name, prediction, grid=(2, 2), removal="pixels")
    shapley(model).rules["default"] = dataclasses.replace(shapley(model).rules["default"], grid=grid)
    return model


def run(model, inputs, **kwargs):
    with torch.no_grad():
        return model(**inputs, **kwargs)


def close(one, other, tolerance=1e-6):
    return (one - other).abs().max().item() <= tolerance * max(1.0, other.abs().max().item())


def adds_up(output, tolerance=1e-5):
    """Law 1, for each number by itself."""
    total = output.null_values.double() + output.attributions.double().sum(1)
    gap = (total - output.logits.double()).abs()
    return (gap <= tolerance * output.logits.double().abs().clamp(min=1)).all()


def same(one, other):
    """Whether two outputs agree in every bit, explanation included."""
    fields = ("logits", "attributions", "null_values", "coalition_values")
    return all(families.same_bits(getattr(one, field), getattr(other, field)) for field in fields)


def disturb(inputs, grid, where, scale=3.0, seed=0):
    """The inputs with noise added to the players that `where` (B, N) marks; in patches, to the padding as well."""
    images = inputs["pixel_values"]
    noise = scale * torch.randn(images.shape, generator=torch.Generator().manual_seed(300 + seed))
    if images.ndim == 3:
        marked = torch.ones(images.shape[:2], dtype=torch.bool)
        marked[:, : where.shape[1]] = where
        marked = marked[..., None]
    else:
        height, width = (size // tiles for size, tiles in zip(images.shape[2:], grid, strict=True))
        marked = where.unflatten(1, grid).repeat_interleave(height, 1).repeat_interleave(width, 2)[:, None]
    return {**inputs, "pixel_values": torch.where(marked, images + noise, images)}


def parts(model):
    """What a model is made of: class and plain attributes of each module, and all tensors."""
    plain = (bool, int, float, str, tuple, type(None))
    attributes = {
        name: (type(module), {k: v for k, v in vars(module).items() if isinstance(v, plain)})
        for name, module in model.named_modules()
    }
    return attributes, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_parts(one, other):
    return (
        one[0] == other[0]
        and one[1].keys() == other[1].keys()
        and all(torch.equal(one[1][k], other[1][k]) for k in one[1])
    )


def with_dropout(model, share):
    """As much dropout and drop path everywhere, but none on texts: they are what the game is about, not played with."""
    for path, module in model.named_modules():
        kinds = ("p",) if isinstance(module, nn.Dropout) else ("drop_prob", "dropout", "attention_dropout")
        for kind in kinds:
            if isinstance(vars(module).get(kind), float):
                setattr(module, kind, 0.0 if "text_model" in path else share)
        if hasattr(getattr(module, "config", None), "pos_embed_rescale"):
            module.config.pos_embed_rescale = None if share == 0 else 2.0  # DINOv3 shakes its positions
    return model


def doubled(inputs):
    return {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}


def loss_of(output, chosen):
    """Some task's loss and the Shapley loss; both are means over the images."""
    game = shapley_loss(output.attributions, chosen, output.coalition_values, output.null_values)
    return output.logits.float().square().mean() + game


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# -- law 1: efficiency ------------------------------------------------------------------------------------------------


@every_pair
def test_attributions_and_null_sum_to_the_logits(name, prediction):
    output = run(wrapped(name, prediction), zoo.inputs(name))
    assert isinstance(output, ShapleyOutput)
    assert output.logits.shape == output.null_values.shape == (2, CLASSES)
    assert output.attributions.shape == (2, count(name), CLASSES)
    assert output.coalition_values is None
    assert 1e-2 < output.logits.abs().max() < 100
    assert output.attributions.std(dim=1).min() > 1e-4
    assert not close(output.attributions[0], output.attributions[1], 1e-3)
    assert adds_up(output)


@every_removal
def test_full_and_empty_coalitions_are_logits_and_null(name, prediction, removal):
    ends = torch.stack([torch.ones(2, count(name)), torch.zeros(2, count(name))], dim=1).bool()
    output = run(wrapped(name, prediction, removal=removal), zoo.inputs(name), coalitions=ends)
    assert close(output.coalition_values[:, 0], output.logits, 1e-5)
    assert close(output.coalition_values[:, 1], output.null_values, 1e-5)


@every_pair
def test_efficiency_under_bf16_autocast(name, prediction):
    chosen = families.coalitions(2, 4, count(name))
    with torch.autocast("cpu", torch.bfloat16):
        output = run(wrapped(name, prediction), zoo.inputs(name), coalitions=chosen)
    assert output.attributions.dtype == output.null_values.dtype == output.coalition_values.dtype == torch.float32
    assert adds_up(output, 1e-2)
    assert output.coalition_values.isfinite().all()


# -- law 2: leaks -----------------------------------------------------------------------------------------------------


@every_removal
def test_absent_players_have_no_influence_at_all(name, prediction, removal):
    model, inputs = wrapped(name, prediction, removal=removal), zoo.inputs(name)
    for seed, scale in enumerate((30.0, 1e4, float("nan"))):
        if removal == "mask" and scale != scale:
            continue  # nothing times not-a-number is not nothing
        chosen = families.coalitions(2, 3, count(name), seed)[:, 1:2]
        clean = run(model, inputs, coalitions=chosen).coalition_values
        noisy = disturb(inputs, players(name), ~chosen[:, 0], scale, seed)
        assert clean.isfinite().all()
        assert torch.equal(run(model, noisy, coalitions=chosen).coalition_values, clean)


@every_removal
def test_present_players_do_have_influence(name, prediction, removal):
    model, inputs = wrapped(name, prediction, removal=removal), zoo.inputs(name)
    for player in (0, count(name) - 1):
        chosen = torch.zeros(2, 1, count(name), dtype=torch.bool)
        chosen[..., player] = True
        clean = run(model, inputs, coalitions=chosen).coalition_values
        noisy = disturb(inputs, players(name), chosen[:, 0])
        assert not close(run(model, noisy, coalitions=chosen).coalition_values, clean, 1e-5)


@pytest.mark.parametrize("name", PATCHED)
def test_padding_has_no_influence_at_all(name):
    model, inputs = wrapped(name), zoo.inputs(name)
    nobody = torch.zeros(2, count(name), dtype=torch.bool)
    chosen = families.coalitions(2, 4, count(name))
    noisy = disturb(inputs, players(name), nobody, 1e4)
    assert not torch.equal(noisy["pixel_values"], inputs["pixel_values"])
    assert same(run(model, noisy, coalitions=chosen), run(model, inputs, coalitions=chosen))


# -- law 3: the base is untouched -------------------------------------------------------------------------------------


@every_classifier
def test_frozen_base_and_its_own_head_predict_as_before(name):
    inputs = zoo.inputs(name)
    output = run(wrapped(name, "classifier", tune="frozen"), inputs)
    assert close(output.logits, zoo.logits(run(zoo.base(name), inputs)))
    assert adds_up(output)


@every_pair
def test_disabled_or_unloaded_is_bit_identical(name, prediction):
    inputs, model = zoo.inputs(name), own(name, prediction)
    plain = run(zoo.base(name).requires_grad_(False), inputs)
    assert name == "dinov3" or not torch.equal(run(model, inputs).logits, zoo.logits(plain))
    with model.disable_adapter():
        disabled = run(model, inputs)
    assert type(disabled) is type(plain)
    assert torch.equal(zoo.logits(disabled), zoo.logits(plain))
    assert torch.equal(zoo.logits(run(model.unload(), inputs)), zoo.logits(plain))


@every_family
def test_a_wrap_leaves_no_trace(name):
    """Swin adjusts its windows to the image it sees, so even looking at a model, as for a grid, may change it."""
    clean = own(name, grid=(2, 2), removal=removals(name)[-1]).unload()
    assert same_parts(parts(clean), parts(zoo.base(name)))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in clean.modules())


@pytest.mark.parametrize("name", RESIZED)
def test_an_unloaded_model_sees_larger_images_as_before(name):
    model, inputs = own(name), zoo.inputs(name, size=(128, 192))
    run(model, zoo.inputs(name), coalitions=families.coalitions(2, 3, count(name)))
    found, expected = zoo.logits(run(model.unload(), inputs)), zoo.logits(run(zoo.base(name), inputs))
    assert families.same_bits(found, expected)


@most_pairs
@pytest.mark.parametrize("tune", ["lora", "full"])
def test_training_leaves_the_statistics_of_the_base_alone(name, prediction, tune):
    model = own(name, prediction, tune=tune).train()
    before = {key: value.clone() for key, value in zoo.base(name).named_buffers()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    chosen = families.coalitions(2, 3, count(name))
    for grad in (False, True):
        loss_of(model(**zoo.inputs(name), coalitions=chosen, coalition_grad=grad), chosen).backward()
        optimizer.step()
        optimizer.zero_grad()
    for key, value in model.get_base_model().named_buffers():
        assert torch.equal(value, before[original_name(key)]), key


@most_pairs
def test_targets_are_those_of_eval_mode(name, prediction):
    """Dropout, drop path and batch statistics are off while coalitions and the empty value are computed."""
    model, inputs = with_dropout(own(name, prediction, lora_dropout=0.5), 0.5), zoo.inputs(name)
    chosen = families.coalitions(2, 4, count(name))
    quiet = run(model.eval(), inputs, coalitions=chosen)
    noisy = run(model.train(), inputs, coalitions=chosen)
    assert not torch.equal(noisy.logits, quiet.logits)
    assert torch.equal(noisy.coalition_values, quiet.coalition_values)
    assert torch.equal(noisy.null_values, quiet.null_values)
    assert all(module.training for module in model.modules() if not isinstance(module, _BatchNorm))
    assert adds_up(noisy)
    assert same(run(model.eval(), inputs, coalitions=chosen), quiet)


@most_pairs
def test_images_and_coalitions_do_not_see_each_other(name, prediction):
    model = with_dropout(own(name, prediction), 0.0).double().train()
    inputs, chosen = doubled(zoo.inputs(name)), families.coalitions(2, 4, count(name))
    together = run(model, inputs, coalitions=chosen)
    for image in range(2):
        one = {key: value[image : image + 1] if key in OWN else value for key, value in inputs.items()}
        alone = run(model, one, coalitions=chosen[image : image + 1, 1:2])
        assert close(alone.logits[0], together.logits[image])
        assert close(alone.attributions[0], together.attributions[image])
        assert close(alone.coalition_values[0, 0], together.coalition_values[image, 1])


@every_family
def test_hidden_states_are_those_of_the_base(name):
    inputs = zoo.inputs(name)
    model = wrapped(name, "vote" if name == "dinov3" else "classifier", tune="frozen")
    expected = getattr(run(zoo.base(name), inputs, output_hidden_states=True), "hidden_states", None)
    got = run(model, inputs, output_hidden_states=True).hidden_states
    assert len(expected or ()) == len(got or ())
    for one, other in zip(got or (), expected or (), strict=True):
        assert one.shape == other.shape
        assert close(one, other)


@every_classifier
def test_loss_is_the_base_models(name):
    model = wrapped(name, "classifier", tune="frozen")
    if name in MATCHERS:
        inputs = zoo.inputs(name, batch=CLASSES)
        assert close(run(model, inputs, return_loss=True).loss, run(zoo.base(name), inputs, return_loss=True).loss)
        return
    inputs, labels = zoo.inputs(name), torch.tensor([1, 3])
    output = run(model, inputs, labels=labels)
    assert close(output.loss, nn.functional.cross_entropy(output.logits, labels))


# -- law 4: removal operators -----------------------------------------------------------------------------------------


@every_family
def test_the_way_of_removal(name):
    assert wrapped(name).peft_config["default"].removal == removals(name)[0]
    for removal in {"drop", "mask", "pixels"} - set(removals(name)):
        with pytest.raises(
            UnsupportedModelError, match=f"removal='{removal}' .*(leave it at 'auto'|use removal='mask')"
        ):
            wrap(zoo.base(name), removal=removal)


@pytest.mark.parametrize(("name", "prediction"), [pair for pair in PAIRS if "drop" in removals(pair[0])])
def test_dropping_equals_masking(name, prediction):
    inputs, chosen = zoo.inputs(name), families.coalitions(2, 8, count(name))
    dropped, masked = (
        run(wrapped(name, prediction, removal=removal), inputs, coalitions=chosen).coalition_values
        for removal in ("drop", "mask")
    )
    assert dropped.std() > 1e-3
    assert close(dropped, masked, 1e-5)


@pytest.mark.parametrize("name", ["beit", "data2vec"])
@pytest.mark.parametrize("prediction", ["vote", "classifier"])
def test_without_position_bias_dropping_equals_masking_there_too(name, prediction):
    inputs, chosen = zoo.inputs(name), families.coalitions(2, 8, count(name))
    values = []
    for removal in ("auto", "mask"):
        model = wrap(zoo.build(name, use_relative_position_bias=False), prediction, removal=removal)
        assert model.peft_config["default"].removal == ("drop" if removal == "auto" else "mask")
        values.append(run(model, inputs, coalitions=chosen).coalition_values)
    assert close(*values, 1e-5)


def test_a_model_without_scores_has_no_classifier_to_predict_with():
    with pytest.raises(UnsupportedModelError, match="prediction='vote'"):
        wrap(zoo.base("dinov3"), "classifier")


# -- law 5: save and load ---------------------------------------------------------------------------------------------

FORMS = [(*pair, tune) for pair in PAIRS for tune in ("lora", "full") if tune == "lora" or pair[0] not in SLOW]
FORMS += [(name, how, "frozen") for name, how in PAIRS if how == "classifier" and name not in SLOW]


@torch.no_grad()
def train(model, seed=0):
    """Change what is trained in full."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_" not in name:
            parameter.mul_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize(("name", "prediction", "tune"), FORMS)
def test_reload_is_bit_identical(tmp_path, name, prediction, tune):
    inputs, chosen = zoo.inputs(name), families.coalitions(2, 4, count(name))
    model = train(own(name, prediction, **({} if tune == "lora" else {"tune": tune})))
    model.requires_grad_(False)  # as it is loaded: for weights that want gradients torch may choose another kernel
    expected = run(model, inputs, coalitions=chosen)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(zoo.base(name), tmp_path).eval()
    assert same(run(again, inputs, coalitions=chosen), expected)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in SLOW])
def test_the_auto_class_of_peft(tmp_path, name):
    inputs, chosen = zoo.inputs(name), families.coalitions(2, 4, count(name))
    zoo.base(name).save_pretrained(tmp_path / "base")
    model = own(name)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    again = AutoPeftModel.from_pretrained(tmp_path / "adapter").eval()
    assert same(run(again, inputs, coalitions=chosen), run(model, inputs, coalitions=chosen))


@pytest.mark.parametrize("name", ["resnet", "swin", "perceiver_conv", "beit"])
def test_the_road_of_transformers(tmp_path, name):
    inputs, chosen = zoo.inputs(name), families.coalitions(2, 4, count(name))
    zoo.base(name).save_pretrained(tmp_path / "base")
    model = type(zoo.base(name)).from_pretrained(tmp_path / "base")
    model.add_adapter(ShapleyConfig(r=4))
    expected = run(families.stir(model).eval(), inputs, coalitions=chosen)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(zoo.base(name), tmp_path / "adapter")
    assert same(run(again.eval(), inputs, coalitions=chosen), expected)
    if name != "perceiver_conv":  # of three classes for one config, the Auto class takes the first
        again = AutoModelForImageClassification.from_pretrained(tmp_path / "adapter")
        assert same(run(again.eval(), inputs, coalitions=chosen), expected)


@most_pairs
def test_another_base_is_refused(tmp_path, name, prediction):
    wrapped(name, prediction).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="another base model"):
        PeftModel.from_pretrained(zoo.build(name, seed=1), tmp_path)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in (*MATCHERS, *SLOW, "dinov3")])
def test_another_number_of_classes_is_refused(tmp_path, name):
    wrapped(name, "classifier").save_pretrained(tmp_path)
    labels = {0: "ant", 1: "bee", 2: "cat"}
    own = {"num_labels": 3} if name == "pvt" else {}
    three = zoo.build(name, id2label=labels, label2id={label: index for index, label in labels.items()}, **own)
    with pytest.raises(CheckpointError, match="predicts 5 classes"):
        PeftModel.from_pretrained(three, tmp_path)


@pytest.mark.parametrize("name", [name for name, how in PAIRS if how == "classifier" and name != "bit"])
def test_a_merged_classifier_predicts_the_same(name):
    inputs, model = zoo.inputs(name), own(name, "classifier")
    expected = run(model, inputs).logits
    merged = run(model.merge_and_unload(), inputs)
    assert not hasattr(merged, "attributions")
    assert close(zoo.logits(merged), expected, 1e-4)


@pytest.mark.parametrize("name", ["beit", "clip_model", "convnext", "swin", "perceiver_conv"])
def test_adapters_with_grids_of_their_own(tmp_path, name):
    inputs = zoo.inputs(name)
    model = own(name)
    first = run(model, inputs)
    model.add_adapter("coarse", ShapleyConfig(r=4, grid=(1, 2)))
    model.add_adapter("fine", ShapleyConfig(r=4, grid=(8, 8), prediction="classifier"))
    for adapter, tiles in (("coarse", 2), ("fine", 64), ("default", count(name))):
        model.set_adapter(adapter)
        output = run(model, inputs, coalitions=families.coalitions(2, 3, tiles))
        assert output.attributions.shape == (2, tiles, CLASSES)
        assert adds_up(output)
    assert torch.equal(output.attributions, first.attributions)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(zoo.base(name), tmp_path / "fine", adapter_name="fine").eval()
    model.set_adapter("fine")
    chosen = families.coalitions(2, 3, 64)
    assert same(run(again, inputs, coalitions=chosen), run(model, inputs, coalitions=chosen))


# -- law 8: gradients -------------------------------------------------------------------------------------------------


@most_pairs
def test_gradient_reaches_every_trainable_parameter(name, prediction):
    model = with_dropout(own(name, prediction), 0.0).train()
    # MobileViT attends to 2 x 2 cells at a time: with no more than those, each is alone, and queries mean nothing.
    inputs = zoo.inputs(name, size=(128, 128) if name == "mobilevit" else None)
    chosen = families.coalitions(2, 4, math.prod(shapley(model).tiling(**inputs).players))
    loss_of(model(**inputs, coalitions=chosen), chosen).backward()
    for path, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, path
            assert parameter.grad.abs().max() > 0, path
        else:
            assert parameter.grad is None, path


@most_pairs
def test_a_batch_of_4_equals_2_accumulated_batches_of_2(name, prediction):
    model = with_dropout(own(name, prediction), 0.0).double().train()
    chosen = families.coalitions(4, 4, count(name))
    inputs = doubled(zoo.inputs(name, batch=4))
    loss_of(model(**inputs, coalitions=chosen, coalition_grad=True), chosen).backward()
    whole = gradients(model)
    model.zero_grad()
    for part in torch.arange(4).split(2):
        some = {key: value[part] if key in OWN else value for key, value in inputs.items()}
        (loss_of(model(**some, coalitions=chosen[part], coalition_grad=True), chosen[part]) / 2).backward()
    for path, gradient in gradients(model).items():
        assert close(gradient, whole[path]), path


@pytest.mark.parametrize(
    ("name", "prediction", "removal"),
    [(*pair, removal) for pair in PAIRS if pair[0] in CHECKPOINTED for removal in removals(pair[0])],
)
def test_gradient_checkpointing_gives_the_same_gradients(name, prediction, removal):
    model = with_dropout(own(name, prediction, removal=removal), 0.0).train()
    inputs, chosen = zoo.inputs(name), families.coalitions(2, 4, count(name))
    loss_of(model(**inputs, coalitions=chosen, coalition_grad=True), chosen).backward()
    plain = gradients(model)
    model.zero_grad()
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    loss_of(model(**inputs, coalitions=chosen, coalition_grad=True), chosen).backward()
    again = gradients(model)
    assert again.keys() == plain.keys()
    for path, gradient in again.items():
        assert close(gradient, plain[path]), path


# -- grids ------------------------------------------------------------------------------------------------------------


def patches_of(chosen, grid, cells):
    """The patches of coarse players: (B, M, N) to (B, M, cells)."""
    down, right = cells[0] // grid[0], cells[1] // grid[1]
    return chosen.unflatten(2, grid).repeat_interleave(down, 2).repeat_interleave(right, 3).flatten(2)


@pytest.mark.parametrize(("name", "prediction"), [pair for pair in PAIRS if pair[0] in TOKENS])
@pytest.mark.parametrize("grid", [(2, 2), (4, 2)])
def test_a_coarse_player_is_its_patches(name, prediction, grid):
    inputs, chosen = zoo.inputs(name), families.coalitions(2, 4, math.prod(grid))
    model, fine = wrapped(name, prediction, grid=grid), wrapped(name, prediction)
    assert model.peft_config["default"].removal == removals(name)[0]
    coarse = run(model, inputs, coalitions=chosen)
    patches = run(fine, inputs, coalitions=patches_of(chosen, grid, (4, 4)))
    assert torch.equal(coarse.coalition_values, patches.coalition_values)
    tiles = patches.attributions.unflatten(1, (grid[0], 4 // grid[0], grid[1], 4 // grid[1]))
    assert close(coarse.attributions, tiles.sum(dim=(2, 4)).flatten(1, 2))
    assert adds_up(coarse)


GRIDS = {"vote": ((8, 8), (1, 2)), "classifier": ((8, 8), (4, 1))}
"""Finer than any map of the zoo and than its patches, and coarser than all of them."""
FREE = [pair for pair in PAIRS if pair[0] not in (*PATCHED, *SLOW)]


@pytest.mark.parametrize(
    ("name", "prediction", "grid"),
    [(*pair, grid) for pair in FREE for grid in GRIDS[pair[1]][: 1 if pair[0] in TOKENS else 2]],
)
def test_players_that_are_no_cells(name, prediction, grid):
    model, inputs = regridded(name, prediction, grid), zoo.inputs(name)
    chosen = families.coalitions(2, 4, math.prod(grid))
    output = run(model, inputs, coalitions=chosen)
    assert output.attributions.shape == (2, math.prod(grid), CLASSES)
    assert adds_up(output)
    assert close(output.coalition_values[:, 0], output.logits, 1e-5)
    assert close(output.coalition_values[:, -1], output.null_values, 1e-5)
    noisy = disturb(inputs, grid, ~chosen[:, 1], float("nan"))
    dirty = run(model, noisy, coalitions=chosen[:, 1:2]).coalition_values
    assert torch.equal(dirty[:, 0], run(model, inputs, coalitions=chosen[:, 1:2]).coalition_values[:, 0])


@pytest.mark.parametrize("name", [name for name in RESIZED if name not in (*TOKENS, *SLOW)])
@pytest.mark.parametrize("grid", [(2, 2), (6, 4)])
def test_players_that_cut_through_cells(name, grid):
    """On 96 x 160 pixels most maps have 3 x 5 cells, and no grid here divides those."""
    model, inputs = regridded(name, "vote", grid), zoo.inputs(name, size=(96, 160))
    chosen = families.coalitions(2, 4, math.prod(grid))
    output = run(model, inputs, coalitions=chosen)
    assert output.attributions.shape == (2, math.prod(grid), CLASSES)
    assert adds_up(output)
    assert close(output.coalition_values[:, 0], output.logits, 1e-5)
    noisy = disturb(inputs, grid, ~chosen[:, 1], float("nan"))
    dirty = run(model, noisy, coalitions=chosen[:, 1:2]).coalition_values
    assert torch.equal(dirty, run(model, inputs, coalitions=chosen[:, 1:2]).coalition_values)


@pytest.mark.parametrize("name", ["clip_model", "beit", "siglip2", "swin", "convnext", "perceiver_conv"])
def test_a_grid_that_divides_nothing_is_refused(name):
    model = wrapped(name, grid=(3, 5))
    with pytest.raises(ImageError, match=r"grid=\(3, 5\) does not divide .* Choose a divisor"):
        run(model, zoo.inputs(name))


@pytest.mark.parametrize("name", ["clip_model", "beit"])
def test_patches_are_not_cut_where_they_are_removed_whole(name):
    model = wrap(zoo.base(name), grid=(8, 8), removal="mask")
    with pytest.raises(ImageError, match=r"does not divide the 4 x 4 patches .* removal='pixels'"):
        run(model, zoo.inputs(name))


# -- fillings ---------------------------------------------------------------------------------------------------------

FILLED = ("clip_model", "beit", "convnext", "mobilenet_v2", "perceiver_conv")
FILLS = {
    "black": {"fill": "mean"},
    "colour": {"fill": "mean", "fill_color": [0.5, -0.25, 1.0]},
    "blur": {"fill": "blur"},
    "learned": {"fill": "learned", "fill_color": [0.5, -0.25, 1.0]},
}
filled = pytest.mark.parametrize(("name", "prediction"), [pair for pair in PAIRS if pair[0] in FILLED])
every_fill = pytest.mark.parametrize("fill", FILLS)


@filled
@every_fill
def test_a_filling_shows_nothing_of_absent_players(name, prediction, fill):
    model, inputs = wrapped(name, prediction, removal="pixels", **_frozen(FILLS[fill])), zoo.inputs(name)
    chosen = families.coalitions(2, 5, count(name))
    output = run(model, inputs, coalitions=chosen)
    assert adds_up(output)
    assert close(output.coalition_values[:, 0], output.logits, 1e-5)
    assert close(output.coalition_values[:, -1], output.null_values, 1e-5)
    for one in chosen[:, 1:-1].split(1, dim=1):
        noisy = disturb(inputs, players(name), ~one[:, 0], float("nan"))
        dirty = run(model, noisy, coalitions=one).coalition_values
        assert torch.equal(dirty, run(model, inputs, coalitions=one).coalition_values)


@pytest.mark.parametrize("name", FILLED)
@every_fill
def test_a_filling_is_saved_with_the_adapter(tmp_path, name, fill):
    inputs, chosen = zoo.inputs(name), families.coalitions(2, 5, count(name))
    model = wrapped(name, removal="pixels", **_frozen(FILLS[fill]))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(zoo.base(name), tmp_path).eval()
    assert same(run(again, inputs, coalitions=chosen), run(model, inputs, coalitions=chosen))


@filled
def test_fillings_differ(name, prediction):
    inputs, chosen = zoo.inputs(name), families.coalitions(2, 3, count(name))[:, 1:2]
    values = [
        run(wrapped(name, prediction, removal="pixels", **_frozen(fill)), inputs, coalitions=chosen).coalition_values
        for fill in FILLS.values()
    ]
    assert all(not close(one, other, 1e-4) for index, one in enumerate(values) for other in values[:index])


@filled
def test_a_learned_colour_learns(name, prediction):
    model = own(name, prediction, removal="pixels", **_frozen(FILLS["learned"])).train()
    chosen = families.coalitions(2, 4, count(name))
    for grad in (False, True):
        model.zero_grad()
        loss_of(model(**zoo.inputs(name), coalitions=chosen, coalition_grad=grad), chosen).backward()
        gradient = shapley(model).lora_shapley_fill["default"].grad
        assert (gradient is not None and gradient.abs().min() > 0) == grad


def _frozen(config):
    """A configuration by which wrapped models can be remembered."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}


# -- places ---------------------------------------------------------------------------------------------------------

WIDE = ("efficientnet", "hgnet_v2", "pp_lcnet")
"""Their cells see most of an image, so that places show in a large one only."""
FIXED_SIZES = {"pvt": (192, 192), "levit": (384, 384), "levit_teacher": (384, 384)}


def placed(name):
    """A wrapped model without a token, which would mix the players, and the inputs with which places show."""
    if name in FIXED_SIZES:
        size, grid = FIXED_SIZES[name], (6, 6)
        model = zoo.build(name, size=size, image_size=size[0])
    else:
        model, grid = zoo.base(name), (3, 5) if name in PATCHED else (6, 8) if name in WIDE else (4, 6)
        cell = 16 if name == "cvt" else PATCH if name in TOKENS else 32
        size = (grid[0] * cell, grid[1] * cell)
    return wrap(model, tune="frozen", shapley_token=False), zoo.inputs(name, batch=1, seed=1, size=size), grid


def influence(model, inputs, grid):
    """How much each tile's pixels move each player's attributions, (tiles, players)."""
    tiles = math.prod(grid)
    each = torch.cat([torch.zeros(1, tiles), torch.eye(tiles)]).bool()  # nothing, then one tile at a time
    images = {key: value.repeat_interleave(tiles + 1, 0) if key in OWN else value for key, value in inputs.items()}
    moved = run(model, disturb(images, grid, each, 0.1)).attributions
    total = (moved[1:] - moved[:1]).square().sum(-1)
    for _ in range(20):  # a tile may matter more than others, and a player be moved more: neither says where it is
        total = total / total.sum(0)
        total = total / total.sum(1, keepdim=True)
    return total / total.sum(0)


@pytest.mark.parametrize("name", [*TOKENS, *MAPS])
def test_players_are_numbered_in_raster_order(name):
    """The further down or right a player is, the further down or right are the tiles that move it."""
    model, inputs, grid = placed(name)
    rows, cols = torch.meshgrid(*(torch.arange(float(number)) for number in grid), indexing="ij")
    by_tile = influence(model, inputs, grid)
    for place in (rows.flatten(), cols.flatten()):
        centre = place @ by_tile
        assert torch.corrcoef(torch.stack([centre, place]))[0, 1] > 0.6


# -- sizes ------------------------------------------------------------------------------------------------------------


@functools.cache
def cells_of(name, size):
    """How many cells the base model really has on images of this size."""
    entry, inputs = ZOO[name], zoo.inputs(name, size=size)
    shape = zoo.features(zoo.base(name), entry, **inputs).shape
    return shape[1] - entry.prefix if entry.layout == "NC" else shape[2] * shape[3]


SHARES = {"vote": ((2, 3), (2.6, 3.1), (1.1, 3.9)), "classifier": ((3, 2), (2.6, 3.1), (3.1, 1.6))}
"""Cells down and right. The last may be in part, which some models leave out and some take for a whole one."""
WHOLE = ("hiera", "cvt")
"""Whole cells only: the one fails, and the other has as many cells as neither rounding gives."""


def size_of(name, share):
    cell = shapley(wrapped(name)).anatomy.cell
    return tuple(round(part * side) for part, side in zip(share, cell, strict=True))


@pytest.mark.parametrize(
    ("name", "prediction", "share"),
    [
        (*pair, share)
        for pair in PAIRS
        for share in SHARES[pair[1]][: 1 if pair[0] in WHOLE else 3]
        if pair[0] in RESIZED and pair[0] not in LATENTS
    ],
)
def test_images_of_other_sizes(name, prediction, share):
    size = size_of(name, share)
    inputs = zoo.inputs(name, size=size)
    model, number = wrapped(name, prediction), cells_of(name, size)
    chosen = families.coalitions(2, 4, number)
    output = run(model, inputs, coalitions=chosen)
    rows, cols = shapley(model).tiling(**inputs).players
    assert rows * cols == number
    assert output.attributions.shape == (2, number, CLASSES)
    assert adds_up(output)
    assert close(output.coalition_values[:, 0], output.logits, 1e-5)
    assert close(output.coalition_values[:, -1], output.null_values, 1e-5)
    first = (torch.arange(number) == 0).expand(2, 1, -1)
    corner = (..., slice(-(-size[0] // rows)), slice(-(-size[1] // cols)))
    noisy = {**inputs, "pixel_values": inputs["pixel_values"] + 30}
    noisy["pixel_values"][corner] = inputs["pixel_values"][corner]
    alone, beside = (run(model, images, coalitions=first).coalition_values for images in (inputs, noisy))
    assert torch.equal(alone, beside)


def test_a_map_of_another_size_is_refused():
    with pytest.raises(UnsupportedModelError, match=r"12 cells .* returned 9. Send images .* multiples of \(16, 16\)"):
        run(wrapped("cvt"), zoo.inputs("cvt", size=size_of("cvt", (2.6, 3.1))))


@pytest.mark.parametrize("name", [name for name in LATENTS if name not in SLOW])
@pytest.mark.parametrize(("size", "grid"), [((64, 96), (2, 3)), ((40, 32), (2, 2)), ((100, 70), (3, 2))])
def test_players_of_a_model_without_places_are_tiles(name, size, grid):
    model, inputs = wrapped(name), zoo.inputs(name, size=size)
    output = run(model, inputs, coalitions=families.coalitions(2, 3, math.prod(grid)))
    assert shapley(model).tiling(**inputs).players == grid
    assert output.attributions.shape == (2, math.prod(grid), CLASSES)
    assert adds_up(output)


@pytest.mark.parametrize("name", PATCHED)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_patches_of_any_shape(name, seed):
    grid, inputs, model = zoo.NAFLEX_SHAPES[seed], zoo.inputs(name, seed=seed), wrapped(name)
    output = run(model, inputs, coalitions=families.coalitions(2, 3, math.prod(grid)))
    assert shapley(model).tiling(**inputs).players == grid
    assert output.attributions.shape == (2, math.prod(grid), CLASSES)
    assert adds_up(output)


@pytest.mark.parametrize("name", PATCHED)
def test_images_of_different_shapes_in_one_batch_are_refused(name):
    one, other = (zoo.inputs(name, seed=seed) for seed in (0, 1))
    mixed = {key: torch.cat([value[:1], other[key][1:]]) if key in OWN else value for key, value in one.items()}
    with pytest.raises(ImageError, match="one grid of patches"):
        run(wrapped(name), mixed)


# -- which families ---------------------------------------------------------------------------------------------------


def test_every_image_classifier_of_transformers_is_supported_or_refused_by_name():
    models = [zoo.base(name) for name in NAMES] + [families.base(family) for family in FAMILIES]
    known = {type(model).__name__ for model in models} | set(refused_families())
    known.add("TimmWrapperForImageClassification")  # any model of timm: test_timm.py
    listed = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.values()
    everyone = {name for names in listed for name in ((names,) if isinstance(names, str) else names)}
    assert everyone - known == set()


@pytest.mark.parametrize("name", ["imagegpt", "shieldgemma2", *UNORDERED])
def test_what_does_not_work_is_refused_with_the_reason(name):
    plain = zoo.base(name)
    before = parts(plain)
    with pytest.raises(UnsupportedModelError, match=f"{type(plain).__name__} is not supported: "):
        wrap(plain)
    assert same_parts(parts(plain), before)


def test_no_family_is_left_out_of_these_tests():
    assert {*NAMES, *UNORDERED, *of_kind(REFUSED)} == set(ZOO)
