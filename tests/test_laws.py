"""The laws of the game and of the adapter, for every family of the zoo (all but ten of them with `-m families`)."""

import copy

import families
import pytest
import torch
import zoo
from families import CLASSES, shapley, wrap
from laws import (
    CLASSIFIERS,
    DEFAULT,
    MAPS,
    MATCHERS,
    NAMES,
    PATCHED,
    PLAIN,
    QUICK,
    RESIZED,
    TOKENS,
    UNORDERED,
    adds_up,
    close,
    coalitions,
    count,
    deaf_to_absent,
    disturb,
    ends_meet,
    frozen,
    on,
    on_pairs,
    on_removals,
    own,
    parts,
    players,
    removals,
    run,
    same,
    same_parts,
    with_dropout,
    wrapped,
)
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
from zoo import REFUSED, of_kind

from shapadapter import ShapleyOutput, UnsupportedModelError
from shapadapter.backbone import settle
from shapadapter.backbone.families import refused_families

# -- law 1: efficiency ------------------------------------------------------------------------------------------------


@on_pairs()
def test_attributions_and_null_sum_to_the_logits(name, prediction):
    output = run(wrapped(name, prediction), zoo.inputs(name))
    assert isinstance(output, ShapleyOutput)
    assert output.logits.shape == output.null_values.shape == (2, CLASSES)
    assert output.attributions.shape == (2, count(name), CLASSES)
    assert output.coalition_values is None
    assert 1e-2 < output.logits.abs().max() < 100
    assert output.null_values.abs().max() > 1e-4
    assert output.attributions.std(dim=1).min() > 1e-4
    assert not close(output.attributions[0], output.attributions[1], 1e-3)
    assert adds_up(output)


@on_removals()
def test_full_and_empty_coalitions_are_logits_and_null(name, prediction, removal):
    """Beside any others, which change neither prediction nor explanation."""
    model, inputs = wrapped(name, prediction, removal=removal), zoo.inputs(name)
    alone, output = run(model, inputs), run(model, inputs, coalitions=coalitions(name))
    assert ends_meet(output)
    for field in ("logits", "attributions", "null_values"):
        assert torch.equal(getattr(alone, field), getattr(output, field)), field


@on_pairs(both=())
def test_efficiency_under_bf16_autocast(name, prediction):
    with torch.autocast("cpu", torch.bfloat16):
        output = run(wrapped(name, prediction), zoo.inputs(name), coalitions=coalitions(name))
    assert output.attributions.dtype == output.null_values.dtype == output.coalition_values.dtype == torch.float32
    assert adds_up(output, 1e-2)
    assert output.coalition_values.isfinite().all()


# -- law 2: leaks -----------------------------------------------------------------------------------------------------


@on_removals()
def test_absent_players_have_no_influence_at_all_and_present_ones_do(name, prediction, removal):
    model, inputs, grid = wrapped(name, prediction, removal=removal), zoo.inputs(name), players(name)
    scales = (
        (30.0, 1e4) if removal == "mask" else (30.0, 1e4, float("nan"))
    )  # nothing times not-a-number is not nothing
    for seed, scale in enumerate(scales if name in DEFAULT else scales[-1:]):
        assert deaf_to_absent(model, inputs, grid, coalitions(name, 3, seed=seed)[:, 1:2], scale, seed)
    for player in (0, count(name) - 1)[: 2 if name in DEFAULT else 1]:
        chosen = (torch.arange(count(name)) == player).expand(2, 1, -1)
        clean = run(model, inputs, coalitions=chosen).coalition_values
        noisy = disturb(inputs, grid, chosen[:, 0])
        assert not close(run(model, noisy, coalitions=chosen).coalition_values, clean, 1e-5)


@on(PATCHED)
def test_padding_has_no_influence_at_all(name):
    model, inputs, chosen = wrapped(name), zoo.inputs(name), coalitions(name)
    noisy = disturb(inputs, players(name), torch.zeros(2, count(name), dtype=torch.bool), 1e4)
    assert not torch.equal(noisy["pixel_values"], inputs["pixel_values"])
    assert same(run(model, noisy, coalitions=chosen), run(model, inputs, coalitions=chosen))


