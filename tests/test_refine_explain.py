"""`explain(refine=...)`: the model's own Shapley values, however images are batched and players removed."""

import warnings
from collections import defaultdict

import families
import matching
import pytest
import torch
from families import images, wrap

from shapadapter import Explanation, PatchGame, attribute, explain
from shapadapter.explanation.game import BatchGame

SMALL = {"interpolate_pos_encoding": True}  # 2 x 4 players: 254 coalitions besides nobody and everybody
TEXTS = ["a cat", "a dog", "two dogs"]


@pytest.fixture(scope="module")
def model():
    return wrap("vit", "classifier")


@pytest.fixture(scope="module")
def exact(model):
    """(3, 8, 5), by enumeration."""
    return torch.stack([PatchGame(model, image, **SMALL).exact() for image in images(3, 16, 32)])


def error(explanation, exact):
    return ((explanation.attributions.flatten(1, 2) - exact).norm(dim=1) / exact.norm(dim=1)).mean()


def test_without_refinement_nothing_changes(model):
    plain, none = explain(model, images()), explain(model, images(), refine=0)
    assert torch.equal(plain.attributions, none.attributions)
    assert none.standard_errors is none.relative_errors is None
    assert none.evaluations.tolist() == [0, 0]
    assert "evaluations" not in repr(none)


def test_more_evaluations_come_nearer_to_the_truth(model, exact):
    found = [explain(model, images(3, 16, 32), refine=evaluations, **SMALL) for evaluations in (0, 32, 128, 252)]
    errors = [error(one, exact) for one in found]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.25  # a head and gradients of a network that learned nothing
    expected = [one.relative_errors.mean() for one in found[1:]]
    assert expected == sorted(expected, reverse=True)
    for one, spent in zip(found[1:], (32, 128, 252), strict=True):
        assert one.evaluations.tolist() == [spent] * 3
        assert one.efficiency_gap.max() < 1e-5
        low, high = (part.flatten(1, 2) for part in one.interval(2))
        assert ((low <= exact[..., 2]) & (exact[..., 2] <= high)).float().mean() > 0.8


@pytest.mark.parametrize("refine", [254, 1000])
def test_all_coalitions_give_the_truth_itself(model, exact, refine):
    found = explain(model, images(3, 16, 32), refine=refine, **SMALL)
    assert error(found, exact) < 1e-5
    assert (found.standard_errors == 0).all()
    assert found.evaluations.tolist() == [254] * 3


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("vit", {"prediction": "vote", "removal": "drop"}),
        ("vit", {"prediction": "vote", "removal": "mask"}),
        ("vit", {"prediction": "vote", "removal": "pixels"}),
        ("dinov2", {"prediction": "classifier", "removal": "pixels", "fill": "blur"}),
        ("siglip", {"prediction": "vote", "grid": (2, 4)}),
    ],
)
def test_every_way_of_removal(family, config):
    model = wrap(family, **{"grid": (2, 2), **config})
    exact = torch.stack([PatchGame(model, image).exact() for image in images(2)])
    found = explain(model, images(2), refine=1000)
    assert error(found, exact) < 1e-5
    assert (error(explain(model, images(2), refine=12), exact) < 5 * error(explain(model, images(2)), exact)).all()


def test_texts():
    """The values are similarities; each image shows texts of its own."""
    model, processor = matching.wrapped("clip", grid=(2, 4)), matching.processor("clip")
    options = {"texts": TEXTS, "top_k": 2}
    found = explain(model, matching.pictures(3), processor, refine=254, **options)
    plain = explain(model, matching.pictures(3), processor, **options)
    assert torch.equal(found.classes, plain.classes)
    assert torch.allclose(found.logits, plain.logits, rtol=1e-5)  # through attention with a mask of zeros
    pixels = matching.images("clip", 3)["pixel_values"]
    ids = matching.tokens("clip", TEXTS)
    with torch.no_grad():
        embeds = model.get_base_model().get_text_features(**ids).pooler_output
    for index in range(3):
        game = PatchGame(model, pixels[index], text_embeds=embeds / embeds.norm(dim=1, keepdim=True))
        exact = game.exact()[:, found.classes[index]]
        assert (found.attributions[index].flatten(0, 1) - exact).abs().max() < 1e-4 * exact.abs().max()
    some = explain(model, matching.pictures(3), processor, refine=100, **options)
    assert (some.attributions - found.attributions).norm() < 0.8 * (plain.attributions - found.attributions).norm()


