"""`explain(refine="gradient")`, and the gradients in `explain(refine=M)`."""

import gc
import math
import warnings
import weakref

import families
import pytest
import torch
from families import images, wrap

from shapadapter import PatchGame, attribute, explain
from shapadapter.explanation.game import GRADIENT_COST, BatchGame

SMALL = {"interpolate_pos_encoding": True}  # 2 x 4 players


@pytest.fixture(scope="module")
def model():
    return wrap("vit", "classifier")


def error(explanation, exact):
    return ((explanation.attributions.flatten(1, 2) - exact).norm(dim=1) / exact.norm(dim=1)).mean()


def equal(one, other):
    return all(
        torch.equal(getattr(one, name), getattr(other, name))
        for name in ("attributions", "standard_errors", "evaluations", "logits", "classes")
    )


@pytest.mark.parametrize("family", ["vit", "siglip", "dinov2"])
@pytest.mark.parametrize("prediction", ["vote", "classifier"])
def test_the_level_of_gradients(family, prediction):
    model = wrap(family, prediction)
    plain, found = explain(model, images(3)), explain(model, images(3), refine="gradient")
    assert found.method == "gradient"
    assert found.efficiency_gap.max() < 1e-5
    assert torch.allclose(found.logits, plain.logits, atol=1e-5)
    assert torch.allclose(found.null_values, plain.null_values, atol=1e-5)
    assert not torch.allclose(found.attributions, plain.attributions, atol=1e-2)
    assert found.standard_errors.shape == found.attributions.shape
    assert (found.standard_errors > 0).all()
    assert found.relative_errors.isfinite().all()
    assert found.evaluations.tolist() == [math.ceil(GRADIENT_COST * families.CLASSES)] * 3


def test_it_is_nearer_to_the_truth_than_one_pass():
    for prediction in ("vote", "classifier"):
        model = wrap("vit", prediction)
        exact = torch.stack([PatchGame(model, image, **SMALL).exact() for image in images(6, 16, 32)])
        errors = [error(explain(model, images(6, 16, 32), refine=r, **SMALL), exact) for r in (0, "gradient", 128)]
        assert errors == sorted(errors, reverse=True)


def test_it_is_the_mean_of_head_and_gradient(model):
    """By hand, in the weights that the spreads give."""
    pixels = images(2)
    plain, found = explain(model, pixels), explain(model, pixels, refine="gradient")
    felt = attribute(model, pixels, method="presence_gradient")
    assert felt.efficiency_gap.max() < 1e-5
    head, gradient = (one.attributions.flatten(1, 2).double() for one in (plain, felt))
    share = 0.5 * (head.std(1) / gradient.std(1)).clamp(max=1)[:, None]
    assert torch.allclose(found.attributions.flatten(1, 2).double(), share * head + (1 - share) * gradient, atol=1e-4)
    soft = PatchGame(model, pixels[0])
    everybody = torch.ones(1, 16, requires_grad=True)
    (by_hand,) = torch.autograd.grad(soft.value(everybody)[0, 2], everybody)
    centred = by_hand[0] - by_hand.mean()
    assert torch.allclose(gradient[0, :, 2] - gradient[0, :, 2].mean(), centred.double(), atol=1e-4)


def test_attribute_and_explain_agree(model):
    found = explain(model, images(), refine="gradient", top_k=2)
    assert equal(attribute(model, images(), method="gradient", top_k=2), found)


@pytest.mark.parametrize("refine", ["gradient", 60, 200])
def test_seeds_batches_and_company_do_not_matter(model, refine):
    options = {"refine": refine, "top_k": 2}
    together = explain(model, images(5), **options)
    assert equal(explain(model, images(5), **options), together)
    for batch_size in (1, 2):
        parts = explain(model, images(5), batch_size=batch_size, **options)
        assert torch.equal(parts.evaluations, together.evaluations)
        assert torch.allclose(parts.attributions, together.attributions, atol=1e-4)
        assert torch.allclose(parts.standard_errors, together.standard_errors, atol=1e-3)
    others = torch.cat([images(1), images(4, seed=9)])
    assert torch.allclose(explain(model, others, **options).attributions[0], together.attributions[0], atol=1e-4)
    other = explain(model, images(5), seed=1, **options)
    assert torch.equal(other.attributions, together.attributions) == (refine == "gradient")


@pytest.mark.parametrize("refine", ["gradient", 128])
def test_shown_classes(model, refine):
    everything = explain(model, images(), refine=refine)
    assert everything.attributions.shape[-1] == families.CLASSES
    some = explain(model, images(), refine=refine, targets=["dog", 1])
    best = explain(model, images(), refine=refine, top_k=1)
    assert some.attributions.shape[-1] == 2
    assert best.classes[:, 0].tolist() == best.logits.argmax(1).tolist()
    for one in (everything, some, best):
        assert one.efficiency_gap.max() < 1e-5
        assert one.standard_errors.isfinite().all()
    if refine == "gradient":
        for label in ("dog", "bee"):
            assert torch.allclose(some.for_label(label), everything.for_label(label), atol=1e-5)


