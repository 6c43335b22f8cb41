"""Images matched with texts: the game of every family in the space of embeddings, and along its texts."""

import pytest
import torch
from matching import FIELDS, SIGMOID, base, images, processor, tokens, wrapped
from texts import TEXT_FAMILIES, captions
from torch.nn import functional as F

from shapadapter import ImageError, MatchingOutput, PatchGame, ShapleyError, explain
from shapadapter.core.estimates import exact_shapley_values
from shapadapter.core.shapley import all_coalitions, contrastive_loss, pairwise_sigmoid_loss
from shapadapter.explanation.api import embed_texts

every_family = pytest.mark.parametrize("family", TEXT_FAMILIES)
each_prediction = pytest.mark.parametrize("prediction", ["vote", "classifier"])
TEXTS = captions(14)[8:]  # of several lengths


def run(model, *args, **kwargs):
    with torch.no_grad():
        return model(*args, **kwargs)


def close(one, other, tolerance=1e-5):
    return (one - other).abs().max().item() <= tolerance * max(1.0, other.abs().max().item())


def some_coalitions(batch=3, players=16, count=6):
    generator = torch.Generator().manual_seed(0)
    chosen = torch.rand(batch, count, players, generator=generator) < torch.linspace(0, 1, count)[:, None]
    chosen[:, -1] = True
    return chosen


# -- predictions -----------------------------------------------------------------------------------------------------


@every_family
def test_a_frozen_classifier_matches_as_the_base_does(family):
    inputs = {**images(family), **tokens(family, TEXTS)}
    expected = run(base(family), **inputs)
    output = run(wrapped(family, "classifier", tune="frozen"), **inputs)
    assert isinstance(output, MatchingOutput)
    assert close(output.logits, expected.logits_per_image)
    assert close(output.logits_per_text, expected.logits_per_text)
    assert torch.equal(output.logits_per_image, output.logits)
    assert close(output.image_embeds, expected.image_embeds, 1e-6)
    assert close(output.text_embeds, expected.text_embeds, 1e-6)
    assert expected.logits_per_image.std(dim=1).min() > 0.01, "the texts of this test must differ for the model"


@every_family
@each_prediction
def test_embeddings_of_texts_say_the_same_as_the_texts(family, prediction):
    model, chosen = wrapped(family, prediction), some_coalitions()
    direct = run(model, **images(family), **tokens(family, TEXTS), coalitions=chosen)
    given = run(model, **images(family), text_embeds=embed_texts(model, TEXTS, processor(family)), coalitions=chosen)
    for field in (*FIELDS, "text_embeds", "coalition_values"):
        assert close(given[field], direct[field]), field


@every_family
@each_prediction
def test_a_text_given_later_gets_its_map_by_a_dot_product(family, prediction):
    model = wrapped(family, prediction)
    alone = run(model, **images(family))
    assert (alone.logits, alone.attributions, alone.null_values, alone.text_embeds) == (None,) * 4
    assert alone.logits_per_image is None
    assert alone.logits_per_text is None
    later = embed_texts(model, TEXTS, processor(family))  # (T, P)
    scale, bias = model.logit_scale.exp(), getattr(model, "logit_bias", torch.zeros(()))
    direct = run(model, **images(family), **tokens(family, TEXTS))
    assert close(scale * alone.embedding_attributions @ later.t(), direct.attributions)
    assert close(scale * alone.null_embeds @ later.t() + bias, direct.null_values)
    assert close(scale * alone.image_embeds @ later.t() + bias, direct.logits)
    assert hasattr(model, "logit_bias") == (family in SIGMOID)


@every_family
@each_prediction
def test_efficiency_holds_for_embeddings_and_for_texts(family, prediction):
    model = wrapped(family, prediction)
    output = run(model, **images(family), **tokens(family, TEXTS), coalitions=some_coalitions())
    embedded = output.null_embeds.double() + output.embedding_attributions.double().sum(1)
    gap = (embedded - output.image_embeds.double()).abs()
    assert (gap <= 1e-5 * output.image_embeds.double().abs().clamp(min=1)).all()
    total = output.null_values.double() + output.attributions.double().sum(1)
    assert ((total - output.logits.double()).abs() <= 1e-5 * output.logits.double().abs().clamp(min=1)).all()
    assert close(output.coalition_values[:, 0], output.null_values)
    assert close(output.coalition_values[:, -1], output.logits)
    if prediction == "classifier":
        assert close(output.image_embeds.norm(dim=1), torch.ones(3))