@pytest.mark.parametrize("removal", ["drop", "mask"])
def test_coalitions_in_one_call_equal_calls_one_by_one(removal):
    model, inputs, chosen = wrapped("vit", removal=removal), zoo.inputs("vit"), coalitions("vit", 6)
    assert len(chosen.sum(-1).unique()) > 3
    together = run(model, inputs, coalitions=chosen).coalition_values
    for place in range(6):
        alone = run(model, inputs, coalitions=chosen[:, place : place + 1]).coalition_values
        assert close(alone[:, 0], together[:, place], 1e-5)


# -- law 3: the base is untouched -------------------------------------------------------------------------------------


@on(NAMES)
def test_a_frozen_base_and_its_own_head_compute_as_before(name):
    """Logits, loss, hidden states; and when it is unloaded, it is what it was, though Swin adjusts its windows to what it sees."""
    inputs = zoo.inputs(name, batch=CLASSES if name in MATCHERS else 2)
    model, base = frozen(name), zoo.base(name)
    assert same_parts(parts(copy.deepcopy(model).unload()), parts(base))
    asked = {"return_loss": True} if name in MATCHERS else {}
    plain = run(base, inputs, output_hidden_states=True, **asked)
    if name in CLASSIFIERS and name not in MATCHERS:
        asked = {"labels": torch.tensor([1, 3])}
    output = run(model, inputs, output_hidden_states=True, **asked)
    assert adds_up(output, 3e-5)
    if name in CLASSIFIERS:
        assert close(output.logits, zoo.logits(plain))
        expected = plain.loss if name in MATCHERS else nn.functional.cross_entropy(output.logits, asked["labels"])
        assert close(output.loss, expected)
    expected, got = getattr(plain, "hidden_states", None) or (), output.hidden_states or ()
    for one, other in zip(got, expected, strict=True):
        assert one.shape == other.shape
        assert close(one, other)


@on_pairs(both=())
def test_disabled_or_unloaded_is_bit_identical_and_leaves_no_trace(name, prediction):
    inputs = zoo.inputs(name)
    model, base = own(name, prediction), zoo.base(name).requires_grad_(False)
    plain = run(base, inputs)
    output = run(model, inputs, coalitions=coalitions(name, 3))
    assert name == "dinov3" or not torch.equal(output.logits, zoo.logits(plain))
    with model.disable_adapter():
        disabled = run(model, inputs)
    assert type(disabled) is type(plain)
    assert torch.equal(zoo.logits(disabled), zoo.logits(plain))
    clean = model.unload()
    assert torch.equal(zoo.logits(run(clean, inputs)), zoo.logits(plain))
    assert same_parts(parts(clean), parts(base))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in clean.modules())
    if name in RESIZED and name in QUICK:
        larger = zoo.inputs(name, batch=1, size=(96, 128) if name in MAPS else (48, 64))
        assert families.same_bits(zoo.logits(run(clean, larger)), zoo.logits(run(base, larger)))


@on_pairs(QUICK)
def test_targets_are_those_of_eval_mode(name, prediction):
    """Dropout, drop path and batch statistics are off while coalitions and the empty value are computed."""
    model, inputs = with_dropout(own(name, prediction), 0.5), zoo.inputs(name)
    chosen = coalitions(name)
    quiet = run(model.eval(), inputs, coalitions=chosen)
    noisy = run(model.train(), inputs, coalitions=chosen)
    assert not torch.equal(noisy.logits, quiet.logits)
    assert torch.equal(noisy.coalition_values, quiet.coalition_values)
    assert torch.equal(noisy.null_values, quiet.null_values)
    assert all(module.training for module in model.modules() if not isinstance(module, _BatchNorm))
    assert adds_up(noisy, 1e-4)
    assert same(run(model.eval(), inputs, coalitions=chosen), quiet)


# -- law 4: removal operators -----------------------------------------------------------------------------------------


@on(NAMES)
def test_the_way_of_removal(name):
    assert wrapped(name).peft_config["default"].removal == removals(name)[0]
    for removal in {"drop", "mask", "pixels"} - set(removals(name)) if name in (*TOKENS, *DEFAULT) else ():
        with pytest.raises(
            UnsupportedModelError, match=f"removal='{removal}' .*(leave it at 'auto'|use removal='mask')"
        ):
            settle(zoo.base(name), removal)


