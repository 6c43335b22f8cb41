"""What explaining costs, and the model that has forgotten everything."""

import time

import pytest
import torch
from small import bare, wrapped

from shapadapter.evaluation.cost import base_alone, compare, peak_memory_of, with_merged_lora
from shapadapter.evaluation.measure import stability, with_random_parameters

PIXELS = torch.randn(2, 3, 24, 24)


def test_a_random_model_has_the_spread_of_the_first_and_nothing_else():
    model = wrapped()
    before = {name: value.clone() for name, value in model.named_parameters()}
    other = with_random_parameters(model, seed=3)
    for name, parameter in other.named_parameters():
        assert torch.equal(dict(model.named_parameters())[name], before[name])
        if parameter.numel() > 100:
            assert parameter.std().item() == pytest.approx(before[name].std().item(), rel=0.3), name
            assert abs(torch.corrcoef(torch.stack([parameter.flatten(), before[name].flatten()]))[0, 1]) < 0.3, name
    with torch.no_grad():
        assert not torch.allclose(other(PIXELS).logits, model(PIXELS).logits)
        assert torch.equal(with_random_parameters(model, seed=3)(PIXELS).logits, other(PIXELS).logits)


def test_stability_is_a_ratio_of_relative_changes():
    maps, logits = torch.ones(1, 2, 4), torch.tensor([[3.0, 4.0]])
    found = stability(maps, maps * torch.tensor([1.5, 1.0])[:, None], logits, torch.tensor([[3.0, 5.0]]))
    assert found["noise_change"].tolist() == [[0.5, 0.0]]
    assert found["noise_ratio"].tolist() == [[pytest.approx(2.5), 0.0]]


def test_the_base_alone_is_the_base():
    with torch.no_grad():
        assert torch.equal(base_alone(wrapped())(PIXELS).logits, bare()(PIXELS).logits)
        model = wrapped()
        torch.testing.assert_close(with_merged_lora(model)(PIXELS).logits, model(PIXELS).logits)
        assert not any(
            module.merged
            for module in model.modules()
            if type(module).__name__ == "Linear" and hasattr(module, "merged")
        )


def test_time_and_memory_are_ratios():
    def small():
        time.sleep(0.002)
        torch.zeros(1000).add(1)

    def large():
        time.sleep(0.006)
        torch.zeros(4000).add(1)

    found = compare(small, large)
    assert 1.5 < found["time"].mean < 4.5
    if not torch.cuda.is_available():
        assert found["memory"].mean == pytest.approx(4, rel=0.1)
        assert peak_memory_of(small) == pytest.approx(8000, rel=0.1)
