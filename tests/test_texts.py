"""Texts as people have them: how they are prepared, and explained images for any of them."""

import warnings

import families
import numpy as np
import pytest
import torch
from matching import SIGMOID, base, images, pictures, processor, tokens, wrapped
from texts import LENGTHS, TEXT_FAMILIES, captions

from shapadapter import Explanation, ImageError, ShapleyError, explain
from shapadapter.core.errors import ClassNotFoundError
from shapadapter.data.collator import TextRules, prepare_texts, text_rules
from shapadapter.explanation.passes import embed_texts

every_family = pytest.mark.parametrize("family", TEXT_FAMILIES)
each_prediction = pytest.mark.parametrize("prediction", ["vote", "classifier"])
TEXTS = captions(4)
LONG = "the digit five in the upper left corner of a large black image with a white number"  # 17 words


def near(one, other, tolerance=1e-5):
    return torch.allclose(one, other, atol=tolerance)


# -- explain ---------------------------------------------------------------------------------------------------------


@every_family
@each_prediction
def test_texts_take_the_place_of_classes(family, prediction):
    model = wrapped(family, prediction)
    shown = explain(model, pictures(), processor(family), texts=TEXTS)
    assert isinstance(shown, Explanation)
    assert shown.labels == tuple(TEXTS)
    assert shown.attributions.shape == (3, 4, 4, 4)
    assert (shown.efficiency_gap < 1e-5 * shown.logits.abs().amax(1).clamp(min=1)).all()
    assert torch.equal(shown.images, torch.stack([torch.from_numpy(np.array(picture)) for picture in pictures()]))
    with torch.no_grad():
        output = model(**images(family), **tokens(family, TEXTS))
    assert near(shown.logits, output.logits)
    assert near(shown.attributions.flatten(1, 2), output.attributions)
    likely = shown.logits.sigmoid() if family in SIGMOID else shown.logits.softmax(dim=1)
    assert torch.equal(shown.probabilities, likely)


@every_family
def test_what_a_text_gets_does_not_hang_on_the_texts_beside_it(family):
    model, mixed = wrapped(family), [captions(20)[15], *TEXTS]
    together = explain(model, pictures(), processor(family), texts=mixed)
    for place, text in enumerate(mixed):
        alone = explain(model, pictures(), processor(family), texts=text)
        assert alone.labels == (text,)
        assert near(alone.logits[:, 0], together.logits[:, place])
        assert near(alone.attributions[..., 0], together.for_label(place))


def test_maps_of_some_texts():
    model = wrapped()
    every = explain(model, pictures(), processor(), texts=TEXTS)
    best = explain(model, pictures(), processor(), texts=TEXTS, top_k=2)
    assert torch.equal(best.classes, every.logits.topk(2).indices)
    assert best.attributions.shape == (3, 4, 4, 2)
    assert explain(model, pictures(), processor(), texts=TEXTS, top_k=99).attributions.shape[-1] == 4
    chosen = explain(model, pictures(), processor(), texts=TEXTS, targets=[TEXTS[2], 0])
    assert chosen.classes.tolist() == [[2, 0]] * 3
    assert near(chosen.for_label(TEXTS[2]), every.attributions[..., 2])
    with pytest.raises(ClassNotFoundError, match=r"a photo of a \w+"):
        explain(model, pictures(), processor(), texts=TEXTS, targets="a photo of a onne")
    with pytest.raises(ClassNotFoundError, match=r"ids \[0, 1\]"):
        explain(model, pictures(), processor(), texts=[TEXTS[0]] * 2, targets=TEXTS[0])


def test_pictures_and_pages_of_texts(tmp_path):
    hostile = "<b>a digit</b>\n & ten others"
    shown = explain(wrapped(), pictures(2), processor(), texts=[*TEXTS, hostile])
    assert shown.heatmap(TEXTS[1]).shape == (32, 32)
    words = [text.get_text() for text in shown.figure(0, labels=[1]).findobj(lambda part: hasattr(part, "get_text"))]
    assert TEXTS[1] in " ".join(words).replace("\n", " ")
    page = shown.save_html(tmp_path / "page.html").read_text()
    assert TEXTS[0] in page
    assert "<b>a digit" not in page
    shown.save(tmp_path / "saved")
    assert Explanation.load(tmp_path / "saved").labels == (*TEXTS, hostile)
    assert [best[0].label for best in shown.top(1)] == [shown.labels[index] for index in shown.logits.argmax(1)]