@each_prediction
def test_one_pass_of_the_vision_tower_serves_all_texts(prediction):
    model, passes = wrapped("clip", prediction), []
    hooks = [
        part.register_forward_hook(lambda module, *_: passes.append(type(module).__name__))
        for part in (model.vision_model, model.text_model)
    ]
    shown = explain(model, {**images("clip", 4)}, processor("clip"), texts=captions(50), batch_size=4)
    for hook in hooks:
        hook.remove()
    assert shown.attributions.shape == (4, 4, 4, 50)
    vision = [name for name in passes if "Vision" in name]
    # The classifier is asked once more, for the empty image.
    assert len(vision) == (1 if prediction == "vote" else 2)


def test_texts_can_be_left_to_a_tuple():
    model = wrapped("clip")
    named = run(model, **images(), **tokens("clip", TEXTS))
    for one, other in zip(
        run(model, **images(), **tokens("clip", TEXTS), return_dict=False), named.to_tuple(), strict=True
    ):
        assert torch.equal(one, other)


# -- values ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def values_by_hand(family, pixels, directions, present):
    """Similarities (M, T) of an image of which only the patches `present` (M, N) enter the encoder."""
    model, values = base(family), []
    vision = model.vision_model
    hidden = vision.embeddings(pixels, interpolate_pos_encoding=True)
    prefix = 1 if family == "clip" else 0
    hidden = vision.pre_layrnorm(hidden) if family == "clip" else hidden
    for chosen in present:
        kept = torch.cat([hidden[:, :prefix], hidden[:, prefix:][:, chosen]], dim=1)
        if family == "clip":
            last = vision.encoder(inputs_embeds=kept).last_hidden_state
            features = model.visual_projection(vision.post_layernorm(last[:, 0]))
        else:
            last = vision.encoder(inputs_embeds=kept).last_hidden_state if kept.shape[1] else kept.new_zeros(1, 1, 32)
            features = vision.head(vision.post_layernorm(last) if kept.shape[1] else last)
        bias = model.logit_bias if family == "siglip" else 0
        values.append(model.logit_scale.exp() * F.normalize(features, dim=-1) @ directions.t() + bias)
    return torch.cat(values)


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_values_are_the_bases_on_the_patches_left(family):
    model = wrapped(family, "classifier", tune="frozen")
    chosen = some_coalitions(count=8)
    chosen = chosen[:, chosen[0].any(dim=1) & chosen[1].any(dim=1) & chosen[2].any(dim=1)]
    directions = embed_texts(model, TEXTS, processor(family))
    output = run(model, **images(family), text_embeds=directions, coalitions=chosen)
    for index, pixels in enumerate(images(family)["pixel_values"]):
        expected = values_by_hand(family, pixels[None], directions, chosen[index])
        assert close(output.coalition_values[index], expected)


@pytest.mark.parametrize("family", ["clip", "metaclip2", "siglip", "chinese_clip", "altclip"])
@each_prediction
def test_the_exact_game_of_four_patches(family, prediction):
    model = wrapped(family, prediction)
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    directions = embed_texts(model, TEXTS[:3], processor(family))
    game = PatchGame(model, pixels, text_embeds=directions, interpolate_pos_encoding=True)
    assert game.players == 4
    truth = game.exact()  # (4, 3)
    assert close(truth.sum(0), (game.full_values - game.null_values).double())
    every = all_coalitions(4)
    values = run(
        model, pixel_values=pixels, coalitions=every[None], interpolate_pos_encoding=True, **tokens(family, TEXTS[:3])
    ).coalition_values[0]
    assert close(truth, exact_shapley_values(values))


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_the_exact_game_is_that_of_the_base(family):
    model = wrapped(family, "classifier", tune="frozen")
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    directions = embed_texts(model, TEXTS[:3], processor(family))
    game = PatchGame(model, pixels, text_embeds=directions, interpolate_pos_encoding=True)
    every = all_coalitions(4)
    by_hand = values_by_hand(family, pixels, directions, every)
    if family == "siglip":  # its pooling of nothing is a convention of ours
        by_hand[~every.any(dim=1)] = game.null_values
    assert close(game.exact(), exact_shapley_values(by_hand), 1e-4)