@pytest.fixture
def played(monkeypatch):
    """How many samples of gradients, and how many coalitions, an image gets."""
    counts = {"gradients": 0, "values": 0}
    for name in counts:
        plain = getattr(BatchGame, name)

        def watched(game, chosen, given, plain=plain, name=name):
            counts[name] += given.shape[1]
            return plain(game, chosen, given)

        monkeypatch.setattr(BatchGame, name, watched)
    return counts


@pytest.mark.parametrize(("refine", "shown"), [(2, 1), (6, 1), (40, 1), (256, 1), (256, 3), (64, 5), (1000, 5)])
def test_evaluations_are_counted(model, played, refine, shown):
    found = explain(model, images(1), refine=refine, top_k=shown)
    assert found.evaluations.tolist() == [refine]
    spent = played["values"] + GRADIENT_COST * (played["gradients"] * (1 + shown))
    assert spent <= refine
    assert spent + GRADIENT_COST * shown >= refine - 3
    assert played["values"] % 2 == 0


def test_until_with_many_classes_spends_no_more_than_it_says(played):
    """Early rounds have no room for the gradients of 20 classes."""
    labels = {index: f"class {index}" for index in range(20)}
    model = wrap(families.build("vit", id2label=labels, label2id={v: k for k, v in labels.items()}), "classifier")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        found = explain(model, images(1, 40, 40), refine="until", relative_error=1e-3, max_refine=800, **SMALL)
    spent = played["values"] + GRADIENT_COST * (20 + played["gradients"] * 21)
    assert played["gradients"] > 0
    assert spent <= found.evaluations[0] <= 800
    assert found.efficiency_gap.max() < 1e-5


@pytest.mark.parametrize("refine", [254, 1000, "until"])
def test_where_all_coalitions_are_paid_for_the_truth_is_found(model, played, refine):
    pixels = images(2, 16, 32)
    exact = torch.stack([PatchGame(model, image, **SMALL).exact() for image in pixels])
    more = {"relative_error": 1e-6} if refine == "until" else {}
    found = explain(model, pixels, refine=refine, **more, **SMALL)
    assert error(found, exact) < 1e-5
    assert not found.standard_errors.any()
    assert found.evaluations.tolist() == [254, 254]
    assert played["gradients"] == 0


@pytest.mark.parametrize("refine", ["gradient", 64, "until"])
def test_no_graph_is_kept(model, refine):
    """Nothing that a backward pass would need, nor gradients of weights."""
    kept = []

    class Saved:
        def __init__(self, tensor):
            self.tensor = tensor.detach()  # with its graph it would be part of a circle

    def pack(tensor):
        saved = Saved(tensor)
        kept.append(weakref.ref(saved))
        return saved

    more = {"relative_error": 0.5, "max_refine": 100} if refine == "until" else {}
    with warnings.catch_warnings(), torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        warnings.simplefilter("ignore", UserWarning)
        found = explain(model, images(2), refine=refine, top_k=1, **more)
    gc.collect()
    assert kept
    assert not any(one() is not None for one in kept)
    for name in ("attributions", "standard_errors", "logits", "null_values", "probabilities"):
        assert not getattr(found, name).requires_grad, name
        assert getattr(found, name).grad_fn is None, name
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_mode_and_the_random_state_are_left(model):
    model.train()
    try:
        state, options = torch.get_rng_state(), {"refine": "gradient", "top_k": 1}
        found = explain(model, images(), **options)
        assert torch.equal(torch.get_rng_state(), state)
        assert all(module.training for module in model.modules())
        assert torch.is_grad_enabled()
    finally:
        model.eval()
    assert torch.allclose(explain(model, images(), **options).attributions, found.attributions, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*relative_error")
@pytest.mark.parametrize("shown", [1, 3, 5])
def test_a_last_round_without_room_for_samples(shown):
    """Pairs of earlier rounds may have taken what one more block of samples would cost."""
    model, pixels = wrap("ijepa"), images(1, 40, 40)
    for most in (66, 84, 100):
        options = {"top_k": shown, "interpolate_pos_encoding": True}
        found = explain(model, pixels, refine="until", relative_error=1e-9, max_refine=most, **options)
        assert found.evaluations.tolist() == [most]
        assert found.attributions.isfinite().all()


def test_nobody_is_present_in_any_sample():
    model, pixels = wrap("ijepa"), images(2)  # without a class token nothing is left to attend to
    nobody = torch.zeros(2, 3, 16, requires_grad=True)
    soft = model(pixel_values=pixels, coalitions=nobody, coalition_grad="present").coalition_values
    assert torch.equal(soft, model(pixel_values=pixels, coalitions=nobody.bool()).coalition_values)
