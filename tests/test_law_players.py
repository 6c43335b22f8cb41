"""Grids, fillings, places and sizes, for every family of the zoo (all but ten of them with `-m families`)."""

import functools
import math

import pytest
import torch
import zoo
from families import CLASSES, PATCH, coalitions, shapley, wrap
from laws import (
    DEFAULT,
    LATENTS,
    MAPS,
    OWN,
    PATCHED,
    QUICK,
    RESIZED,
    TOKENS,
    adds_up,
    close,
    count,
    deaf_to_absent,
    disturb,
    ends_meet,
    loss_of,
    on,
    own,
    pairs,
    players,
    regridded,
    removals,
    run,
    same,
    wrapped,
)
from peft import PeftModel
from zoo import ZOO

from shapadapter import ShapleyConfig
from shapadapter.core.errors import ImageError, UnsupportedModelError

# -- grids ------------------------------------------------------------------------------------------------------------


def patches_of(chosen, grid, cells):
    """The patches of coarse players: (B, M, N) to (B, M, cells)."""
    down, right = cells[0] // grid[0], cells[1] // grid[1]
    return chosen.unflatten(2, grid).repeat_interleave(down, 2).repeat_interleave(right, 3).flatten(2)


@on([(*pair, (2, 2) if pair[1] == "vote" else (4, 2)) for pair in pairs(TOKENS)], ("name", "prediction", "grid"))
def test_a_coarse_player_is_its_patches(name, prediction, grid):
    inputs, chosen = zoo.inputs(name), coalitions(2, 4, math.prod(grid))
    model, fine = wrapped(name, prediction, grid=grid), wrapped(name, prediction)
    assert model.peft_config["default"].removal == removals(name)[0]
    coarse = run(model, inputs, coalitions=chosen)
    patches = run(fine, inputs, coalitions=patches_of(chosen, grid, (4, 4)))
    assert torch.equal(coarse.coalition_values, patches.coalition_values)
    tiles = patches.attributions.unflatten(1, (grid[0], 4 // grid[0], grid[1], 4 // grid[1]))
    assert close(coarse.attributions, tiles.sum(dim=(2, 4)).flatten(1, 2))
    assert adds_up(coarse)


CUT = tuple(name for name in RESIZED if name not in TOKENS)
"""On 96 x 160 pixels most maps have 3 x 5 cells, and no grid here divides those."""


def grids_of(name):
    """Grids and the sizes of images for them: finer than any cells, coarser than all, cutting through them."""
    free = [((8, 8), None), ((1, 2), None)][: 2 if name in DEFAULT else 1]
    cut = [((6, 4), (96, 160))] if name in CUT else []
    return free + cut if name in DEFAULT else cut or free


@on(
    [(name, *case) for name in QUICK if name not in PATCHED for case in grids_of(name)],
    ("name", "grid", "size"),
)
def test_players_that_are_no_cells(name, grid, size):
    model, inputs = regridded(name, grid), zoo.inputs(name, size=size)
    chosen = coalitions(2, 4, math.prod(grid))
    output = run(model, inputs, coalitions=chosen)
    assert output.attributions.shape == (2, math.prod(grid), CLASSES)
    assert adds_up(output)
    assert ends_meet(output)
    assert deaf_to_absent(model, inputs, grid, chosen[:, 1:2], float("nan"))


@pytest.mark.parametrize("name", ["beit", "swin"])
def test_a_grid_that_divides_nothing_is_refused(name):
    model = wrapped(name, grid=(3, 5))
    with pytest.raises(ImageError, match=r"grid=\(3, 5\) does not divide .* Choose a divisor"):
        run(model, zoo.inputs(name))


def test_patches_are_not_cut_where_they_are_removed_whole():
    model = wrap(zoo.base("beit"), grid=(8, 8), removal="mask")
    with pytest.raises(ImageError, match=r"does not divide the 4 x 4 patches .* removal='pixels'"):
        run(model, zoo.inputs("beit"))


@on(["clip_model", "resnet"])
def test_adapters_with_grids_of_their_own(tmp_path, name):
    inputs, model = zoo.inputs(name), own(name)
    first = run(model, inputs)
    model.add_adapter("coarse", ShapleyConfig(r=4, grid=(1, 2)))
    model.add_adapter("fine", ShapleyConfig(r=4, grid=(8, 8), prediction="classifier"))
    for adapter, tiles in (("coarse", 2), ("fine", 64), ("default", count(name))):
        model.set_adapter(adapter)
        output = run(model, inputs, coalitions=coalitions(2, 3, tiles))
        assert output.attributions.shape == (2, tiles, CLASSES)
        assert adds_up(output)
    assert torch.equal(output.attributions, first.attributions)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(zoo.base(name), tmp_path / "fine", adapter_name="fine").eval()
    model.set_adapter("fine")
    chosen = coalitions(2, 3, 64)
    assert same(run(again, inputs, coalitions=chosen), run(model, inputs, coalitions=chosen))


# -- fillings ---------------------------------------------------------------------------------------------------------

FILLS = {
    "black": {"fill": "mean"},
    "colour": {"fill": "mean", "fill_color": (0.5, -0.25, 1.0)},
    "blur": {"fill": "blur"},
    "learned": {"fill": "learned", "fill_color": (0.5, -0.25, 1.0)},
}


@on([("clip_model", "vote"), ("resnet", "classifier")], ("name", "prediction"))
def test_fillings_show_nothing_of_absent_players_and_are_saved(tmp_path, name, prediction):
    inputs, chosen, values = zoo.inputs(name), coalitions(2, 5, count(name)), []
    for fill, config in FILLS.items():
        model = wrapped(name, prediction, removal="pixels", **config)
        output = run(model, inputs, coalitions=chosen)
        assert adds_up(output)
        assert ends_meet(output)
        for one in chosen[:, 1:-1].split(1, dim=1):
            assert deaf_to_absent(model, inputs, players(name), one, float("nan"))
        model.save_pretrained(tmp_path / fill)
        again = PeftModel.from_pretrained(zoo.base(name), tmp_path / fill).eval()
        assert same(run(again, inputs, coalitions=chosen), output)
        values.append(output.coalition_values[:, 1:2])
    assert all(not close(one, other, 1e-4) for index, one in enumerate(values) for other in values[:index])


@on([("clip_model", "classifier"), ("resnet", "vote")], ("name", "prediction"))
def test_a_learned_colour_learns(name, prediction):
    model = own(name, prediction, removal="pixels", **FILLS["learned"]).train()
    chosen = coalitions(2, 4, count(name))
    for grad in (False, True):
        model.zero_grad()
        loss_of(model(**zoo.inputs(name), coalitions=chosen, coalition_grad=grad), chosen).backward()
        gradient = shapley(model).lora_shapley_fill["default"].grad
        assert (gradient is not None and gradient.abs().min() > 0) == grad


# -- places -----------------------------------------------------------------------------------------------------------

GRIDS = {
    (3, 5): PATCHED,
    (4, 6): ("cvt", "mobilevit", "mobilevitv2", "mobilenet_v1", "mobilenet_v2"),
    (6, 8): ("efficientnet", "hgnet_v2", "pp_lcnet"),
}
"""The more of an image a cell sees, the larger is the image in which places show."""
FIXED_SIZES = {"pvt": (192, 192), "levit": (384, 384), "levit_teacher": (384, 384)}


def placed(name):
    """A wrapped model without a token, which would mix the players, and the inputs with which places show."""
    if name in FIXED_SIZES:
        size, grid = FIXED_SIZES[name], (6, 6)
        model = zoo.build(name, size=size, image_size=size[0])
    else:
        model, grid = zoo.base(name), next((size for size, names in GRIDS.items() if name in names), (3, 4))
        cell = 16 if name == "cvt" else PATCH if name in TOKENS else 32
        size = (grid[0] * cell, grid[1] * cell)
    return wrap(model, tune="frozen", shapley_token=False), zoo.inputs(name, batch=1, seed=1, size=size), grid


def influence(model, inputs, grid):
    """How much each tile's pixels move each player's attributions, (tiles, players)."""
    tiles = math.prod(grid)
    each = torch.cat([torch.zeros(1, tiles), torch.eye(tiles)]).bool()  # nothing, then one tile at a time
    images = {key: value.repeat_interleave(tiles + 1, 0) if key in OWN else value for key, value in inputs.items()}
    moved = run(model, disturb(images, grid, each, 0.1)).attributions
    total = (moved[1:] - moved[:1]).square().sum(-1)
    for _ in range(20):  # a tile may matter more than others, and a player be moved more: neither says where it is
        total = total / total.sum(0)
        total = total / total.sum(1, keepdim=True)
    return total / total.sum(0)


@on([name for name in (*TOKENS, *MAPS) if name not in ("levit_teacher", "donut_swin")])  # the trunks of levit and swin
def test_players_are_numbered_in_raster_order(name):
    """The further down or right a player is, the further down or right are the tiles that move it."""
    model, inputs, grid = placed(name)
    rows, cols = torch.meshgrid(*(torch.arange(float(number)) for number in grid), indexing="ij")
    by_tile = influence(model, inputs, grid)
    for place in (rows.flatten(), cols.flatten()):
        centre = place @ by_tile
        assert torch.corrcoef(torch.stack([centre, place]))[0, 1] > 0.6


# -- sizes ------------------------------------------------------------------------------------------------------------


@functools.cache
def cells_of(name, size):
    """How many cells the base model really has on images of this size."""
    entry, inputs = ZOO[name], zoo.inputs(name, size=size)
    shape = zoo.features(zoo.base(name), entry, **inputs).shape
    return shape[1] - entry.prefix if entry.layout == "NC" else shape[2] * shape[3]


SHARES = ((2.6, 3.1), (1.1, 3.9), (2, 3))
"""Cells down and right. The last may be in part, which some models leave out and some take for a whole one."""
WHOLE = ("hiera", "cvt")
"""Whole cells only: the one fails, and the other has as many cells as neither rounding gives."""


def size_of(name, share):
    cell = shapley(wrapped(name)).anatomy.cell
    return tuple(round(part * side) for part, side in zip(share, cell, strict=True))


@on(
    [
        (*pair, share)
        for pair in pairs([name for name in RESIZED if name not in LATENTS], both=())
        for share in (SHARES[2:] if pair[0] in WHOLE else SHARES[: 3 if pair[0] in DEFAULT else 1])
    ],
    ("name", "prediction", "share"),
)
def test_images_of_other_sizes(name, prediction, share):
    size = size_of(name, share)
    inputs = zoo.inputs(name, size=size)
    model, number = wrapped(name, prediction), cells_of(name, size)
    chosen = coalitions(2, 4, number)
    output = run(model, inputs, coalitions=chosen)
    rows, cols = shapley(model).tiling(**inputs).players
    assert rows * cols == number
    assert output.attributions.shape == (2, number, CLASSES)
    assert adds_up(output)
    assert ends_meet(output)
    first = (torch.arange(number) == 0).expand(2, 1, -1)
    corner = (..., slice(-(-size[0] // rows)), slice(-(-size[1] // cols)))
    noisy = {**inputs, "pixel_values": inputs["pixel_values"] + 30}
    noisy["pixel_values"][corner] = inputs["pixel_values"][corner]
    alone, beside = (run(model, images, coalitions=first).coalition_values for images in (inputs, noisy))
    assert torch.equal(alone, beside)


def test_a_map_of_another_size_is_refused():
    with pytest.raises(UnsupportedModelError, match=r"12 cells .* returned 9. Send images .* multiples of \(16, 16\)"):
        run(wrapped("cvt"), zoo.inputs("cvt", size=size_of("cvt", (2.6, 3.1))))


@pytest.mark.parametrize(("size", "grid"), [((64, 96), (2, 3)), ((40, 32), (2, 2)), ((100, 70), (3, 2))])
def test_players_of_a_model_without_places_are_tiles(size, grid):
    model, inputs = wrapped("perceiver_conv"), zoo.inputs("perceiver_conv", size=size)
    output = run(model, inputs, coalitions=coalitions(2, 3, math.prod(grid)))
    assert shapley(model).tiling(**inputs).players == grid
    assert output.attributions.shape == (2, math.prod(grid), CLASSES)
    assert adds_up(output)


@on([(name, seed) for name in PATCHED for seed in (0, 1, 2)], ("name", "seed"))
def test_patches_of_any_shape(name, seed):
    grid, inputs, model = zoo.NAFLEX_SHAPES[seed], zoo.inputs(name, seed=seed), wrapped(name)
    output = run(model, inputs, coalitions=coalitions(2, 3, math.prod(grid)))
    assert shapley(model).tiling(**inputs).players == grid
    assert output.attributions.shape == (2, math.prod(grid), CLASSES)
    assert adds_up(output)


@on(PATCHED)
def test_images_of_different_shapes_in_one_batch_are_refused(name):
    one, other = (zoo.inputs(name, seed=seed) for seed in (0, 1))
    mixed = {key: torch.cat([value[:1], other[key][1:]]) if key in OWN else value for key, value in one.items()}
    with pytest.raises(ImageError, match="one grid of patches"):
        run(wrapped(name), mixed)
