"""The laws of the game and of the adapter, for every supported family."""

import copy
import dataclasses
import functools
import sys
import threading

import families
import pytest
import torch
from families import (
    CLASSES,
    DEPTH,
    FAMILIES,
    HEADS,
    PATCH,
    PLAYERS,
    PREFIX,
    WIDTH,
    base,
    images,
    remove_noise,
    shapley,
    wrap,
)

from shapadapter import ShapleyOutput
from shapadapter.core.losses import shapley_loss

PREDICTIONS = ("vote", "classifier")
PAIRS = [(family, prediction) for family in FAMILIES for prediction in PREDICTIONS]
every_pair = pytest.mark.parametrize(("family", "prediction"), PAIRS)
few_pairs = pytest.mark.parametrize(
    ("family", "prediction"), [p for p in PAIRS if p[0] in ("vit", "deit_teacher", "dinov2_registers", "siglip")]
)
"""Families that differ in prefix and pooling, where what is tested does not depend on more."""
every_family = pytest.mark.parametrize("family", FAMILIES)
each_prediction = pytest.mark.parametrize("prediction", PREDICTIONS)


@functools.cache
def _wrapped(family, prediction, removal, token):
    return wrap(family, prediction, removal=removal, shapley_token=token)


def wrapped(family, prediction="vote", removal="auto", token=True):
    """A copy of a wrapped model: tests may change it."""
    return copy.deepcopy(_wrapped(family, prediction, removal, token))


def run(model, pixels=None, **kwargs):
    with torch.no_grad():
        return model(pixel_values=images() if pixels is None else pixels, **kwargs)


def close(one, other, tolerance=1e-6):
    return (one - other).abs().max().item() <= tolerance * max(1.0, other.abs().max().item())


# -- law 1 ------------------------------------------------------------------------------------------------------------


@every_pair
def test_attributions_and_null_sum_to_the_logits(family, prediction):
    output = run(wrapped(family, prediction))
    assert isinstance(output, ShapleyOutput)
    assert output.logits.shape == (2, CLASSES)
    assert output.attributions.shape == (2, PLAYERS, CLASSES)
    assert output.null_values.shape == (2, CLASSES)
    assert output.coalition_values is None
    assert output.attributions.std() > 1e-3
    assert output.null_values.abs().min() > 1e-4
    total = output.null_values.double() + output.attributions.double().sum(1)
    gap = (total - output.logits.double()).abs()
    assert (gap <= 1e-5 * output.logits.double().abs().clamp(min=1)).all()


@every_pair
def test_full_and_empty_coalitions_are_logits_and_null(family, prediction):
    model = wrapped(family, prediction)
    ends = torch.stack([torch.ones(2, PLAYERS), torch.zeros(2, PLAYERS)], dim=1).bool()
    output = run(model, coalitions=ends)
    assert close(output.coalition_values[:, 0], output.logits)
    assert close(output.coalition_values[:, 1], output.null_values)
    for removal in ("drop", "mask"):
        shapley(model).rules["default"] = dataclasses.replace(shapley(model).rules["default"], removal=removal)
        again = run(model, coalitions=ends)
        assert close(again.coalition_values[:, 0], output.logits)
        assert close(again.coalition_values[:, 1], output.null_values)


# -- law 2 ------------------------------------------------------------------------------------------------------------


@every_pair
@pytest.mark.parametrize("removal", ["drop", "mask"])
def test_absent_players_have_no_influence_at_all(family, prediction, removal):
    model = wrapped(family, prediction, removal)
    for seed, scale in enumerate((1.0, 30.0, 1e4)):
        chosen = families.coalitions(2, 1, seed=seed)
        chosen[:, 0] = torch.rand(2, PLAYERS, generator=torch.Generator().manual_seed(seed)) < 0.5
        clean = run(model, coalitions=chosen).coalition_values
        dirty = run(model, remove_noise(images(), chosen[:, 0], scale, seed), coalitions=chosen).coalition_values
        assert torch.equal(clean, dirty)


@every_pair
def test_dropped_players_may_even_be_nan(family, prediction):
    model = wrapped(family, prediction, "drop")
    chosen = families.coalitions(2, 3)[:, 1:2]
    clean = run(model, coalitions=chosen).coalition_values
    dirty = run(model, remove_noise(images(), chosen[:, 0], float("nan")), coalitions=chosen).coalition_values
    assert torch.equal(clean, dirty)