def test_prepared_images_need_only_the_tokenizer():
    model = wrapped("clip")
    expected = explain(model, pictures(), processor(), texts=TEXTS)
    for given in (processor(), processor().tokenizer):
        shown = explain(model, images(), given, texts=TEXTS, batch_size=2)
        assert near(shown.attributions, expected.attributions)


@every_family
def test_embeddings_of_texts_are_directions(family):
    model = wrapped(family).train()
    modes = [module.training for module in model.modules()]
    directions = embed_texts(model, TEXTS, processor(family))
    assert [module.training for module in model.modules()] == modes
    assert near(directions.norm(dim=1), torch.ones(4))
    assert not directions.requires_grad
    plain = base(family)
    assert near(embed_texts(plain, TEXTS, processor(family)), directions)  # of a bare model as well


# -- prepare_texts ---------------------------------------------------------------------------------------------------


@every_family
def test_the_rules_of_each_family(family):
    rules = text_rules(base(family))
    assert rules == TextRules(LENGTHS[family], padded=family in SIGMOID)
    assert text_rules(wrapped(family)) == rules
    encoded = prepare_texts(["a one", captions(20)[15]], processor(family), rules)
    ids = encoded["input_ids"]
    if family in SIGMOID:
        assert ids.shape == (2, 16)
        assert set(encoded) == {"input_ids"}  # it was trained to read the padding
        assert ids[0, -1] == processor(family).tokenizer.pad_token_id
    else:
        assert ids.shape == (2, 10)
        assert encoded["attention_mask"].sum(dim=1).tolist() == [4, 10]
    assert ("token_type_ids" in encoded) == (family == "chinese_clip")


@every_family
def test_neither_order_nor_company_changes_an_embedding(family):
    model = wrapped(family)
    mixed = [captions(20)[15], "a one", "six", *captions(3)]
    together = embed_texts(model, mixed, processor(family))
    assert near(embed_texts(model, mixed[::-1], processor(family)).flip(0), together)
    for text, embedded in zip(mixed, together, strict=True):
        assert near(embed_texts(model, [text], processor(family))[0], embedded)


@every_family
def test_a_text_as_long_as_the_model_takes_and_one_that_is_longer(family):
    model, rules = wrapped(family), text_rules(base(family))
    tokenizer = processor(family).tokenizer
    extra = len(tokenizer("")["input_ids"])
    fits = "".join(tokenizer.decode([5]) + " " for _ in range(rules.limit - extra)).strip()
    while len(tokenizer(fits)["input_ids"]) > rules.limit:
        fits = fits[:-1]
    while len(tokenizer(f"{fits} one")["input_ids"]) <= rules.limit:
        fits = f"{fits} one"
    explain(model, pictures(1), processor(family), texts=fits)
    longer = f"{fits} one one one"
    length = len(tokenizer(longer)["input_ids"])
    message = rf"{longer[:40]}.* has {length} tokens, the model takes {rules.limit}"
    with pytest.raises(ShapleyError, match=message):
        explain(model, pictures(1), processor(family), texts=["a one", longer])
    cut = prepare_texts([longer], processor(family), rules, truncate=True)
    assert cut["input_ids"].shape == (1, rules.limit)
    assert tokenizer.eos_token_id in cut["input_ids"][0]


def test_a_long_text_is_named_in_short():
    with pytest.raises(ShapleyError) as caught:
        prepare_texts([LONG], processor(), TextRules(16))
    assert f"{LONG[:57]}..." in str(caught.value)
    assert LONG not in str(caught.value)
    assert "19 tokens" in str(caught.value)
    assert prepare_texts([LONG], processor(), TextRules())["input_ids"].shape == (1, 19)  # no limit is known


# -- bad input -------------------------------------------------------------------------------------------------------