# -- loss ------------------------------------------------------------------------------------------------------------


@every_family
def test_the_loss_is_the_bases_where_captions_differ(family):
    inputs = {**images(family, 6), **tokens(family, TEXTS), "return_loss": True}
    expected = run(base(family), **inputs).loss
    assert close(run(wrapped(family, "classifier", tune="frozen"), **inputs).loss, expected)


@every_family
def test_equal_captions_are_matches_of_each_others_images(family):
    twice = [*TEXTS[:3], *TEXTS[:3]]
    inputs = {**images(family, 6), **tokens(family, twice), "return_loss": True}
    output = run(wrapped(family, "classifier", tune="frozen"), **inputs)
    rule = pairwise_sigmoid_loss if family in SIGMOID else contrastive_loss
    same = torch.eye(3, dtype=torch.bool).repeat(2, 2)
    assert close(output.loss, rule(output.logits, same))


# -- bad input -------------------------------------------------------------------------------------------------------


@every_family
def test_token_ids_that_do_not_fit_are_refused(family):
    limit = 14 if family == "altclip" else 16
    with pytest.raises(ShapleyError, match=rf"{limit + 1} tokens is longer than the {limit}.*max_length={limit}"):
        run(wrapped(family), **images(family), input_ids=torch.full((1, limit + 1), 5))
    run(wrapped(family), **images(family), input_ids=torch.full((1, limit), 5))


def test_texts_and_embeddings_of_texts_at_once_are_refused():
    model = wrapped("clip")
    with pytest.raises(ValueError, match="not both"):
        run(model, **images(), **tokens("clip", TEXTS), text_embeds=torch.zeros(1, 24))


def test_the_loss_needs_a_text_for_each_image():
    model = wrapped("clip")
    with pytest.raises(ShapleyError, match=r"one text for each image.*\(3, 6\)"):
        run(model, **images(), **tokens("clip", TEXTS), return_loss=True)
    with pytest.raises(ShapleyError, match="one text for each image"):
        run(model, **images(), text_embeds=torch.eye(3, 24), return_loss=True)


@each_prediction
def test_images_that_do_not_fit_are_refused(prediction):
    model, ids = wrapped("clip", prediction), tokens("clip", TEXTS)
    for size in ((4, 4), (8, 8)):
        with pytest.raises(ImageError, match="at least two players"):
            run(model, pixel_values=torch.zeros(1, 3, *size), **ids)
    with pytest.raises(ImageError, match="3, height, width"):
        run(model, pixel_values=torch.zeros(1, 1, 32, 32), **ids)
    with pytest.raises(ImageError, match="NoneType"):
        run(model, **ids)
    with pytest.raises(TypeError, match="by keyword"):
        run(model, ids["input_ids"], images()["pixel_values"])
    with pytest.raises(ImageError, match=r"\(2, M, 16\) for 2 images"):
        run(model, **images(count=2), **ids, coalitions=some_coalitions(3))
    run(model, **images(), **ids)  # nothing of a refused call is left


def test_patches_of_several_grids_are_refused():
    model, inputs = wrapped("siglip2"), images("siglip2", 2)
    mixed = {**inputs, "spatial_shapes": torch.tensor([[4, 4], [2, 8]])}
    with pytest.raises(ImageError, match=r"\[\(2, 8\), \(4, 4\)\].*different batches"):
        run(model, **mixed, **tokens("siglip2", TEXTS))
    with pytest.raises(ImageError, match="without spatial_shapes"):
        run(model, pixel_values=inputs["pixel_values"])
