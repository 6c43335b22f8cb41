"""The laws of the soft game, in which players are present to a degree (all families but ten with `-m families`)."""

import itertools
import threading

import numpy as np
import pytest
import torch
import zoo
from families import images, shapley, wrap
from laws import (
    DEFAULT,
    MATCHERS,
    OWN,
    PATCHED,
    QUICK,
    TOKENS,
    adds_up,
    close,
    coalitions,
    count,
    doubled,
    on,
    on_pairs,
    on_removals,
    own,
    removals,
    run,
    with_dropout,
    with_grid,
    wrapped,
)
from test_law_gradients import CHECKPOINTED

from shapadapter import PatchGame, UnsupportedModelError, attribute, explain
from shapadapter.core.errors import ImageError

JUMPY = ("hgnet_v2", "mobilenet_v1", "mobilenet_v2", "pp_lcnet", "efficientnet", "regnet", "bit", "resnet", "textnet")
"""Nets of ReLU in which a small step crosses many kinks: their gradient changes within it."""


def degrees(name, number=3, batch=2, seed=0, low=0.1, high=0.9):
    """Presence (B, M, N) of players who are all there in part."""
    source = torch.Generator().manual_seed(500 + seed)
    return low + (high - low) * torch.rand(batch, number, count(name), generator=source)


@pytest.fixture
def exactly(monkeypatch):
    """What is kept in single precision stays in double: differences of small steps would drown in its rounding."""
    single = torch.Tensor.float
    monkeypatch.setattr(torch.Tensor, "float", lambda t: t if t.dtype == torch.float64 else single(t))


# -- law 11: at 0 and 1 the soft game is the hard one -----------------------------------------------------------------


@on_removals()
def test_who_is_fully_there_or_not_at_all_plays_the_game_of_coalitions(name, prediction, removal):
    """Everybody and nobody among them, and with absent tokens left out."""
    model, inputs, chosen = wrapped(name, prediction, removal=removal), zoo.inputs(name), coalitions(name, 5)
    hard = run(model, inputs, coalitions=chosen)
    for grad in (False, True, "present"):
        soft = run(model, inputs, coalitions=chosen.float(), coalition_grad=grad)
        assert close(soft.coalition_values, hard.coalition_values, 1e-5), grad
        for field in ("logits", "attributions", "null_values"):
            assert torch.equal(getattr(soft, field), getattr(hard, field)), field


@on_removals(turn=1)
def test_the_prediction_by_presence_is_the_value_of_the_coalition(name, prediction, removal):
    """And everybody's is the prediction without presence."""
    model, inputs, chosen = wrapped(name, prediction, removal=removal), zoo.inputs(name), coalitions(name, 3)
    plain = run(model, inputs, coalitions=chosen)
    for place in range(3):
        output = run(model, inputs, presence=chosen[:, place].float())
        assert close(output.logits.float(), plain.coalition_values[:, place], 1e-5)
        assert close(output.null_values, plain.null_values)
        if place == 0:
            assert close(output.logits, plain.logits, 1e-5)
            assert close(output.attributions, plain.attributions, 1e-4)


@on_pairs(QUICK, both=())
def test_a_degree_means_the_same_for_a_coalition_and_for_the_prediction(name, prediction):
    model, inputs, some = wrapped(name, prediction), zoo.inputs(name), degrees(name)
    values = run(model, inputs, coalitions=some).coalition_values
    present = run(model, inputs, coalitions=some, coalition_grad="present").coalition_values
    assert close(present, values, 1e-5)
    assert values.std(dim=1).min() > 1e-6
    for place in range(2):
        assert close(run(model, inputs, presence=some[:, place]).logits.float(), values[:, place], 1e-5)
    alone = run(model, inputs, coalitions=some[:, 1:2]).coalition_values[:, 0]
    assert close(alone, values[:, 1], 1e-5)


@on([name for name in DEFAULT if name in TOKENS])
def test_half_present_in_part_and_half_absent(name):
    """Absent tokens are left out and change nothing, also where they differ from image to image."""
    for removal in removals(name):
        model, inputs = wrapped(name, removal=removal), zoo.inputs(name)
        some = degrees(name, 4) * (torch.rand(2, 4, count(name), generator=torch.Generator().manual_seed(1)) < 0.5)
        some[0, 0] = 0
        whole = run(model, inputs, coalitions=some).coalition_values
        assert close(run(model, inputs, coalitions=some, coalition_grad="present").coalition_values, whole, 1e-5)


