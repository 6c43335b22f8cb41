"""Misspelled arguments are refused: models of transformers take any name and ignore it."""

import families
import matching
import pytest
import zoo
from families import images, wrap

from shapadapter import attribute, explain


@pytest.fixture(scope="module")
def model():
    return wrap("vit")


@pytest.mark.parametrize(
    ("function", "wrong", "hint"),
    [
        (explain, {"refin": 4}, "'refin'. Did you mean 'refine'"),
        (explain, {"refine": "until", "max_evaluations": 128}, "relative_error, max_refine, seed"),
        (explain, {"interpolate_pos_encodings": True}, "mean 'interpolate_pos_encoding'"),
        (explain, {"text_embeds": 3}, "ViTForImageClassification has an argument 'text_embeds'"),
        (attribute, {"evalutions": 64}, "Did you mean 'evaluations'"),
        (attribute, {"refine": 64}, "method='refined'"),
        (attribute, {"method": "refined", "max_refine": 64}, "Neither attribute nor ViT"),
    ],
)
def test_a_name_that_nobody_knows(model, function, wrong, hint):
    with pytest.raises(TypeError, match=hint):
        function(model, images(), **wrong)


@pytest.mark.parametrize("option", ["output_attentions", "output_hidden_states", "interpolate_pos_encoding"])
@pytest.mark.parametrize("family", ["vit", "dinov2", "clip", "siglip2"])
def test_names_that_models_hand_on(family, option):
    if family in zoo.ZOO and family not in families.FAMILIES:
        explain(wrap(zoo.base(family)), zoo.inputs(family), top_k=1, **{option: True})
    else:
        explain(wrap(family), images(), top_k=1, **{option: True})


@pytest.mark.filterwarnings("ignore")
def test_names_of_texts():
    model, processor = matching.wrapped("clip"), matching.processor("clip")
    arguments = {"texts": ["a cat", "a dog"], "interpolate_pos_encoding": True}
    explain(model, matching.pictures(1), processor, **arguments)
    with pytest.raises(TypeError, match="Did you mean 'texts'"):
        explain(model, matching.pictures(1), processor, text=["a cat"])