@each_prediction
@pytest.mark.parametrize("removal", ["drop", "mask"])
def test_present_players_do_have_influence(prediction, removal):
    model = wrapped("vit", prediction, removal)
    chosen = torch.zeros(2, 1, PLAYERS, dtype=torch.bool)
    chosen[..., :8] = True
    clean = run(model, coalitions=chosen).coalition_values
    assert not close(
        run(model, remove_noise(images(), ~chosen[:, 0]), coalitions=chosen).coalition_values, clean, 1e-3
    )


# -- law 3 ------------------------------------------------------------------------------------------------------------


@every_family
def test_frozen_base_and_its_own_head_predict_as_before(family):
    plain = run(base(family)).logits
    model = wrap(family, "classifier", tune="frozen")
    assert close(run(model).logits, plain, 1e-6)


@every_pair
def test_disabled_or_unloaded_is_bit_identical(family, prediction):
    plain = run(base(family))
    model = wrapped(family, prediction)
    assert not torch.equal(run(model).logits, plain.logits)
    with model.disable_adapter():
        disabled = run(model)
    assert type(disabled) is type(plain)
    assert torch.equal(disabled.logits, plain.logits)
    assert torch.equal(run(model.unload()).logits, plain.logits)


@every_family
def test_token_never_reaches_image_tokens(family):
    model = wrapped(family, "classifier")
    before = run(model, output_hidden_states=True)
    with torch.no_grad():
        shapley(model).lora_shapley_token["default"].normal_(std=50)
    after = run(model, output_hidden_states=True)
    for one, other in zip(before.hidden_states, after.hidden_states, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(before.logits, after.logits)


@every_pair
def test_token_moves_attributions_and_nothing_else(family, prediction):
    model = wrapped(family, prediction)
    chosen = families.coalitions()
    before = run(model, coalitions=chosen)
    with torch.no_grad():
        shapley(model).lora_shapley_token["default"].normal_(std=3)
    after = run(model, coalitions=chosen)
    assert (before.attributions - after.attributions).abs().max() > 1e-3
    assert close(after.logits, before.logits, 1e-5)
    assert close(after.attributions.sum(1), before.attributions.sum(1), 1e-5)
    assert torch.equal(after.coalition_values, before.coalition_values)
    assert torch.equal(after.null_values, before.null_values)


@every_family
def test_token_reads_every_player(family):
    """The token after the last block moves when any one player's pixels change."""
    model = wrapped(family)
    hooks, seen = shapley(model).hooks, []
    original = hooks._after_source

    def spy(*args):
        hidden = original(*args)
        seen.append(hooks.call.token.clone())
        return hidden

    block = model.get_base_model().get_submodule(hooks.anatomy.blocks[-1])
    hooks._handles[-1].remove()
    block.register_forward_hook(spy)
    run(model)
    for player in range(PLAYERS):
        others = torch.arange(PLAYERS).expand(2, -1) != player
        run(model, remove_noise(images(), others, 3.0))
        assert not torch.equal(seen[0], seen[-1])


# -- law 4 ------------------------------------------------------------------------------------------------------------


@every_pair
def test_dropping_equals_masking(family, prediction):
    chosen = families.coalitions(2, 8)
    dropped, masked = (
        run(wrapped(family, prediction, removal), coalitions=chosen).coalition_values for removal in ("drop", "mask")
    )
    assert dropped.std() > 1e-3
    assert close(dropped, masked, 1e-5)


@every_family
def test_auto_removal_is_dropping(family):
    model = wrapped(family)
    assert model.peft_config["default"].removal == "drop"
    assert shapley(model).rules["default"].removal == "drop"


@few_pairs
@pytest.mark.parametrize("removal", ["drop", "mask"])
def test_coalitions_in_one_call_equal_calls_one_by_one(family, prediction, removal):
    model = wrapped(family, prediction, removal)
    chosen = families.coalitions(2, 7)
    assert len(chosen.sum(-1).unique()) > 3
    together = run(model, coalitions=chosen).coalition_values
    assert together.shape == (2, 7, CLASSES)
    assert together.dtype == torch.float32
    for image in range(2):
        for m in range(7):
            alone = run(model, images()[image : image + 1], coalitions=chosen[image : image + 1, m : m + 1])
            assert close(alone.coalition_values[0, 0], together[image, m], 1e-5)


@each_prediction
def test_coalitions_do_not_change_the_prediction(prediction):
    model = wrapped("dinov2", prediction)
    alone, beside = run(model), run(model, coalitions=families.coalitions())
    for field in ("logits", "attributions", "null_values"):
        assert torch.equal(getattr(alone, field), getattr(beside, field))


@each_prediction
def test_no_coalitions_at_all_give_an_empty_answer(prediction):
    output = run(wrapped("vit", prediction), coalitions=torch.ones(2, 0, PLAYERS, dtype=torch.bool))
    assert output.coalition_values.shape == (2, 0, CLASSES)


@few_pairs
def test_images_of_a_batch_do_not_see_each_other(family, prediction):
    model = wrapped(family, prediction)
    batch = run(model, images(3))
    for image in range(3):
        alone = run(model, images(3)[image : image + 1])
        assert close(alone.logits[0], batch.logits[image], 1e-5)
        assert close(alone.attributions[0], batch.attributions[image], 1e-5)


# -- axioms -----------------------------------------------------------------------------------------------------------


def _without_positions(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "position" in name:
                parameter.zero_()
    return model


@every_pair
def test_identical_patches_get_identical_attributions(family, prediction):
    model = _without_positions(wrapped(family, prediction))
    pixels = images()
    pixels[:, :, :PATCH, PATCH : 2 * PATCH] = pixels[:, :, -PATCH:, :PATCH]  # player 1 = player 12
    output = run(model, pixels)
    assert close(output.attributions[:, 1], output.attributions[:, 12], 1e-5)
    assert not close(output.attributions[:, 1], output.attributions[:, 2], 1e-3)


@each_prediction
def test_players_are_numbered_in_raster_order(prediction):
    """Without positions, exchanging two patches exchanges their attributions."""
    model = _without_positions(wrapped("vit", prediction))
    pixels = images()
    swapped = pixels.clone()
    swapped[:, :, :8, 8:16], swapped[:, :, 16:24, 24:32] = pixels[:, :, 16:24, 24:32], pixels[:, :, :8, 8:16]
    order = torch.arange(PLAYERS)
    order[[1, 11]] = order[[11, 1]]
    assert close(run(model, swapped).attributions, run(model, pixels).attributions[:, order], 1e-5)


# -- sizes ------------------------------------------------------------------------------------------------------------


@few_pairs
@pytest.mark.parametrize("size", [(16, 32), (40, 24), (48, 48)])
def test_other_sizes_and_shapes(family, prediction, size):
    height, width = size
    players = height * width // 64
    pixels, chosen = images(2, height, width), families.coalitions(2, 6, players)
    values = []
    for removal in ("drop", "mask"):
        model = wrapped(family, prediction, removal)
        output = run(model, pixels, coalitions=chosen, interpolate_pos_encoding=True)
        assert output.attributions.shape == (2, players, CLASSES)
        assert close(output.null_values + output.attributions.sum(1), output.logits, 1e-5)
        assert close(output.coalition_values[:, 0], output.logits, 1e-5)
        assert close(output.coalition_values[:, -1], output.null_values, 1e-5)
        dirty = run(
            model,
            remove_noise(pixels, chosen[:, 2]),
            coalitions=chosen[:, 2:3],
            interpolate_pos_encoding=True,
        )
        clean = run(model, pixels, coalitions=chosen[:, 2:3], interpolate_pos_encoding=True)
        assert torch.equal(dirty.coalition_values, clean.coalition_values)
        values.append(output.coalition_values)
    assert close(*values, 1e-5)


@every_family
def test_pixels_beyond_the_last_whole_patch_are_no_players(family):
    output = run(wrapped(family), images(2, 37, 35), interpolate_pos_encoding=True)
    assert output.attributions.shape == (2, PLAYERS, CLASSES)


# -- attention kernels ------------------------------------------------------------------------------------------------


@few_pairs
@pytest.mark.parametrize("removal", ["drop", "mask"])
def test_eager_and_sdpa_agree_also_when_switched_after_wrapping(family, prediction, removal):
    model = wrapped(family, prediction, removal)
    chosen = families.coalitions(2, 6)
    sdpa = run(model, coalitions=chosen)
    for kernel in ("eager", "sdpa"):
        model.get_base_model().set_attn_implementation(kernel)
        assert model.config._attn_implementation == kernel
        other = run(model, coalitions=chosen)
        for field in ("logits", "attributions", "null_values", "coalition_values"):
            assert close(getattr(other, field), getattr(sdpa, field), 1e-5)
        dirty = run(model, remove_noise(images(), chosen[:, 2]), coalitions=chosen[:, 2:3]).coalition_values
        assert torch.equal(dirty, run(model, coalitions=chosen[:, 2:3]).coalition_values)
    model.get_base_model().set_attn_implementation("eager")
    with model.disable_adapter():
        disabled = run(model).logits
    plain = base(family)
    plain.set_attn_implementation("eager")
    assert torch.equal(disabled, run(plain).logits)


@every_family
def test_wrapping_an_eager_model(family):
    plain = families.base(family)
    plain.set_attn_implementation("eager")
    logits = run(plain).logits
    model = wrap(plain, "classifier", tune="frozen")
    assert close(run(model).logits, logits)
    assert model.config._attn_implementation == "eager"


# -- further outputs --------------------------------------------------------------------------------------------------


@every_family
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_hidden_states_are_those_of_the_base(family, kernel):
    plain = base(family)
    plain.set_attn_implementation(kernel)
    expected = run(plain, output_hidden_states=True)
    model = wrap(base(family), "classifier", tune="frozen")
    model.get_base_model().set_attn_implementation(kernel)
    got = run(model, output_hidden_states=True, coalitions=families.coalitions())
    assert len(expected.hidden_states) == DEPTH + 1
    assert len(got.hidden_states) == len(expected.hidden_states)
    for one, other in zip(got.hidden_states, expected.hidden_states, strict=True):
        assert one.shape == other.shape == (2, PREFIX[family] + PLAYERS, WIDTH)
        assert close(one, other)


@every_family
def test_attentions_are_those_of_the_base(family):
    plain = base(family)
    plain.set_attn_implementation("eager")
    expected = run(plain, output_attentions=True)
    model = wrap(base(family), "classifier", tune="frozen")
    model.get_base_model().set_attn_implementation("eager")
    got = run(model, output_attentions=True, coalitions=families.coalitions())
    tokens = PREFIX[family] + PLAYERS
    assert len(got.attentions) == len(expected.attentions) == DEPTH
    for one, other in zip(got.attentions, expected.attentions, strict=True):
        assert one.shape == other.shape == (2, HEADS, tokens, tokens)
        assert close(one, other)


@each_prediction
def test_outputs_asked_for_in_the_config(prediction):
    model = wrapped("vit", prediction)
    model.config.output_hidden_states = True
    output = run(model, coalitions=families.coalitions())
    assert [tuple(state.shape) for state in output.hidden_states] == [(2, 17, WIDTH)] * (DEPTH + 1)


@each_prediction
def test_a_tuple_on_request(prediction):
    model = wrapped("clip", prediction)
    named = run(model)
    logits, attributions, null_values = run(model, return_dict=False)
    assert torch.equal(logits, named.logits)
    assert torch.equal(attributions, named.attributions)
    assert torch.equal(null_values, named.null_values)
    labels, chosen = torch.tensor([0, 4]), families.coalitions()
    named = run(model, labels=labels, coalitions=chosen)
    five = run(model, labels=labels, coalitions=chosen, return_dict=False)
    assert len(five) == 5
    for one, other in zip(five, named.to_tuple(), strict=True):
        assert torch.equal(one, other)


@every_family
def test_loss_is_the_base_models(family):
    labels = torch.tensor([1, 3])
    model = wrap(base(family), "classifier", tune="frozen")
    got = run(model, labels=labels)
    assert close(got.loss, torch.nn.functional.cross_entropy(got.logits, labels))
    if family != "deit_teacher":  # which takes no labels itself
        assert close(got.loss, run(base(family), labels=labels).loss)
    vote = run(wrapped(family, "vote"), labels=labels)
    assert close(vote.loss, torch.nn.functional.cross_entropy(vote.logits, labels))


@each_prediction
def test_multi_label_loss(prediction):
    plain = base("vit")
    plain.config.problem_type = "multi_label_classification"
    labels = torch.tensor([[1.0, 0, 0, 1, 0], [0, 0, 1, 1, 1]])
    output = run(wrap(plain, prediction), labels=labels)
    assert close(output.loss, torch.nn.functional.binary_cross_entropy_with_logits(output.logits, labels))


@each_prediction
def test_without_a_token(prediction):
    model = wrapped("dinov2", prediction, token=False)
    assert not any("token" in name for name, p in model.named_parameters() if p.requires_grad)
    output = run(model, coalitions=families.coalitions())
    assert close(output.null_values + output.attributions.sum(1), output.logits, 1e-5)
    assert close(output.coalition_values[:, 0], output.logits)


# -- precision --------------------------------------------------------------------------------------------------------


@every_pair
def test_bf16_autocast(family, prediction):
    model, chosen = wrapped(family, prediction), families.coalitions()
    exact = run(model, coalitions=chosen)
    with torch.autocast("cpu", torch.bfloat16):
        output = run(model, coalitions=chosen, labels=torch.tensor([0, 1]))
    assert output.attributions.dtype == output.null_values.dtype == output.coalition_values.dtype == torch.float32
    assert close(output.null_values + output.attributions.sum(1), output.logits.float(), 1e-2)
    assert close(output.logits.float(), exact.logits, 0.1)
    assert close(output.coalition_values, exact.coalition_values, 0.1)
    assert close(output.coalition_values[:, 0], output.logits.float(), 2e-2)


@few_pairs
def test_autocast_trains(family, prediction):
    model, chosen = wrapped(family, prediction).train(), families.coalitions()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(pixel_values=images(), coalitions=chosen, labels=torch.tensor([0, 1]))
        loss = output.loss + shapley_loss(output.attributions, chosen, output.coalition_values, output.null_values)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@few_pairs
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_base_loaded_in_another_precision(family, prediction, dtype):
    chosen = families.coalitions()
    exact = run(wrapped(family, prediction), coalitions=chosen)
    model = wrap(base(family).to(dtype), prediction)
    output = run(model, images().to(dtype), coalitions=chosen)
    assert close(output.null_values.double() + output.attributions.double().sum(1), output.logits.double(), 1e-2)
    tolerance = 0.15 if dtype == torch.bfloat16 else 1e-4
    assert close(output.logits.float(), exact.logits, tolerance)
    assert close(output.coalition_values.float(), exact.coalition_values, tolerance)
    assert close(output.coalition_values[:, 0].float(), output.logits.float(), 3e-2)


@each_prediction
def test_a_wrapped_model_moved_to_bf16_as_a_whole(prediction):
    model = wrapped("vit", prediction).to(torch.bfloat16)
    output = run(model, images().bfloat16(), coalitions=families.coalitions())
    assert close(output.null_values + output.attributions.sum(1), output.logits.float(), 2e-2)


# -- gradients --------------------------------------------------------------------------------------------------------


def _loss(model, pixels, labels, chosen, **kwargs):
    output = model(pixel_values=pixels, labels=labels, coalitions=chosen, **kwargs)
    return output.loss + shapley_loss(output.attributions, chosen, output.coalition_values, output.null_values)


def _gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@few_pairs
@pytest.mark.parametrize("grad", [False, True])
def test_a_batch_of_8_equals_4_accumulated_batches_of_2(family, prediction, grad):
    model = wrapped(family, prediction).double().train()
    pixels, labels = images(8).double(), torch.arange(8) % CLASSES
    chosen = families.coalitions(8, 6)[:, 1:5]
    _loss(model, pixels, labels, chosen, coalition_grad=grad).backward()
    whole = _gradients(model)
    model.zero_grad(set_to_none=True)
    for part in torch.arange(8).split(2):
        (_loss(model, pixels[part], labels[part], chosen[part], coalition_grad=grad) / 4).backward()
    for name, gradient in _gradients(model).items():
        assert close(gradient, whole[name], 1e-6), name


@few_pairs
@pytest.mark.parametrize("removal", ["drop", "mask"])
def test_gradient_checkpointing_gives_the_same_gradients(family, prediction, removal):
    model = wrapped(family, prediction, removal)
    pixels, labels, chosen = images(), torch.tensor([0, 3]), families.coalitions(2, 5)
    model.train()
    _loss(model, pixels, labels, chosen, coalition_grad=True).backward()
    plain = _gradients(model)
    model.zero_grad(set_to_none=True)
    model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
    assert model.get_base_model().is_activation_checkpointing
    _loss(model, pixels, labels, chosen, coalition_grad=True).backward()
    again = _gradients(model)
    assert again.keys() == plain.keys()
    for name, gradient in again.items():
        assert close(gradient, plain[name], 1e-6), name
    assert any("shapley_token" in name for name in plain)


@every_pair
def test_gradient_reaches_every_trainable_parameter(family, prediction):
    model = wrapped(family, prediction).train()
    _loss(model, images(), torch.tensor([0, 3]), families.coalitions()).backward()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None, name
        elif not (prediction == "classifier" and "null" in name):
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name


def test_every_trainable_parameter_is_used_by_the_classifier_too():
    """A trainable parameter without a gradient stops DistributedDataParallel."""
    model = wrapped("vit", "classifier").train()
    _loss(model, images(), torch.tensor([0, 3]), families.coalitions()).backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("grad", [False, True])
def test_no_gradient_reaches_the_null_value_through_the_shapley_loss(grad):
    model = wrapped("vit", "vote").train()
    chosen = families.coalitions()
    output = model(pixel_values=images(), coalitions=chosen, coalition_grad=grad)
    shapley_loss(output.attributions, chosen, output.coalition_values, output.null_values).backward()
    assert shapley(model).lora_shapley_null["default"].grad is None
    model.zero_grad(set_to_none=True)
    output = model(pixel_values=images(), coalitions=chosen, coalition_grad=True)
    output.coalition_values.square().sum().backward()
    assert shapley(model).lora_shapley_null["default"].grad is None


@every_pair
def test_coalition_values_are_targets_unless_asked_for(family, prediction):
    model, chosen = wrapped(family, prediction).train(), families.coalitions()
    assert not model(pixel_values=images(), coalitions=chosen).coalition_values.requires_grad
    output = model(pixel_values=images(), coalitions=chosen, coalition_grad=True)
    assert output.coalition_values.requires_grad
    output.coalition_values.square().sum().backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert any("q_proj.lora_A" in name for name in reached)
    assert not any("shapley_token." in name or "gate" in name for name in reached)


@each_prediction
def test_the_shapley_loss_does_not_move_the_prediction(prediction):
    """Attributions explain the logits: no gradient of theirs reaches their sum, which is the logits."""
    model = wrapped("vit", prediction).train()
    output = model(pixel_values=images())
    (output.attributions.sum(1) ** 2).sum().backward()
    assert all(p.grad is None or p.grad.abs().max() < 1e-4 for p in model.parameters())
    model.zero_grad()
    (model(pixel_values=images()).attributions ** 2).sum().backward()
    assert any(p.grad is not None and p.grad.abs().max() > 1e-3 for p in model.parameters())


@few_pairs
def test_targets_are_those_of_eval_mode(family, prediction):
    """Dropout and drop path of base and LoRA are off while coalitions and the empty value are computed."""
    dropout = {"attention_dropout": 0.5} if family in ("clip", "metaclip2", "siglip") else {"hidden_dropout_prob": 0.5}
    if family.startswith("dinov2"):
        dropout["drop_path_rate"] = 0.5
    plain = families.build(family, **dropout)
    model = wrap(plain, prediction, lora_dropout=0.5)
    chosen = families.coalitions()
    quiet = run(model, coalitions=chosen)
    model.train()
    noisy = run(model, coalitions=chosen)
    assert not torch.equal(noisy.logits, quiet.logits)
    assert torch.equal(noisy.coalition_values, quiet.coalition_values)
    assert torch.equal(noisy.null_values, quiet.null_values)
    assert all(module.training for module in model.modules())
    gap = noisy.null_values + noisy.attributions.sum(1) - noisy.logits
    assert gap.abs().max() < 1e-4


def test_a_failed_call_leaves_nothing_behind():
    model = wrapped("vit")
    before = run(model)
    with pytest.raises(ValueError):
        run(model, images(2, 48, 48))  # without interpolate_pos_encoding
    assert shapley(model).hooks.call is None
    assert torch.equal(run(model).attributions, before.attributions)


def test_parts_of_a_wrapped_model_may_be_called_alone():
    plain, model = base("vit"), wrap(base("vit"), tune="frozen")
    with torch.no_grad():
        expected = plain.vit(images()).last_hidden_state
        got = model.get_base_model().vit(images()).last_hidden_state
    assert close(got, expected)


def test_threads_take_turns():
    """What a pass needs to know lies on the model while it runs; a second thread must not see it."""
    model = wrapped("vit", "vote").eval()
    inputs = [images(1), images(1) + 1]
    expected = [run(model, x).attributions for x in inputs]
    wrong = []

    def work(index):
        for _ in range(30):
            with torch.no_grad():
                output = model(pixel_values=inputs[index])
            wrong.extend([index] * (not torch.equal(output.attributions, expected[index])))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(interval)
    assert not wrong


@pytest.mark.parametrize("prediction", ["vote", "classifier"])
def test_a_compiled_model_gives_the_same(prediction):
    model = wrapped("vit", prediction).eval()
    x, present = images(2), families.coalitions(2, 3, PLAYERS)
    with torch.no_grad():
        plain = model(pixel_values=x, coalitions=present)
        compiled = torch.compile(model, backend="eager")(pixel_values=x, coalitions=present)
    assert close(plain.attributions, compiled.attributions)
    assert close(plain.coalition_values, compiled.coalition_values)