# -- law 12: the gradient ---------------------------------------------------------------------------------------------


def slope(model, inputs, some, direction, onesided=False, step=1e-5):
    """The change of the values' sum along `direction`, by differences; one-sided where there is nothing beyond."""

    def value(presence):
        return run(model, inputs, coalitions=presence, coalition_grad=True).coalition_values.sum()

    if not onesided:
        return (value(some + step * direction) - value(some - step * direction)) / (2 * step)
    ends = [value(some - turn * step * direction) for turn in range(3)]
    return (3 * ends[0] - 4 * ends[1] + ends[2]) / (2 * step)


@on_removals()
@pytest.mark.usefixtures("exactly")
def test_the_gradient_is_that_of_differences(name, prediction, removal):
    """Inside, and at full presence, where it is asked for most.

    Of two images: on the CPU, torch 2.13 differentiates the BatchNorm of one wrongly where its gradient comes transposed, as
    in LeViT.
    """
    if name in ("perceiver_learned", "perceiver_fourier"):
        pytest.skip("perceiver_conv shows it")
    model, inputs = own(name, prediction, removal=removal).double(), doubled(zoo.inputs(name))
    tolerance = 0.1 if name in JUMPY else 1e-3
    for some in (degrees(name, 1), torch.ones(2, 1, count(name))):
        some = some.double()
        direction = torch.rand(some.shape, generator=torch.Generator().manual_seed(2)).double() + 0.1
        some.requires_grad_()
        for grad in (True, "present"):
            values = model(**inputs, coalitions=some, coalition_grad=grad).coalition_values
            (found,) = torch.autograd.grad(values.sum(), some)
            assert found.isfinite().all()
        full = bool((some == 1).all())
        expected = slope(model, inputs, some.detach(), direction, onesided=full)
        size = (found * direction).abs().sum().clamp(min=1e-3)
        assert abs((found * direction).sum() - expected) < tolerance * size


@on_pairs(tuple(name for name in QUICK if name in (*TOKENS, *DEFAULT)), both=())  # feature maps are many and slow
@pytest.mark.usefixtures("exactly")
def test_gradients_along_the_diagonal_add_up_to_what_all_are_worth(name, prediction):
    """Votes fade with presence. A classifier without class token does not: it averages whoever is there, however little,
    and jumps at nobody; so the integral begins at a hundredth.
    """
    model, inputs = own(name, prediction).double(), doubled(zoo.inputs(name))
    points, weights = map(torch.from_numpy, np.polynomial.legendre.leggauss(24))
    low, total, size = 0.0 if prediction == "vote" else 0.01, 0.0, 0.0
    # In pieces: attention to a class token changes fast where little else is there, and nets of pixels have many kinks.
    edges = [low, 0.02, 0.1, 0.3, 0.6, 1.0]
    if removals(name) == ("pixels",):
        edges = [low, *(0.02 + 0.98 * part / 30 for part in range(31))]
    for start, end in itertools.pairwise(edges):
        places = start + (end - start) * (points + 1) / 2
        some = places[None, :, None].expand(2, -1, count(name)).clone().requires_grad_()
        values = model(**inputs, coalitions=some, coalition_grad=True).coalition_values[..., 0]
        (found,) = torch.autograd.grad(values.sum(), some)
        parts = (end - start) / 2 * weights * found[0].sum(dim=1)
        total, size = total + parts.sum(), size + parts.abs().sum()
    ends = torch.tensor([low, 1.0]).double()[None, :, None].expand(2, -1, count(name))
    nobody, everybody = run(model, inputs, coalitions=ends, coalition_grad=True).coalition_values[0, :, 0]
    if low == 0:
        assert abs(nobody - run(model, inputs).null_values[0, 0]) < 1e-5
    assert abs(total - (everybody - nobody)) < (0.05 if name in JUMPY else 1e-2) * max(0.1, size)


@on_pairs(QUICK, both=())
def test_the_gradient_of_the_prediction_is_that_of_the_coalition_of_all(name, prediction):
    """Explanations take the one, refinements the other."""
    model, inputs = wrapped(name, prediction), zoo.inputs(name)
    presence = torch.ones(2, count(name), requires_grad=True)
    (of_prediction,) = torch.autograd.grad(model(**inputs, presence=presence).logits[:, 0].sum(), presence)
    everybody = torch.ones(2, 1, count(name), requires_grad=True)
    for grad in (True, "present"):
        values = model(**inputs, coalitions=everybody, coalition_grad=grad).coalition_values
        (of_coalition,) = torch.autograd.grad(values[..., 0].sum(), everybody)
        assert close(of_coalition[:, 0], of_prediction, 1e-3 if name in JUMPY else 1e-4)


