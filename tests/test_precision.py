"""Half precision, by autocast and in the base's weights: what must stay exact, and what may be rounded."""

import contextlib

import families
import matching
import numpy as np
import pytest
import texts
import torch
import zoo
from test_trainer import gap, history, tiny_vit, trained, trainer_of, wrapped

from shapadapter import explain
from shapadapter.core.shapley import sample_pairs, shapley_loss_of_sums

FAMILIES = ("vit", "clip", "swin", "resnet")
PREDICTIONS = ("vote", "classifier")
LABELS = torch.tensor([0, 1])

every_family = pytest.mark.parametrize(("family", "prediction"), list(zip(FAMILIES, 2 * PREDICTIONS, strict=True)))
two_ways = pytest.mark.parametrize(("half", "way"), [(torch.bfloat16, "autocast"), (torch.float16, "weights")])


def base(family):
    return families.base(family) if family in families.MAKERS else zoo.base(family)


def pixels_of(family):
    return families.images() if family in families.MAKERS else zoo.inputs(family)["pixel_values"]


def in_half(family, prediction, half, way):
    """A wrapped model, what its calls stand in, and its images: rounded on the way, or rounded for good."""
    pixels = pixels_of(family)
    if way == "autocast":
        return families.wrap(base(family), prediction), lambda: torch.autocast("cpu", half), pixels
    return families.wrap(base(family).to(half), prediction), contextlib.nullcontext, pixels.to(half)


def pairs_of(model, pixels):
    players = families.shapley(model).tiling(pixels).count
    return sample_pairs(len(pixels), players, 2, torch.Generator().manual_seed(0))


def off(one, other):
    return ((one.float() - other.float()).norm() / other.float().norm()).item()


@every_family
@pytest.mark.parametrize(
    ("half", "way"),
    [
        (torch.bfloat16, "autocast"),
        (torch.float16, "weights"),
        pytest.param(torch.float16, "autocast", marks=pytest.mark.families),
    ],
)
@torch.no_grad()
def test_attributions_add_up_exactly_and_removed_players_have_no_influence(family, prediction, half, way):
    model, precision, pixels = in_half(family, prediction, half, way)
    chosen = pairs_of(model, pixels)
    with precision():
        output = model(pixel_values=pixels, coalitions=chosen)
    parts = (output.null_values, output.attributions, output.coalition_values)
    assert {part.dtype for part in parts} == {torch.float32}
    gaps = output.null_values + output.attributions.sum(dim=1) - output.logits.float()
    assert gaps.abs().max() <= 1e-5 * output.logits.abs().max().clamp(min=1)
    exact = families.wrap(base(family), prediction)(pixel_values=pixels_of(family), coalitions=chosen)
    allowed = 0.1 if half == torch.bfloat16 else 0.03
    for name in ("logits", "attributions", "coalition_values"):
        assert off(output[name], exact[name]) < allowed, name
    chosen = chosen[:, :1]
    noisy = other_where_absent(pixels, chosen[:, 0], families.shapley(model).tiling(pixels).players)
    with precision():
        one, other = (model(pixel_values=each, coalitions=chosen) for each in (pixels, noisy))
    assert torch.equal(one.coalition_values, other.coalition_values)
    assert not torch.equal(one.logits, other.logits)


@every_family
@two_ways
def test_losses_and_gradients_are_full_and_finite(family, prediction, half, way):
    model, precision, pixels = in_half(family, prediction, half, way)
    chosen = pairs_of(model, pixels)
    model.train()
    with precision():
        output = model(pixel_values=pixels, coalitions=chosen, labels=LABELS, return_attributions=False)
        arguments = (output.expected_square, output.coalition_values.detach(), output.null_values)
        loss = shapley_loss_of_sums(output.coalition_attributions, *arguments)
    assert loss.dtype == output.loss.dtype == torch.float32
    assert loss.isfinite()
    # A coalition and its complement share out everything that all players contribute together.
    together = output.coalition_attributions[:, ::2] + output.coalition_attributions[:, 1::2]  # (B, pairs, K)
    whole = (output.logits.float() - output.null_values)[:, None].expand_as(together)
    torch.testing.assert_close(together, whole, atol=1e-5, rtol=1e-5)
    (output.loss + loss).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype == parameter.grad.dtype == torch.float32, name
            assert parameter.grad.isfinite().all(), name


def other_where_absent(pixels, coalition, players):
    """The images (B, 3, H, W) with loud noise wherever `coalition` (B, N) says absent."""
    height, width = (side // count for side, count in zip(pixels.shape[2:], players, strict=True))
    absent = ~coalition.unflatten(1, players)
    tiles = absent.repeat_interleave(height, 1).repeat_interleave(width, 2)[:, None]  # (B, 1, H, W)
    return torch.where(tiles, 30 * torch.randn(pixels.shape).to(pixels), pixels)


@two_ways
def test_a_matching_model_in_half_precision(half, way):
    prediction = "vote" if way == "autocast" else "classifier"
    model = matching.wrapped("clip", prediction)
    batch = {**matching.images(), **matching.tokens("clip", texts.captions(3))}
    chosen = sample_pairs(3, 16, 1, torch.Generator().manual_seed(0))
    exact = model(**batch, coalitions=chosen)
    if way == "weights":
        model = families.wrap(matching.base("clip").to(half), prediction)
        batch["pixel_values"] = batch["pixel_values"].to(half)
    with torch.autocast("cpu", half) if way == "autocast" else contextlib.nullcontext():
        output = model(**batch, coalitions=chosen, return_loss=True)
    assert output.loss.dtype == output.attributions.dtype == torch.float32
    gaps = output.null_values + output.attributions.sum(dim=1) - output.logits.float()
    assert gaps.abs().max() <= 1e-5 * output.logits.abs().max().clamp(min=1)
    assert off(output.logits, exact.logits) < 0.1
    output.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(("name", "prediction"), [("bf16", "classifier"), ("fp16", "vote")])
def test_the_trainer_trains_in_half_precision(tmp_path, name, prediction):
    parts = ["classifier"] if prediction == "classifier" else None
    model = wrapped(prediction=prediction, modules_to_save=parts)
    trainer = trainer_of(tmp_path, model, max_steps=12, eval_strategy="steps", eval_steps=12, **{name: True})
    before = trained(model)
    first = trainer.evaluate()["eval_task_loss"]
    trainer.train()
    assert gap(before, trained(model)) > 0
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert trainer.evaluate()["eval_task_loss"] < 0.8 * first
    numbers = [value for logs in history(trainer) for value in logs.values()]
    assert np.isfinite(numbers).all()


def test_a_base_in_half_precision_trains(tmp_path):
    model = wrapped(base=tiny_vit().to(torch.bfloat16))
    trainer = trainer_of(tmp_path, model, max_steps=12)
    first = trainer.evaluate()["eval_task_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_task_loss"] < 0.8 * first
    trainer.save_model(str(tmp_path / "adapter"))
    explanation = explain(model, families.images().to(torch.bfloat16))
    assert explanation.attributions.dtype == torch.float32
    assert explanation.efficiency_gap.max() < 1e-5