def test_what_is_missing_is_said():
    model = wrapped()
    with pytest.raises(ShapleyError, match=r"texts=\[\.\.\.\]"):
        explain(model, pictures(), processor())
    for without in (processor().image_processor, None):
        with pytest.raises(ShapleyError, match=r"need a tokenizer.*AutoProcessor"):
            explain(model, images(), without, texts=TEXTS)
    with pytest.raises(ShapleyError, match="need a tokenizer"):
        explain(model, pictures(), processor().image_processor, texts=TEXTS)
    for nothing in ([], (), [None], [TEXTS]):
        with pytest.raises(ShapleyError, match="at least one text"):
            explain(model, pictures(), processor(), texts=nothing)


def test_a_classifier_has_no_use_for_texts():
    with pytest.raises(ShapleyError, match="ViTForImageClassification does not match"):
        explain(families.wrap("vit"), families.images(), texts=TEXTS)


def test_images_that_do_not_fit():
    model = wrapped()
    for nothing in ({"pixel_values": torch.zeros(0, 3, 32, 32)}, {"pixel_values": None}):
        with pytest.raises(ImageError, match="at least one image"):
            explain(model, nothing, processor(), texts=TEXTS)
    with pytest.raises(ImageError, match="a path, an array or a tensor, got int"):
        explain(model, {"image": 1}, processor(), texts=TEXTS)  # a row
    with pytest.raises(ImageError, match="at least two players"):
        explain(model, {"pixel_values": torch.zeros(2, 3, 8, 8)}, processor(), texts=TEXTS)
    with pytest.raises(ImageError, match="at least one"):
        explain(model, [], processor(), texts=TEXTS)
    with pytest.raises(ImageError, match="Cannot read"):
        explain(model, "nowhere.png", processor(), texts=TEXTS)


def test_pictures_of_several_sizes_are_made_one():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shown = explain(wrapped(), [*pictures(1, 40), *pictures(1, 64)], processor(), texts=TEXTS)
    assert shown.images.shape == (2, 32, 32, 3)


# -- NaFlex ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def naflex_model():
    import zoo

    return families.wrap(zoo.base("siglip2"), "classifier")


def oblong(rows, cols, seed=0):
    """A picture of rows x cols patches that the image processor leaves as it is."""
    from PIL import Image

    noise = np.random.default_rng(seed).integers(0, 256, (rows * 8, cols * 8, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def test_a_classifier_of_patches_explains_pictures(naflex_model):
    image_processor = processor("siglip2").image_processor
    shown = explain(naflex_model, pictures(), image_processor)
    assert shown.attributions.shape == (3, 4, 4, families.CLASSES)
    assert torch.equal(shown.images, torch.stack([torch.from_numpy(np.array(picture)) for picture in pictures()]))
    prepared = image_processor(pictures(), return_tensors="pt")
    again = explain(naflex_model, prepared, image_processor, batch_size=2)
    assert near(again.attributions, shown.attributions)
    assert torch.equal(again.images, shown.images)
    assert explain(naflex_model, prepared).images.shape == (3, 32, 32, 3)


def test_pictures_of_any_shape_are_put_together_again(naflex_model):
    image_processor = processor("siglip2").image_processor
    for rows, cols in ((2, 8), (8, 2), (3, 5)):
        picture = oblong(rows, cols)
        shown = explain(naflex_model, picture, image_processor)
        assert shown.attributions.shape[1:3] == image_grid(image_processor, picture)
        if rows * cols == 16:
            assert torch.equal(shown.images[0], torch.from_numpy(np.array(picture)))
            assert shown.attributions.shape[1:3] == (rows, cols)


def image_grid(image_processor, picture):
    return tuple(image_processor([picture], return_tensors="pt")["spatial_shapes"][0].tolist())


def test_pictures_of_different_grids_are_not_mixed(naflex_model):
    image_processor = processor("siglip2").image_processor
    mixed = [oblong(2, 8), oblong(8, 2)]
    with pytest.raises(ImageError, match=r"\(2, 8\), \(8, 2\)"):
        explain(naflex_model, mixed, image_processor)
    with pytest.raises(ImageError, match="separately"):
        explain(naflex_model, mixed, image_processor, batch_size=1)
    with pytest.raises(ImageError, match="spatial_shapes"):
        explain(naflex_model, torch.zeros(2, 3, 32, 32))