@pytest.mark.parametrize("config", [{"fill": "blur"}, {"fill": "learned"}, {}])
@pytest.mark.usefixtures("exactly")
def test_pixels_are_exchanged_for_what_replaces_them(config):
    """Also at full presence, where nothing of the replacement shows yet."""
    model = wrap("vit", "classifier", removal="pixels", **config).double()
    inputs = {"pixel_values": images(1).double()}
    some = torch.ones(1, 1, 16).double().requires_grad_()
    (found,) = torch.autograd.grad(model(**inputs, coalitions=some, coalition_grad=True).coalition_values.sum(), some)
    for player in (0, 9):
        direction = torch.zeros_like(some.detach())
        direction[..., player] = 1
        expected = slope(model, inputs, some.detach(), direction, onesided=True)
        assert abs(found[0, 0, player] - expected) < 1e-4 * max(1.0, abs(expected))


# -- the token, weights, precisions, sizes ----------------------------------------------------------------------------


@on_pairs([name for name in DEFAULT if name in TOKENS])
def test_the_token_changes_no_soft_value(name, prediction):
    model, inputs, some = own(name, prediction), zoo.inputs(name), degrees(name)
    before = run(model, inputs, coalitions=some, coalition_grad=True), run(model, inputs, presence=some[:, 0])
    with torch.no_grad():
        token = shapley(model).lora_shapley_token["default"]
        token.normal_(std=3, generator=torch.Generator().manual_seed(3))
    after = run(model, inputs, coalitions=some, coalition_grad=True), run(model, inputs, presence=some[:, 0])
    assert close(after[0].coalition_values, before[0].coalition_values, 1e-6)
    assert close(after[1].logits, before[1].logits, 1e-6)


@on_pairs(DEFAULT, both=())
def test_merged_weights_play_the_same_soft_game(name, prediction):
    model, inputs, some = own(name, prediction), zoo.inputs(name), degrees(name)
    expected = run(model, inputs, coalitions=some).coalition_values
    model.merge_adapter()
    assert close(run(model, inputs, coalitions=some).coalition_values, expected, 1e-4)
    model.unmerge_adapter()
    assert close(run(model, inputs, coalitions=some).coalition_values, expected, 1e-4)


@pytest.mark.parametrize("name", ["vit", "beit", "swin"])
def test_each_of_several_adapters_plays_its_own(name):
    from families import stir

    from shapadapter import ShapleyConfig

    model, inputs, some = own(name), zoo.inputs(name), degrees(name)
    first = run(model, inputs, coalitions=some).coalition_values
    model.add_adapter("other", ShapleyConfig(r=4, head_width=64, prediction="vote"))
    stir(model, seed=5, only="other").eval()
    model.set_adapter("other")
    chosen = coalitions(name)
    hard, soft = (run(model, inputs, coalitions=c).coalition_values for c in (chosen, chosen.float()))
    assert close(soft, hard, 1e-5)
    assert not close(run(model, inputs, coalitions=some).coalition_values, first, 1e-3)
    model.set_adapter("default")
    assert torch.equal(run(model, inputs, coalitions=some).coalition_values, first)


