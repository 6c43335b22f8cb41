"""The rivals' objectives are what their published code does, and their costs are counted right."""

import math
import sys
from pathlib import Path

import pytest
import torch
from families import PLAYERS, base, images, wrap
from test_trainer import arguments

# At the end: two scripts there have the names of modules here.
sys.path.append(str(Path(__file__).parents[1] / "examples" / "benchmarks"))

import rivals
from rivals import AUTOGNOTHI, DUO, RIVALS, VIT_SHAPLEY, RivalTrainer, SurrogateTrainer
from trainings import ShuffledLabels


def surrogate():
    return wrap("vit", "classifier", shapley_token=False).requires_grad_(False).eval()


def explainer(objective):
    model = wrap("vit", **(rivals.CLASSIFIES if objective.classifies else {}))
    if objective.class_row:
        rivals.active_layer(model).class_row = rivals.ClassRow(model.config.hidden_size, model.config.num_labels)
    return model


def trainer_of(objective, folder):
    return RivalTrainer(objective, surrogate(), model=explainer(objective), args=arguments(folder))


def batch_of(count=4):
    return {"pixel_values": images(count), "labels": torch.arange(count)}


def published_law(players):
    """The law of the number of present players, from the published formula, without sampling."""
    kernel = [1 / (k * (players - k)) for k in range(1, players)]
    law = [0.0] * (players + 1)
    for k, weight in enumerate(kernel):  # np.arange(players - 1), with the weights of 1 .. players - 1
        keep = 1 - k / players
        for size in range(players + 1):
            law[size] += weight / sum(kernel) * math.comb(players, size) * keep**size * (1 - keep) ** (players - size)
    return torch.tensor(law, dtype=torch.float64)


def test_coalitions_follow_the_published_law():
    drawn = rivals.rivals_coalitions(50, 16, 400, torch.Generator().manual_seed(0))  # (B, M, N)
    assert torch.equal(drawn[:, 0::2], ~drawn[:, 1::2])
    law = published_law(16)
    first = drawn[:, 0::2].sum(dim=-1).flatten()  # (10,000,)
    expected = law * len(first)
    often = expected > 5
    observed = torch.bincount(first, minlength=17).double()
    chi = ((observed - expected).square() / expected)[often].sum()
    assert chi < 2 * int(often.sum())
    # A fifth of the coalitions says nothing: they are empty or full.
    wasted = (law[0] + law[-1]).item()
    assert wasted == pytest.approx(0.224, abs=1e-3)
    assert (first % 16 == 0).double().mean() == pytest.approx(wasted, abs=0.02)


def test_the_surrogate_sees_all_sizes_alike():
    sizes = rivals.uniform_coalitions(20_000, 4, torch.Generator().manual_seed(0)).sum(dim=-1).flatten()
    assert (torch.bincount(sizes, minlength=5) / len(sizes)).tolist() == pytest.approx([0.2] * 5, abs=0.02)


def test_vit_shapley_normalises_over_the_patches():
    rows, full, null = torch.randn(2, 9, 3), torch.rand(2, 3), torch.rand(2, 3)
    found = VIT_SHAPLEY.attributions(rows, None, full, null)
    torch.testing.assert_close(found.sum(dim=1), full - null)
    moved = found - rows.tanh()
    torch.testing.assert_close(moved, moved[:, :1].expand_as(moved))


def test_autognothi_normalises_over_one_row_more_and_drops_it():
    rows, class_row = torch.randn(2, 9, 3), torch.randn(2, 3)
    full, null = torch.rand(2, 3), torch.rand(2, 3)
    every = torch.cat([class_row[:, None], rows], dim=1)  # as published: the class token first
    published = (every + ((full - null) - every.sum(dim=1))[:, None] / 10)[:, 1:]
    # Our head may shift all patches alike; then the extra row is what it is above their mean.
    shifted, above = rows + torch.randn(2, 1, 3), class_row - rows.mean(dim=1)
    found = AUTOGNOTHI.attributions(shifted, above, full, null)
    torch.testing.assert_close(found, published)
    assert (found.sum(dim=1) - (full - null)).abs().max() > 0.1


def test_the_loss_may_move_the_sum_of_what_the_explainer_says():
    model = explainer(VIT_SHAPLEY)
    rows, _, own = rivals.explainer_rows(model, pixel_values=images())
    torch.testing.assert_close(rows, own.attributions)
    vote = dict(model.named_parameters())["base_model.model.shapley.lora_shapley_vote.default.weight"]
    ours, theirs, true = (
        torch.autograd.grad(total.sum(), vote, retain_graph=True)[0] for total in (own.attributions, rows, own.logits)
    )
    assert ours.abs().max() < 1e-4 * true.abs().max()
    torch.testing.assert_close(theirs, true)


