"""Recall of texts by images, and of images by texts, while the patches that matter are taken away."""

import json

import families
import pytest
import torch
from matching import base, images, pictures, processor, tokens, wrapped
from texts import TEXT_FAMILIES, captions
from torch import nn

from shapadapter import ImageError, ShapleyError, retrieval_after_deletion
from shapadapter.evaluation.retrieval import recall_at_k
from shapadapter.explanation.passes import embed_texts

TEXTS = captions(6)
COLOURS = ((1.0, -1.0, -1.0), (-1.0, 1.0, -1.0), (-1.0, -1.0, 1.0), (1.0, 1.0, -1.0))


# -- a model whose every image says its text with a single patch --------------------------------------------------------


def spots(places, colours):
    """Grey images (B, 3, 32, 32) with one coloured patch each."""
    pixels = torch.zeros(len(places), 3, 4, 8, 4, 8)
    for index, (place, colour) in enumerate(zip(places, colours, strict=True)):
        pixels[index, :, place // 4, :, place % 4] = torch.tensor(COLOURS[colour])[:, None, None]
    return pixels.reshape(-1, 3, 32, 32)


@torch.no_grad()
def one_patch_model():
    """A CLIP whose patches do not see each other: the features of a colour vote for its text, grey for nothing."""
    plain = base("clip")
    for layer in plain.vision_model.encoder.layers:
        nn.init.zeros_(layer.self_attn.out_proj.weight)
        nn.init.zeros_(layer.self_attn.out_proj.bias)
    nn.init.zeros_(plain.vision_model.embeddings.position_embedding.weight)
    model = families.wrap(plain, "vote", trained=False)
    head = families.shapley(model).head("default")
    pixels = spots([0, 0, 0, 0], range(4))
    last = model.vision_model.encoder(
        inputs_embeds=model.vision_model.pre_layrnorm(model.vision_model.embeddings(pixels))
    ).last_hidden_state[:, 1:]
    normed = head.norm(torch.cat([last[:, 0], last[:1, 1]]))  # (5, D): the four colours, and grey
    directions = embed_texts(model, TEXTS[:4], processor())
    wanted = torch.cat([16 * directions, torch.zeros(1, 24)])  # (5, P)
    head.vote.weight.copy_(torch.linalg.lstsq(normed.double(), wanted.double()).solution.t())
    return model


@pytest.fixture(scope="module")
def faithful():
    model = one_patch_model()
    places, colours = torch.tensor([0, 5, 10, 15, 3, 12, 6, 9]), [0, 1, 2, 3] * 2
    prepared = {"pixel_values": spots(places, colours)}
    return model, prepared, [TEXTS[colour] for colour in colours], places


def test_the_constructed_model_is_what_it_is_meant_to_be(faithful):
    model, prepared, _, places = faithful
    with torch.no_grad():
        output = model(**prepared, text_embeds=embed_texts(model, TEXTS[:4], processor()))
    attributions = output.attributions[torch.arange(8), :, [0, 1, 2, 3] * 2]  # (B, N)
    assert torch.equal(attributions.argmax(dim=1), places)
    others = attributions.scatter(1, places[:, None], 0.0)
    assert others.abs().max() < 1e-2 * attributions.amax()


def test_without_the_patch_that_says_it_nothing_is_found(faithful):
    model, prepared, texts, _ = faithful
    found = retrieval_after_deletion(
        model, prepared, texts, processor(), deleted=(0.0, 1 / 16, 0.5, 15 / 16, 1.0), ks=(1, 2)
    )
    assert found.pairs == 8
    assert (found.recall(0.0, "top", 1).image_to_text, found.recall(0.0, "top", 1).text_to_image) == (1, 1)
    # What is left of every image is the same grey.
    assert found.recall(1 / 16, "top", 1).image_to_text <= 0.25
    for share in (1 / 16, 0.5, 15 / 16):
        assert found.recall(share, "bottom", 1).image_to_text == 1
        assert found.recall(share, "bottom", 1).text_to_image == 1
    half = [found.recall(0.5, order, 1).image_to_text for order in ("top", "random", "bottom")]
    assert half == sorted(half)
    assert half[0] < half[1] < half[2]
    for order in ("top", "random", "bottom"):  # nothing is left, so all images tie
        assert found.recall(1.0, order, 1).text_to_image == 0


def test_the_random_order_is_the_share_of_patches_that_stay(faithful):
    model, prepared, texts, _ = faithful
    mean = torch.tensor(
        [
            retrieval_after_deletion(model, prepared, texts, processor(), deleted=(0.5,), ks=(1,), seed=seed)
            .recall(0.5, "random", 1)
            .image_to_text
            for seed in range(12)
        ]
    ).mean()
    assert 0.5 < mean < 0.8  # half keep their patch, and of the rest a few are lucky


# -- bookkeeping -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", TEXT_FAMILIES)
@pytest.mark.parametrize("prediction", ["vote", "classifier"])
def test_retrieval_of_every_family(family, prediction):
    model, texts = wrapped(family, prediction), captions(6)
    found = retrieval_after_deletion(model, pictures(6), texts, processor(family), deleted=(0.0, 0.5), ks=(1, 3))
    assert [(row.deleted, row.order, row.k) for row in found.rows] == [
        (0.0, "none", 1),
        (0.0, "none", 3),
        *((0.5, order, k) for order in ("top", "random", "bottom") for k in (1, 3)),
    ]
    with torch.no_grad():
        logits = model(**images(family, 6), **tokens(family, texts)).logits
    for k in (1, 3):
        row = found.recall(0, "bottom", k)
        assert row.image_to_text == pytest.approx(recall_at_k(logits, k).item())
        assert row.text_to_image == pytest.approx(recall_at_k(logits.t(), k).item())


class Watch:
    """What a model is asked and what it answers."""

    def __init__(self, model):
        self.asked, self.answers = [], []
        model.register_forward_hook(self.note, with_kwargs=True)

    def note(self, module, args, kwargs, output):
        self.asked.append(kwargs)
        self.answers.append(output)


def test_which_patches_are_taken_away():
    model = wrapped("clip")
    watch = Watch(model)
    shares = (0.0, 0.2, 0.5, 1.0)
    retrieval_after_deletion(model, pictures(5), TEXTS[:5], processor(), deleted=shares, ks=(1,))
    own = watch.answers[0].attributions[torch.arange(5), :, torch.arange(5)]  # (B, N)
    present = watch.asked[1]["coalitions"]  # (B, M, N)
    conditions = [(0.0, "top"), *((s, o) for s in shares[1:] for o in ("top", "random", "bottom"))]
    assert present.shape == (5, len(conditions), 16)
    for (share, order), chosen in zip(conditions, present.unbind(1), strict=True):
        count = round(share * 16)
        assert ((~chosen).sum(dim=1) == count).all()
        if order == "random" or not 0 < count < 16:
            continue
        gone, left = own.where(~chosen, torch.nan), own.where(chosen, torch.nan)
        for one, other in zip(gone, left, strict=True):
            one, other = one[~one.isnan()], other[~other.isnan()]
            assert one.min() >= other.max() if order == "top" else one.max() <= other.min()
    randoms = present[:, 2]
    assert len({tuple(row) for row in randoms.int().tolist()}) > 1, "each image has an order of its own"
    assert (present[:, 5] <= present[:, 2]).all(), "what is gone at 20 % is gone at 50 %"


def test_the_seed_and_the_batches():
    model = wrapped("clip")

    def rows(batch_size=32, seed=0):
        return retrieval_after_deletion(
            model, pictures(6), TEXTS, processor(), deleted=(0.3, 0.6), ks=(1, 2), batch_size=batch_size, seed=seed
        ).rows

    assert rows() == rows() == rows(batch_size=2) == rows(batch_size=5)
    assert any(rows(seed=seed) != rows() for seed in range(1, 4))


def test_a_rows_own_text_is_what_counts():
    model = wrapped("clip")
    order = [3, 1, 4, 0, 5, 2]
    prepared = images("clip", 6)["pixel_values"]
    one = retrieval_after_deletion(model, {"pixel_values": prepared}, TEXTS, processor(), deleted=(0, 0.5), ks=(1,))
    other = retrieval_after_deletion(
        model,
        {"pixel_values": prepared[order]},
        [TEXTS[place] for place in order],
        processor(),
        deleted=(0, 0.5),
        ks=(1,),
    )
    for name in ("none", "top", "bottom"):
        rows = [[row for row in found.rows if row.order == name] for found in (one, other)]
        assert rows[0] == rows[1]


def test_equal_texts_are_matches_of_each_others_images(faithful):
    model, prepared, texts, _ = faithful
    assert len(set(texts)) == 4
    both = retrieval_after_deletion(model, prepared, texts, processor(), deleted=(0.0,), ks=(1,)).rows[0]
    assert (both.image_to_text, both.text_to_image) == (1, 1)
    same = retrieval_after_deletion(model, prepared, ["six"] * 8, processor(), deleted=(0.5,), ks=(1,))
    assert {row.image_to_text for row in same.rows} == {row.text_to_image for row in same.rows} == {1.0}


def test_ties_earn_nothing():
    model = wrapped("clip")
    grey = {"pixel_values": torch.zeros(4, 3, 32, 32)}
    found = retrieval_after_deletion(model, grey, TEXTS[:4], processor(), deleted=(0.0,), ks=(1, 4))
    assert found.recall(0, "top", 1).text_to_image == 0
    assert found.recall(0, "top", 4).text_to_image == 1


def test_the_table_and_the_plain_numbers():
    found = retrieval_after_deletion(wrapped(), pictures(4), TEXTS[:4], processor(), deleted=(0.0, 0.25), ks=(1,))
    lines = found.table().splitlines()
    assert lines[0].split() == ["deleted", "order", "k", "image", "to", "text", "text", "to", "image"]
    assert [line.split()[:3] for line in lines[1:]] == [
        ["0%", "none", "1"],
        ["25%", "top", "1"],
        ["25%", "random", "1"],
        ["25%", "bottom", "1"],
    ]
    assert len({len(line) for line in lines}) == 1
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["pairs"] == 4
    assert [row["order"] for row in plain["rows"]] == ["none", "top", "random", "bottom"]
    with pytest.raises(KeyError, match=r"deleted=0\.5"):
        found.recall(0.5, "top", 1)
    with pytest.raises(KeyError, match="k=7"):
        found.recall(0.0, "top", 7)


def test_images_of_every_kind(tmp_path):
    model = wrapped()
    pictures(2)[0].save(tmp_path / "one.png")
    expected = retrieval_after_deletion(model, pictures(2)[0], TEXTS[0], processor(), ks=(1,))
    assert expected.pairs == 1
    path = tmp_path / "one.png"
    for one in ([pictures(2)[0]], path, str(path)):
        assert retrieval_after_deletion(model, one, [TEXTS[0]], processor(), ks=(1,)) == expected


def test_the_model_is_left_as_it_was():
    model = wrapped("clip").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    retrieval_after_deletion(model, pictures(2), TEXTS[:2], processor())
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# -- bad input -------------------------------------------------------------------------------------------------------


def test_what_is_refused():
    model = wrapped()
    with pytest.raises(ShapleyError, match="3 images and 2 texts"):
        retrieval_after_deletion(model, pictures(3), TEXTS[:2], processor())
    with pytest.raises(ShapleyError, match="1 images and 2 texts"):
        retrieval_after_deletion(model, pictures(1)[0], TEXTS[:2], processor())
    with pytest.raises(ImageError, match="at least one"):
        retrieval_after_deletion(model, [], [], processor())
    with pytest.raises(ShapleyError, match="ViTForImageClassification does not match"):
        retrieval_after_deletion(families.wrap("vit"), pictures(1), ["one"], processor())
    with pytest.raises(ShapleyError, match="get_peft_model"):
        retrieval_after_deletion(base(), pictures(1), ["one"], processor())
    with pytest.raises(ShapleyError, match="tokenizer"):
        retrieval_after_deletion(model, pictures(1), ["one"], processor().image_processor)
    for bad in ({"deleted": (1.5,)}, {"deleted": (-0.1,)}, {"deleted": ()}, {"ks": (0,)}, {"ks": ()}):
        with pytest.raises(ValueError, match="shares from 0 to 1 and k of at least 1"):
            retrieval_after_deletion(model, pictures(1), ["one"], processor(), **bad)