@on_pairs(both=())
def test_under_bf16_autocast(name, prediction):
    model, inputs, chosen = wrapped(name, prediction), zoo.inputs(name), coalitions(name)
    presence = torch.ones(2, count(name), requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        hard, soft = (run(model, inputs, coalitions=c).coalition_values for c in (chosen, chosen.float()))
        output = model(**inputs, presence=presence)
        (found,) = torch.autograd.grad(output.logits.float()[:, 0].sum(), presence)
    assert soft.dtype == torch.float32
    assert close(soft, hard, 0.1)
    assert found.isfinite().all()
    assert found.abs().max() > 0
    assert adds_up(output, 2e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["vit", "siglip", "resnet"])
def test_models_and_presence_in_half_precision(name, dtype):
    model, chosen = own(name).to(dtype), coalitions(name)
    inputs = {"pixel_values": zoo.inputs(name)["pixel_values"].to(dtype)}
    hard, soft = (run(model, inputs, coalitions=c).coalition_values for c in (chosen, chosen.to(dtype)))
    assert soft.isfinite().all()
    assert close(soft, hard, 0.1)


@on([name for name in DEFAULT if name in TOKENS and name not in PATCHED])
def test_players_coarser_than_cells(name):
    for removal in removals(name):
        model, inputs = with_grid(own(name, removal=removal), (2, 2)), zoo.inputs(name)
        chosen = coalitions(name, 5)[..., :4]
        chosen[:, 0], chosen[:, -1] = True, False
        hard = run(model, inputs, coalitions=chosen).coalition_values
        for grad in (False, "present"):
            soft = run(model, inputs, coalitions=chosen.float(), coalition_grad=grad).coalition_values
            assert close(soft, hard, 1e-5)
        assert close(run(model, inputs, presence=chosen[:, 1].float()).logits, hard[:, 1], 1e-5)


@on(MATCHERS)
def test_similarities_with_texts(name):
    """Of a prediction by presence as well; and in the space of embeddings, without texts."""
    for prediction in ("vote", "classifier"):
        model, inputs, chosen = wrapped(name, prediction), zoo.inputs(name), coalitions(name, 3)
        output = run(model, inputs, coalitions=chosen.float())
        assert output.coalition_values.shape == (2, 3, output.logits.shape[1])
        assert close(output.coalition_values[:, 0], output.logits, 1e-5)
        assert close(output.coalition_values[:, -1], output.null_values, 1e-5)
        by_presence = run(model, inputs, presence=chosen[:, 1].float())
        assert close(by_presence.logits, output.coalition_values[:, 1], 1e-5)
        assert adds_up(by_presence, 1e-4)
        alone = run(model, {key: inputs[key] for key in OWN if key in inputs}, presence=chosen[:, 1].float())
        assert close(alone.image_embeds, by_presence.image_embeds, 1e-5)


# -- how it is called -------------------------------------------------------------------------------------------------


@on([name for name in CHECKPOINTED if name not in ("pp_lcnet",)])
def test_gradients_in_training_mode_with_checkpointing(name):
    model = with_dropout(own(name), 0.0).train()
    found = []
    for turn in range(2):
        if turn:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        some = degrees(name, 2).requires_grad_()
        presence = degrees(name, 1, seed=1)[:, 0].clone().requires_grad_()
        output = model(**zoo.inputs(name), coalitions=some, coalition_grad=True, presence=presence)
        scores = output.coalition_values[..., 0].sum() + output.logits[:, 0].sum()
        found.append(torch.autograd.grad(scores, [some, presence]))
    for plain, again in zip(*found, strict=True):
        assert close(again, plain, 1e-4)


def test_threads_play_a_soft_and_a_hard_game_at_once():
    model, inputs, chosen, some = wrapped("vit"), zoo.inputs("vit"), coalitions("vit"), degrees("vit")
    expected = run(model, inputs, coalitions=chosen).coalition_values, run(model, inputs, coalitions=some)
    wrong, barrier = [], threading.Barrier(2)

    def play(what, values):
        barrier.wait()
        for _ in range(20):
            if not torch.equal(run(model, inputs, coalitions=what).coalition_values, values):
                wrong.append(what.dtype)

    threads = [
        threading.Thread(target=play, args=(chosen, expected[0])),
        threading.Thread(target=play, args=(some, expected[1].coalition_values)),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("name", ["vit", "siglip", "resnet"])
def test_nothing_of_a_call_outlives_an_error(name):
    model, inputs = own(name), zoo.inputs(name)
    expected = run(model, inputs)
    last = [module for module in model.get_base_model().modules() if isinstance(module, torch.nn.Linear)][-1]
    hook = last.register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("stop")))
    with hook, pytest.raises(RuntimeError, match="stop"):
        model(**inputs, presence=degrees(name)[:, 0], coalitions=degrees(name))
    assert shapley(model).hooks.call is None
    again = run(model, inputs)
    assert torch.equal(again.logits, expected.logits)
    assert torch.equal(again.attributions, expected.attributions)


@pytest.mark.parametrize("wrong", [1.5, -0.1, float("nan"), float("inf")])
@pytest.mark.parametrize("argument", ["coalitions", "presence"])
def test_degrees_beyond_0_and_1_are_refused(argument, wrong):
    model, given = wrapped("vit"), degrees("vit")
    given[1, 0, 3] = wrong
    given = given if argument == "coalitions" else given[:, 0]
    with pytest.raises(ImageError, match=r"present to a degree from 0 to 1, got"):
        model(**zoo.inputs("vit"), **{argument: given})