@pytest.mark.parametrize("objective", RIVALS, ids=lambda objective: objective.name)
def test_the_loss_is_players_times_the_squared_error_in_probabilities(tmp_path, objective, monkeypatch):
    coalitions = rivals.rivals_coalitions(4, PLAYERS, objective.masks, torch.Generator().manual_seed(1))
    coalitions[0, 0], coalitions[0, 1] = True, False  # the full and the empty one, which do occur
    monkeypatch.setattr(rivals, "rivals_coalitions", lambda *_: coalitions)
    trainer, batch = trainer_of(objective, tmp_path), batch_of()
    trainer.model.eval()
    loss = trainer.compute_loss(trainer.model, batch).detach()

    def chances(**inputs):
        return trainer.surrogate(**inputs).logits.softmax(dim=-1)

    full = chances(pixel_values=batch["pixel_values"])
    said = trainer.surrogate(pixel_values=batch["pixel_values"], coalitions=coalitions)
    values, null = said.coalition_values.softmax(dim=-1), said.null_values.softmax(dim=-1)
    torch.testing.assert_close(values[0, 0], full[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(values[0, 1], null[0], atol=1e-5, rtol=0)
    if objective.blank_null:
        null = chances(pixel_values=torch.zeros(1, 3, 32, 32)).expand(4, -1)
    rows, class_row, own = rivals.explainer_rows(trainer.model, **batch)
    phi = objective.attributions(rows, class_row, full, null)
    total = 0.0
    for image in range(4):
        for coalition, value in zip(coalitions[image], values[image], strict=True):
            total += (null[image] + phi[image][coalition].sum(dim=0) - value).square().mean().item()
    expected = PLAYERS * total / (4 * objective.masks) + (float(own.loss) if objective.classifies else 0)
    assert float(loss) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("objective", RIVALS, ids=lambda objective: objective.name)
def test_evaluations_are_counted_as_they_happen(tmp_path, objective, monkeypatch):
    monkeypatch.setattr(rivals, "BATCH", 4)
    trainer, seen = trainer_of(objective, tmp_path), {"surrogate": 0, "explainer": 0}
    for name, model in (("surrogate", trainer.surrogate), ("explainer", trainer.model)):
        last = model.get_base_model().vit.layernorm
        last.register_forward_hook(
            lambda _, args, output, name=name: seen.__setitem__(name, seen[name] + len(args[0]))
        )
    trainer.compute_loss(trainer.model, batch_of())  # what is computed once only
    seen.update(surrogate=0, explainer=0)
    trainer.compute_loss(trainer.model, batch_of())
    without, with_gradient = objective.evaluations
    # With a classifier's prediction our call always evaluates the empty image; only ViT-Shapley asks for it.
    assert seen["surrogate"] - (0 if objective.null_every_step else 1) == 4 * without
    assert seen["explainer"] - (1 if objective.classifies else 0) == 4 * with_gradient


@pytest.mark.parametrize("objective", RIVALS, ids=lambda objective: objective.name)
def test_the_same_evaluations_for_both_stages(objective):
    epochs = objective.epochs_within(4.5)
    explaining = epochs * sum(objective.evaluations)
    teaching = epochs * objective.surrogate_share * 2  # the classifier's answer and the surrogate's
    assert explaining + teaching == pytest.approx(4.5)


@pytest.mark.parametrize("objective", RIVALS, ids=lambda objective: objective.name)
def test_gradients_reach_the_explainer_and_not_the_surrogate(tmp_path, objective):
    trainer = trainer_of(objective, tmp_path)
    trainer.compute_loss(trainer.model, batch_of()).backward()
    assert all(parameter.grad is None for parameter in trainer.surrogate.parameters())
    names = {name for name, value in trainer.model.named_parameters() if value.grad is not None and value.grad.any()}
    assert any("lora_A" in name for name in names)
    assert any("class_row" in name for name in names) == objective.class_row
    assert any("classifier" in name for name in names) == (objective is DUO)


def test_a_surrogate_that_sees_everything_has_nothing_to_learn(tmp_path, monkeypatch):
    model, teacher = wrap("vit", "classifier", trained=False, shapley_token=False), base("vit")
    options = {"model": model, "args": arguments(tmp_path, coalition_gradients=True)}
    trainer = SurrogateTrainer(teacher.eval(), **options)
    losses = {}
    for share in (1.0, 0.5):
        present = torch.rand(4, 1, PLAYERS) < share
        monkeypatch.setattr(rivals, "uniform_coalitions", lambda *_, present=present: present)
        losses[share] = trainer.compute_loss(model.train(), batch_of())
    assert float(losses[1.0]) == pytest.approx(0, abs=1e-5)
    said = model.eval()(pixel_values=images(4), coalitions=present).coalition_values[:, 0].log_softmax(dim=-1)
    target = teacher(pixel_values=images(4)).logits.softmax(dim=-1)
    divergence = (target * (target.log() - said)).sum(dim=-1).mean()
    assert float(losses[0.5]) == pytest.approx(float(divergence), rel=1e-4)
    assert losses[0.5].requires_grad


def test_shuffled_labels_are_the_same_labels_elsewhere():
    data = [{"pixel_values": index, "labels": index % 3} for index in range(30)]
    shuffled = ShuffledLabels(data, seed=0)
    rows = [shuffled[index] for index in range(len(shuffled))]
    assert [row["pixel_values"] for row in rows] == list(range(30))
    assert sorted(row["labels"] for row in rows) == sorted(row["labels"] for row in data)
    assert sum(row["labels"] == index % 3 for index, row in enumerate(rows)) < 20