@pytest.mark.parametrize("refine", [40, "until"])
def test_it_does_not_matter_how_images_are_batched(model, refine):
    options = {"refine": refine, "top_k": 1}
    if refine == "until":
        options |= {"relative_error": 0.4, "max_refine": 1000}
    together = explain(model, images(5), **options)
    for batch_size in (1, 2):
        parts = explain(model, images(5), batch_size=batch_size, **options)
        assert torch.equal(parts.evaluations, together.evaluations)
        assert torch.allclose(parts.attributions, together.attributions, atol=1e-4)
        assert torch.allclose(parts.standard_errors, together.standard_errors, atol=1e-4)


def test_seeds(model):
    first, again, other = (explain(model, images(), refine=20, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.attributions, again.attributions)
    assert not torch.allclose(first.attributions, other.attributions)
    # One image twice: not the same coalitions.
    twice = explain(model, images(1).expand(2, -1, -1, -1), refine=20)
    assert not torch.allclose(twice.attributions[0], twice.attributions[1])
    state = torch.get_rng_state()
    explain(model, images(), refine=20)
    assert torch.equal(torch.get_rng_state(), state)


def test_until_spends_on_each_image_what_it_takes(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = explain(model, images(4), refine="until", relative_error=0.35, top_k=1)
    assert (found.relative_errors <= 0.35 * (1 + 1e-5)).all()
    assert len(found.evaluations.unique()) > 1
    assert (found.evaluations % 2 == 0).all()
    for index, spent in enumerate(found.evaluations.tolist()):
        # Not much more than needed: one round less was not enough.
        if spent > 64:
            less = explain(model, images(4), refine="until", relative_error=1e-9, max_refine=spent // 4 * 2, top_k=1)
            assert less.relative_errors[index] > 0.35 / 2


def test_until_the_budget_ends(model):
    with pytest.warns(UserWarning, match=r"4 of 4 images .*=0\.001 after 100 evaluations, the worst is at"):
        found = explain(model, images(4), refine="until", relative_error=0.001, max_refine=100, batch_size=2)
    assert found.evaluations.tolist() == [100] * 4


def test_until_few_players_are_enumerated(model, exact):
    for most in (4096, 254):  # from 254 on there is enough for all of them
        found = explain(
            model, images(3, 16, 32), refine="until", relative_error=0.01, max_refine=most, batch_size=2, **SMALL
        )
        assert error(found, exact) < 1e-5
        assert not found.standard_errors.any()
        assert found.evaluations.tolist() == [254] * 3
    with pytest.warns(UserWarning, match="after 252"):
        found = explain(model, images(3, 16, 32), refine="until", relative_error=0.01, max_refine=252, **SMALL)
    assert (found.evaluations <= 252).all()
    assert error(found, exact) > 1e-4


@pytest.fixture
def evaluated(monkeypatch):
    """The coalitions that are evaluated from here on, of each image, by its first pixel."""
    seen = defaultdict(list)
    values = BatchGame.values

    def watched(game, chosen, coalitions):
        for image, several in zip(chosen.tolist(), coalitions, strict=True):
            seen[game.inputs["pixel_values"][image, 0, 0, 0].item()].extend(map(tuple, several.tolist()))
        return values(game, chosen, coalitions)

    monkeypatch.setattr(BatchGame, "values", watched)
    return seen


@pytest.mark.parametrize(("height", "width"), [(16, 16), (24, 24)])  # 4 and 9 players
def test_until_evaluates_no_coalition_twice_and_ends_exactly(model, evaluated, height, width):
    players = height * width // 64
    pixels, everything = images(2, height, width), 2**players - 2
    truth = torch.stack([PatchGame(model, image, **SMALL).exact() for image in pixels])
    few = players == 4
    for most in (everything, everything + 2, 4096) if few else (everything,):
        evaluated.clear()
        found = explain(model, pixels, refine="until", relative_error=1e-6, max_refine=most, **SMALL)
        assert [len(several) for several in evaluated.values()] == found.evaluations.tolist() == [everything] * 2
        assert all(len(set(several)) == everything for several in evaluated.values())
        assert not found.standard_errors.any()
        assert (found.attributions.flatten(1, 2) - truth).abs().max() < 1e-5
    for most in (2, 10, everything - 2) if few else (10,):
        evaluated.clear()
        with pytest.warns(UserWarning, match=f"after {most} evaluations"):
            found = explain(model, pixels, refine="until", relative_error=1e-6, max_refine=most, **SMALL)
        assert [len(several) for several in evaluated.values()] == found.evaluations.tolist()
        assert all(len(set(several)) == len(several) <= most for several in evaluated.values())
        assert (found.standard_errors > 0).all()


def test_coalitions_that_were_drawn_before_cost_nothing_and_the_errors_stay_true(model):
    pixels = images(20, 16, 32)
    truth = torch.stack([PatchGame(model, image, **SMALL).exact() for image in pixels])  # (20, 8, 5)
    with pytest.warns(UserWarning, match="after 100"):
        found = explain(model, pixels, refine="until", relative_error=1e-6, max_refine=100, **SMALL)
    assert found.evaluations.tolist() == [100] * 20
    inside = (found.attributions.flatten(1, 2) - truth).abs() <= 1.96 * found.standard_errors.flatten(1, 2)
    assert inside.float().mean() > 0.9


@pytest.mark.parametrize("method", ["kernel_shap", "permutation", "refined"])
def test_methods_that_sample_are_exact_where_all_coalitions_are_paid_for(model, evaluated, method):
    pixels = images(2, 16, 32)
    truth = torch.stack([PatchGame(model, image, **SMALL).exact() for image in pixels])
    for budget in (254, 1000):
        evaluated.clear()
        found = attribute(model, pixels, method=method, evaluations=budget, **SMALL)
        assert [len(set(several)) for several in evaluated.values()] == found.evaluations.tolist() == [254, 254]
        assert (found.attributions.flatten(1, 2) - truth).abs().max() < 1e-5
        assert found.standard_errors is None or not found.standard_errors.any()
    found = attribute(model, pixels, method=method, evaluations=252, **SMALL)
    assert (found.attributions.flatten(1, 2) - truth).abs().max() > 1e-4


def test_a_game_is_exact_where_all_coalitions_are_paid_for(model):
    game = PatchGame(model, images(1, 16, 32)[0], **SMALL)
    estimate, error = game.kernel_shap(256, torch.Generator())
    assert torch.equal(estimate, game.exact())
    assert error.tolist() == [0.0] * 5
    assert (game.kernel_shap(252, torch.Generator())[1] > 0).all()


def test_coalitions_are_evaluated_together_and_the_mode_is_left(model, monkeypatch):
    monkeypatch.setattr("shapadapter.explanation.refine._FOR_GRADIENTS", 0)  # all to coalitions
    shapes = []
    block = model.get_base_model().vit.layers[0]
    hook = block.register_forward_pre_hook(lambda _, given: shapes.append(given[0].shape))
    try:
        model.train()
        explain(model, images(4), refine=64, batch_size=4)
        assert model.training
    finally:
        hook.remove()
        model.eval()
    whole = sum(images for images, tokens, _ in shapes if tokens == families.PLAYERS + 2)
    calls = 1 + 4 * 64 // 32
    assert whole == 4 + calls - 1  # the one pass, and one image more in every 32 coalitions
    assert sum(images for images, _, _ in shapes) == 4 * 64 + whole + calls  # each also evaluates nobody once
    assert max(images for images, _, _ in shapes) <= 8 * 4


def test_errors_are_saved_and_shown(model, tmp_path):
    found = explain(model, images(), refine=20, top_k=2)
    found.save(tmp_path / "why")
    loaded = Explanation.load(tmp_path / "why")
    assert torch.equal(loaded.standard_errors, found.standard_errors)
    assert torch.equal(loaded.evaluations, found.evaluations)
    assert ", refined, 20 evaluations, gap" in repr(loaded)
    assert loaded[1].standard_errors.shape == (1, 4, 4, 2)
    found.figure(0)
    assert found.save_html(tmp_path / "why.html").is_file()


@pytest.mark.parametrize("refine", [-1, 7, 2.5, "64", None, True])
def test_what_refine_must_be(model, refine):
    with pytest.raises(
        ValueError, match=r"even number of evaluations, 0 or more, .*, or 'until', or 'gradient'"
    ) as refused:
        explain(model, images(), refine=refine)
    assert f"got refine={refine!r}." in str(refused.value)
    assert "max_refine" not in str(refused.value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"refine": 7},
        {"refine": -2},
        {"refine": 256.0},
        {"refine": "always"},
        {"refine": "until", "max_refine": 101},
        {"refine": "until", "max_refine": 0},
        {"refine": "until", "relative_error": 0},
        {"refine": 64, "relative_error": 0.1},
        {"max_refine": 64},
    ],
)
def test_wrong_requests(model, wrong):
    with pytest.raises(ValueError, match=r"refine=|relative_error"):
        explain(model, images(), **wrong)
