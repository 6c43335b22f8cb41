"""Models whose weights accelerate keeps elsewhere: the numbers of the model that is not offloaded, or one sentence."""

import copy

import families
import pytest
import torch
from accelerate import cpu_offload, disk_offload
from peft import get_peft_model

from shapadapter import (
    PatchGame,
    ShapleyConfig,
    ShapleyError,
    ShapleyTrainer,
    ShapleyTrainingArguments,
    attribute,
    explain,
)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = get_peft_model(families.MAKERS["vit"](), ShapleyConfig()).eval()
    families.randomise(model)
    return model


def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))


@pytest.fixture(params=["cpu", "disk"])
def offloaded(request, model, tmp_path):
    other = copy.deepcopy(model)
    if request.param == "cpu":
        cpu_offload(other, execution_device="cpu")
    else:
        disk_offload(other, str(tmp_path / "offload"), execution_device="cpu")
    assert all(parameter.is_meta for parameter in other.parameters())
    return other


def test_the_numbers_are_those_of_the_model_that_is_not_offloaded(model, offloaded):
    coalitions = torch.rand(2, 4, 16, generator=torch.Generator().manual_seed(1)) < 0.5
    with torch.no_grad():
        expected, found = (each(images(), coalitions=coalitions) for each in (model, offloaded))
    for name in ("logits", "attributions", "null_values", "coalition_values"):
        assert torch.equal(expected[name], found[name]), name
    assert torch.equal(
        explain(model, images(), refine=16).attributions, explain(offloaded, images(), refine=16).attributions
    )
    for method in ("attention", "leave_one_out", "grad_cam"):
        expected, found = (attribute(each, images(), method=method).attributions for each in (model, offloaded))
        assert torch.allclose(expected, found, atol=1e-6), method
    game = PatchGame(offloaded, images()[0])
    assert torch.equal(game.full_values, PatchGame(model, images()[0]).full_values)


def test_an_offloaded_model_is_explained_in_training_mode_as_it_was_left(model, offloaded):
    expected = explain(model, images()).logits
    assert torch.equal(explain(offloaded.train(), images()).logits, expected)


def test_it_is_not_trained(offloaded, tmp_path):
    rows = [{"pixel_values": image, "labels": 0} for image in images()]
    args = ShapleyTrainingArguments(tmp_path / "out", use_cpu=True, report_to="none", max_steps=1, card_images=0)
    with pytest.raises(ShapleyError, match="offload"):
        ShapleyTrainer(offloaded, args, train_dataset=rows).train()


def test_it_is_not_saved(offloaded, tmp_path):
    with pytest.raises(ShapleyError, match="offload"):
        offloaded.save_pretrained(tmp_path / "adapter")
