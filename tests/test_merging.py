"""Merging LoRA where that is not the same function is refused."""

import pytest
import torch
import zoo
from families import wrap

from shapadapter import ShapleyError


def test_weight_standardised_convolutions_are_not_merged():
    model = wrap(zoo.base("bit"), "classifier")
    with torch.no_grad():
        before = model(**zoo.inputs("bit")).logits
    with pytest.raises(ShapleyError, match="WeightStandardizedConv2d"):
        model.merge_adapter()
    with pytest.raises(ShapleyError, match="WeightStandardizedConv2d"):
        model.merge_and_unload()
    with torch.no_grad():
        assert torch.equal(model(**zoo.inputs("bit")).logits, before)


@pytest.mark.parametrize("name", ["resnet", "swin"])
def test_others_are_merged_and_taken_back(name):
    model = wrap(zoo.base(name), "classifier")
    with torch.no_grad():
        before = model(**zoo.inputs(name)).logits
        model.merge_adapter()
        merged = model(**zoo.inputs(name))
        model.unmerge_adapter()
        after = model(**zoo.inputs(name)).logits
    assert torch.allclose(merged.logits, before, atol=1e-4)
    assert torch.allclose(merged.null_values + merged.attributions.sum(1), merged.logits, atol=1e-4)
    assert torch.allclose(after, before, atol=1e-4)
