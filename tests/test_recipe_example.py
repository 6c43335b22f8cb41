"""The recipe's experiments as their reader runs them, at a size at which the numbers mean nothing."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from families import images, wrap
from test_trainer import arguments

pytest.importorskip("mlxtend")

# At the end: two scripts there have the names of modules here.
sys.path.append(str(Path(__file__).parents[1] / "examples" / "benchmarks"))

import recipe
import recipe_variants

from shapadapter import ShapleyTrainer
from shapadapter.core.shapley import sample_pairs
from shapadapter.demo.models import Scale

pytestmark = pytest.mark.slow

TINY = Scale(60, 1, 1, 1, truth_images=2, truth_evaluations=128, budgets=(32, 64))
VARIANTS = ["averaged weights", "plain"]


def run(output, *more):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "SCALES", {"demo, quick": TINY})
        patch.setattr(recipe, "IMAGES", 2)
        patch.setattr(recipe, "COALITIONS", 128)
        recipe.main(["--quick", "--output", str(output), *more])


def test_a_row_for_each_variant_and_nothing_is_done_twice(tmp_path, monkeypatch, capsys):
    run(tmp_path, "--variants", *VARIANTS)
    before = capsys.readouterr().out
    heads, _, *rows = [line.split(" | ") for line in before.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows] == [f"| {name}" for name in VARIANTS]
    assert {len(row) for row in rows} == {len(heads)}
    found = json.loads((tmp_path / "averaged-weights-seed-0.json").read_text())
    assert set(found) == set(recipe.COLUMNS)
    assert torch.tensor(list(found.values())).isfinite().all()
    assert found["cost"] == 1

    def never(*args, **kwargs):
        raise AssertionError("trained again")

    monkeypatch.setattr(recipe, "fit", never)
    monkeypatch.setattr(recipe, "plain", never)
    run(tmp_path, "--variants", *VARIANTS)
    assert capsys.readouterr().out.splitlines() == [line for line in before.splitlines() if line.startswith("| ")]


def test_the_error_is_measured_without_bias():
    generator = torch.Generator().manual_seed(0)
    truth, mistake, *noises = torch.randn(4, 2000, 64, generator=generator, dtype=torch.float64)  # (B, N) each
    truth = truth + 0.5
    # The estimates' own noise is larger than what is measured.
    found = recipe.errors(truth + 0.1 * mistake, *(truth + 0.3 * noise for noise in noises))
    assert found["error"] == pytest.approx(0.1 / 1.25**0.5, rel=0.05)
    assert found["sampled"] == pytest.approx(0.3 / 1.25**0.5, rel=0.05)
    assert found["ratio"] == pytest.approx(1 / 3, rel=0.05)
    # Equal shares leave the variance of the truth, 1, and of the mistake 0.01 is left.
    assert found["explained"] == pytest.approx(0.99, abs=0.005)


def game(players=16, pictures=6):
    """Attributions, coalitions, values and v(empty) of a made-up game, as a trainer sees them."""
    generator = torch.Generator().manual_seed(0)
    coalitions = sample_pairs(pictures, players, 2, generator)  # (B, M, N)
    sizes = {
        "coalition_attributions": (pictures, 4, 5),
        "coalition_values": (pictures, 4, 5),
        "null_values": (pictures, 5),
        "logits": (pictures, 5),
    }
    drawn = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    return SimpleNamespace(**drawn, expected_square=torch.ones(pictures), loss=None), {"coalitions": coalitions}


def trainer_of(trainer_class, folder):
    return trainer_class(model=wrap("vit"), args=arguments(folder))


def test_the_drawn_yardstick_makes_saying_nothing_cost_one(tmp_path):
    outputs, inputs = game()
    outputs.coalition_attributions = torch.zeros_like(outputs.coalition_attributions)
    terms = trainer_of(recipe_variants.DrawnYardstick, tmp_path)._loss_terms(outputs, inputs)
    assert terms["shapley_loss"].item() == pytest.approx(1)


def test_centred_logits_do_not_see_what_all_classes_share(tmp_path):
    outputs, inputs = game()
    losses = {}
    for trainer_class in (ShapleyTrainer, recipe_variants.CentredLogits):
        trainer = trainer_of(trainer_class, tmp_path)
        shifted = SimpleNamespace(**{**vars(outputs), "coalition_values": outputs.coalition_values + 3})
        losses[trainer_class] = [trainer._loss_terms(one, inputs)["shapley_loss"].item() for one in (outputs, shifted)]
    assert len(set(losses[ShapleyTrainer])) == 2
    assert losses[recipe_variants.CentredLogits][0] == pytest.approx(losses[recipe_variants.CentredLogits][1])


def test_every_eighth_of_a_batch_has_its_own_sizes(tmp_path):
    trainer = trainer_of(recipe_variants.EightSizes, tmp_path)
    coalitions = trainer._draw_coalitions({"pixel_values": images(32)}, training=True)  # (32, 2, N)
    sizes = coalitions.sum(dim=2).unflatten(0, (8, 4))  # (8, 4, 2)
    assert coalitions.shape[1] == 2
    assert (sizes == sizes[:, :1]).all()
    assert len(sizes[:, 0].unique(dim=0)) > 1


def test_the_attention_block_starts_silent_and_never_moves_the_prediction():
    model = wrap("vit")
    before = model(pixel_values=images())
    recipe_variants.let_cells_attend(model)
    silent = model(pixel_values=images())
    (block,) = (module for module in model.modules() if isinstance(module, torch.nn.TransformerEncoderLayer))
    torch.nn.init.normal_(block.linear2.weight)
    after = model(pixel_values=images())
    assert torch.allclose(silent.attributions, before.attributions, atol=1e-6)
    assert not torch.allclose(after.attributions, before.attributions, atol=1e-3)
    assert torch.allclose(after.logits, before.logits, atol=1e-5)


def test_weights_are_averaged_over_the_second_half():
    model, average = torch.nn.Linear(1, 1, bias=False), recipe_variants.AveragedWeights()
    average.on_train_begin(None, None, None, model=model)
    for step in range(1, 5):
        torch.nn.init.constant_(model.weight, step)
        average.on_step_end(None, SimpleNamespace(global_step=step, max_steps=4), None)
    average.on_train_end(None, None, None)
    assert model.weight.item() == pytest.approx(0.99 * (0.99 * 2 + 0.01 * 3) + 0.01 * 4)