@pytest.mark.parametrize(
    "wrong",
    [
        torch.ones(2, 16, dtype=torch.long),
        torch.ones(2, 15),
        torch.ones(3, 16),
        torch.ones(16),
        torch.ones(2, 1, 16),
        [[1.0] * 16] * 2,
        0.5,
    ],
)
def test_presence_of_another_shape_or_kind_is_refused(wrong):
    with pytest.raises(ImageError, match=r"Expected presence \(2, 16\) as a float tensor from 0 to 1, .* got "):
        wrapped("vit")(**zoo.inputs("vit"), presence=wrong)


@pytest.mark.parametrize("wrong", [torch.ones(2, 3, 16, dtype=torch.long), torch.ones(2, 3, 15), torch.ones(2, 16), 1])
def test_coalitions_of_another_shape_or_kind_are_refused(wrong):
    with pytest.raises(ImageError, match=r"Expected coalitions .*got "):
        wrapped("vit")(**zoo.inputs("vit"), coalitions=wrong)


def test_presence_without_an_adapter_is_refused():
    model = own("vit")
    with model.disable_adapter(), pytest.raises(ValueError, match="presence was given but no Shapley adapter"):
        model(**zoo.inputs("vit"), presence=degrees("vit")[:, 0])


# -- models without a soft game, and modes of the caller --------------------------------------------------------------


def other_kernel(name):
    """A model that says its attention kernel is one that takes no additive mask."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register("maskless", sdpa_attention_forward)
    model = own(name, "classifier")
    for module in shapley(model).hooks._attentions:
        module._shapadapter_patch.config._attn_implementation_internal = "maskless"
    return model


def test_a_kernel_without_masks_has_no_gradient_and_is_refined_by_coalitions():
    model, pixels = other_kernel("vit"), images(2)
    for call in (
        lambda: explain(model, pixels, refine="gradient"),
        lambda: attribute(model, pixels, method="gradient"),
    ):
        with pytest.raises(UnsupportedModelError, match=r"'sdpa'"):
            call()
    found = explain(model, pixels, refine=64, top_k=1)
    assert found.evaluations.tolist() == [64, 64]
    assert found.efficiency_gap.max() < 1e-5
    assert found.standard_errors.isfinite().all()


def test_scores_that_no_gradient_reaches_are_refined_by_coalitions():
    model, pixels = own("vit", "classifier"), images(2)
    base = model.get_base_model()
    with base.classifier.register_forward_hook(lambda _, __, output: output.detach()):
        with pytest.raises(UnsupportedModelError, match="No gradient of the model's scores reaches its players"):
            explain(model, pixels, refine="gradient")
        found = explain(model, pixels, refine=64, top_k=1)
    assert found.evaluations.tolist() == [64, 64]
    assert found.efficiency_gap.max() < 1e-5


@pytest.mark.parametrize("name", ["vit", "beit", "resnet", "swin"])
@pytest.mark.parametrize("refine", ["gradient", 40])
def test_in_inference_mode_and_of_inference_tensors(name, refine):
    model, pixels = wrapped(name), zoo.inputs(name)["pixel_values"]
    expected = explain(model, pixels, refine=refine, top_k=2)
    with torch.inference_mode():
        made_there = pixels.clone()
        inside = explain(model, made_there, refine=refine, top_k=2)
    assert made_there.is_inference()
    for found in (inside, explain(model, made_there, refine=refine, top_k=2)):
        assert torch.equal(found.attributions, expected.attributions)
    with torch.no_grad():
        assert torch.equal(explain(model, pixels, refine=refine, top_k=2).attributions, expected.attributions)


def test_a_soft_game_of_inference_tensors():
    """Image and embeddings of texts."""
    model, inputs = wrapped("clip_model"), zoo.inputs("clip_model")
    embeds = torch.randn(3, 24, generator=torch.Generator().manual_seed(0))
    expected = None
    for inference in (False, True):
        with torch.inference_mode(inference):
            pixels, texts = inputs["pixel_values"][:1].clone(), embeds.clone()
            game = PatchGame(model, pixels, text_embeds=texts)
            some = degrees("clip_model")[0].clone() if not inference else None
        some = degrees("clip_model")[0].requires_grad_() if inference else some.requires_grad_()
        values = game.value(some)
        (found,) = torch.autograd.grad(values.sum(), some)
        expected = found if expected is None else expected
        assert torch.equal(found, expected)
