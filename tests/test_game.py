"""A wrapped model as a cooperative game: values, enumeration and KernelSHAP."""

import itertools
import math

import families
import pytest
import torch
from families import CLASSES, images, wrap

from shapadapter import PatchGame
from shapadapter.core.errors import ImageError, ShapleyError

PAIRS = [("vit", "vote"), ("vit", "classifier"), ("dinov2", "classifier"), ("siglip", "vote")]
SMALL = {"interpolate_pos_encoding": True}


@pytest.fixture(scope="module", params=PAIRS, ids="-".join)
def game(request):
    family, prediction = request.param
    return PatchGame(wrap(family, prediction), images(1, 16, 32)[0], **SMALL)


def of_all_coalitions(game):
    """v(S) of all 256 coalitions, by bitmask, as the model itself says."""
    present = torch.tensor([[[bool(bits >> n & 1) for n in range(8)] for bits in range(256)]])
    with torch.no_grad():
        return game.model(pixel_values=game.pixel_values, coalitions=present, **SMALL).coalition_values[0]


def permutation_values(values, players=8):
    """Shapley's definition: the mean marginal contribution over all orders, written as a sum over coalitions."""
    phi = torch.zeros(players, values.shape[1], dtype=torch.float64)
    for n in range(players):
        others = [m for m in range(players) if m != n]
        for size in range(players):
            weight = math.factorial(size) * math.factorial(players - size - 1) / math.factorial(players)
            for chosen in itertools.combinations(others, size):
                bits = sum(1 << m for m in chosen)
                phi[n] += weight * (values[bits | 1 << n].double() - values[bits].double())
    return phi


def test_exact_values_are_those_of_the_definition(game):
    assert game.players == 8
    assert (game.exact() - permutation_values(of_all_coalitions(game))).abs().max() < 1e-5


def test_exact_values_are_efficient(game):
    exact = game.exact()
    assert exact.dtype == torch.float64
    assert exact.shape == (8, CLASSES)
    assert (game.null_values + exact.sum(0) - game.full_values).abs().max() < 1e-5


def test_values_do_not_depend_on_order_or_batch_size(game):
    chosen = families.coalitions(1, 40, 8)[0]
    values = game.values(chosen)
    small = PatchGame(game.model, game.pixel_values, batch_size=3, **SMALL)
    assert (small.values(chosen) - values).abs().max() < 1e-5
    order = torch.randperm(40)
    assert (game.values(chosen[order]) - values[order]).abs().max() < 1e-5
    assert (values[0] - game.full_values).abs().max() < 1e-5
    assert (values[-1] - game.null_values).abs().max() < 1e-5


def test_kernel_shap_converges_to_the_exact_values(game):
    exact = game.exact()
    errors = []
    for evaluations in (64, 512, 8192):
        estimate, error = game.kernel_shap(evaluations, torch.Generator().manual_seed(0))
        assert (game.null_values + estimate.sum(0) - game.full_values).abs().max() < 1e-5
        assert error.shape == (CLASSES,)
        errors.append(((estimate - exact).norm() / exact.norm()).item())
    assert errors[0] > errors[-1]
    assert errors[-1] < 0.05


def test_a_game_carries_the_one_pass_answer(game):
    assert game.attributions.shape == (8, CLASSES)
    assert (game.null_values + game.attributions.sum(0) - game.full_values).abs().max() < 1e-5


def test_the_model_keeps_its_mode_and_gets_no_gradients():
    model = wrap("vit", lora_dropout=0.5).train()
    game = PatchGame(model, images(1)[0])
    values = game.values(families.coalitions(1, 6)[0])
    assert model.training
    assert not values.requires_grad
    again = PatchGame(model, images(1)[0])
    assert torch.equal(again.full_values, game.full_values)
    assert torch.equal(again.values(families.coalitions(1, 6)[0]), values)


def test_a_dummy_player_gets_nothing():
    """In `vote` a player whose vote is always 0 and whom nobody reads: value and key projections of it are 0."""
    model = wrap("vit", tune="frozen")
    # No player reads another one, so that the game is additive and its Shapley values are the votes themselves.
    with torch.no_grad():
        for block in model.get_base_model().vit.layers:
            block.attention.o_proj.weight.zero_()
    game = PatchGame(model, images(1, 16, 32)[0], **SMALL)
    votes = torch.stack([game.values(torch.eye(8).bool())[n] - game.null_values for n in range(8)])
    assert (game.exact() - votes).abs().max() < 1e-5


def test_too_many_players_to_enumerate():
    game = PatchGame(wrap("vit"), images(1, 40, 40)[0], **SMALL)
    assert game.players == 25
    with pytest.raises(ValueError, match="enumerated"):
        game.exact()


def test_what_is_no_game():
    with pytest.raises(ShapleyError, match="get_peft_model"):
        PatchGame(families.base("vit"), images(1)[0])
    model = wrap("vit")
    with model.disable_adapter(), pytest.raises(ShapleyError, match="disabled"):
        PatchGame(model, images(1)[0])
    with pytest.raises(ImageError):
        PatchGame(model, torch.zeros(32, 32))
    with pytest.raises(ShapleyError):
        PatchGame(model, images(2))