@on_pairs([name for name in TOKENS if "drop" in removals(name)])
def test_dropping_equals_masking(name, prediction):
    for size, number in ((None, count(name)), ((40, 24), 15))[: 2 if name in DEFAULT else 1]:
        inputs, chosen = zoo.inputs(name, size=size), families.coalitions(2, 8, number)
        dropped, masked = (
            run(wrapped(name, prediction, removal=removal), inputs, coalitions=chosen).coalition_values
            for removal in ("drop", "mask")
        )
        assert dropped.std() > 1e-3
        assert close(dropped, masked, 1e-5)


@pytest.mark.parametrize(
    ("name", "prediction"), [("beit", "vote"), pytest.param("data2vec", "classifier", marks=pytest.mark.families)]
)
def test_without_position_bias_dropping_equals_masking_there_too(name, prediction):
    inputs, chosen = zoo.inputs(name), coalitions(name, 8)
    values = []
    for removal in ("auto", "mask"):
        model = wrap(zoo.build(name, use_relative_position_bias=False), prediction, removal=removal)
        assert model.peft_config["default"].removal == ("drop" if removal == "auto" else "mask")
        values.append(run(model, inputs, coalitions=chosen).coalition_values)
    assert close(*values, 1e-5)


# -- the token --------------------------------------------------------------------------------------------------------


@on_pairs(PLAIN)
def test_the_token_moves_attributions_and_nothing_else(name, prediction):
    """The image's own tokens least of all: bit for bit they are what they would be without it."""
    model, inputs, chosen = own(name, prediction), zoo.inputs(name), coalitions(name, 5)
    before = run(model, inputs, coalitions=chosen, output_hidden_states=True)
    with torch.no_grad():
        shapley(model).lora_shapley_token["default"].normal_(std=3)
    after = run(model, inputs, coalitions=chosen, output_hidden_states=True)
    for one, other in zip(before.hidden_states, after.hidden_states, strict=True):
        assert torch.equal(one, other)
    assert (before.attributions - after.attributions).abs().max() > 1e-3
    assert close(after.logits, before.logits, 1e-5)
    assert prediction == "vote" or torch.equal(before.logits, after.logits)
    assert close(after.attributions.sum(1), before.attributions.sum(1), 1e-5)
    assert torch.equal(after.coalition_values, before.coalition_values)
    assert torch.equal(after.null_values, before.null_values)


@on(PLAIN)
def test_the_token_reads_every_player(name):
    """The token after the last block moves when any one player's pixels change."""
    model, inputs, seen = own(name), zoo.inputs(name), []
    hooks = shapley(model).hooks
    original = hooks._after_source

    def spy(*args):
        hidden = original(*args)
        seen.append(hooks.call.token.clone())
        return hidden

    block = model.get_base_model().get_submodule(hooks.anatomy.blocks[-1])
    hooks._handles[-1].remove()
    block.register_forward_hook(spy)
    run(model, inputs)
    for player in range(count(name)):
        run(model, disturb(inputs, players(name), (torch.arange(count(name)) == player).expand(2, -1)))
        assert not torch.equal(seen[0], seen[-1])


@on_pairs(PLAIN)
def test_identical_patches_get_identical_attributions(name, prediction):
    model, inputs = own(name, prediction), zoo.inputs(name)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "position" in path:
                parameter.zero_()
    pixels = inputs["pixel_values"]
    pixels[:, :, :8, 8:16] = pixels[:, :, -8:, :8]  # player 1 = player 12
    output = run(model, inputs)
    assert close(output.attributions[:, 1], output.attributions[:, 12], 1e-5)
    assert not close(output.attributions[:, 1], output.attributions[:, 2], 1e-3)


# -- which families ---------------------------------------------------------------------------------------------------


def test_every_image_classifier_of_transformers_is_supported_or_refused_by_name():
    with torch.device("meta"):
        known = {type(zoo.ZOO[name].make()).__name__ for name in NAMES} | set(refused_families())
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


def test_a_model_without_scores_has_no_classifier_to_predict_with():
    with pytest.raises(UnsupportedModelError, match="prediction='vote'"):
        wrap(zoo.base("dinov3"), "classifier")


def test_no_family_is_left_out_of_these_tests():
    assert {*NAMES, *UNORDERED, *of_kind(REFUSED)} == set(zoo.ZOO)
    assert set(DEFAULT) < set(NAMES)
