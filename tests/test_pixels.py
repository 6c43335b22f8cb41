"""Removal in pixel space: what an absent tile showed is gone, from the blur too."""

import pytest
import torch
from torch.nn import functional as F

from shapadapter.backbone import fill_absent
from shapadapter.backbone.tiling import pixels_of

GREY = torch.tensor([0.1, -0.2, 0.3])
BLUR = pytest.mark.parametrize("blur", [False, True])


def pictures(rows=3, height=24, width=36):
    return torch.randn(rows, 3, height, width)


def some(players=(4, 6)):
    """Three coalitions: some, none and all."""
    count = players[0] * players[1]
    return torch.stack([torch.arange(count) % 3 == 0, torch.zeros(count).bool(), torch.ones(count).bool()])


@BLUR
def test_present_pixels_stay_and_absent_ones_are_replaced(blur):
    images, present = pictures(), some()
    filled = fill_absent(images, present, (4, 6), GREY, blur)
    kept = present.unflatten(1, (4, 6)).repeat_interleave(6, 1).repeat_interleave(6, 2)[:, None].expand_as(images)
    assert torch.equal(filled[kept], images[kept])
    assert not torch.isclose(filled[~kept], images[~kept]).any(dim=-1).all()
    assert torch.equal(filled[1], GREY[:, None, None].expand(3, 24, 36))  # nobody is there
    assert torch.equal(filled[2], images[2])
    assert filled.dtype == images.dtype
    if not blur:
        assert torch.equal(filled[~kept], GREY[:, None, None].expand_as(images)[~kept])


@BLUR
@pytest.mark.parametrize("content", [float("nan"), float("inf"), 1e30, 0.0])
def test_what_an_absent_tile_showed_has_no_influence_at_all(blur, content):
    images, present = pictures(), some()
    kept = pixels_of(present, (4, 6), (24, 36))[:, None]
    other = torch.where(kept, images, torch.tensor(content))
    clean, dirty = (fill_absent(pixels, present, (4, 6), GREY, blur) for pixels in (images, other))
    assert torch.equal(clean, dirty)
    assert dirty.isfinite().all()


@BLUR
def test_no_gradient_reaches_an_absent_pixel(blur):
    images, present = pictures().requires_grad_(), some()
    fill_absent(images, present, (4, 6), GREY, blur).square().sum().backward()
    kept = pixels_of(present, (4, 6), (24, 36))[:, None].expand_as(images)
    assert not images.grad[~kept].any()
    assert images.grad[kept].all()


@BLUR
def test_a_learned_colour_learns(blur):
    """With a blur only where nothing is near."""
    colour = GREY.clone().requires_grad_()
    fill_absent(pictures(), some(), (4, 6), colour, blur)[1:2].sum().backward()
    assert torch.allclose(colour.grad, torch.full((3,), 24.0 * 36.0))


def test_a_blur_of_one_colour_is_that_colour():
    images = GREY.view(1, 3, 1, 1).expand(3, 3, 24, 36)
    filled = fill_absent(images, some(), (4, 6), torch.tensor([9.0, 9.0, 9.0]), blur=True)
    assert torch.allclose(filled[[0, 2]], images[[0, 2]], atol=1e-6)


def test_a_blur_lies_between_what_is_around():
    """Left black, right white: what is missing in between goes from the one to the other."""
    images = torch.zeros(1, 1, 8, 40)
    images[..., 20:] = 1
    present = torch.tensor([[True, False, False, False, True]])
    filled = fill_absent(images, present, (1, 5), torch.zeros(1), blur=True)
    along = filled[0, 0, 4, 8:32]
    assert (along.diff() >= -1e-6).all()
    assert along[0] < 0.05
    assert along[-1] > 0.95


def test_a_blur_shows_the_colour_where_nobody_is_near():
    images = torch.ones(1, 3, 8, 80)
    present = torch.arange(10)[None] == 0
    filled = fill_absent(images, present, (1, 10), GREY, blur=True)
    assert torch.allclose(filled[0, :, 4, 10], torch.ones(3))
    assert torch.equal(filled[0, :, :, 40:], GREY[:, None, None].expand(3, 8, 40))


def test_the_blur_is_as_wide_as_a_tile():
    for tiles in (4, 8):
        images, present = torch.ones(1, 1, 4, 64), torch.arange(tiles)[None] == 0
        shown = fill_absent(images, present, (1, tiles), torch.zeros(1), blur=True)[0, 0, 0] > 0.5
        tile = 64 // tiles
        assert 2 * tile < shown.sum() <= 4 * tile


@pytest.mark.parametrize("size", [(24, 36), (200, 200), (97, 131), (7, 5), (41, 47)])
@pytest.mark.parametrize("players", [(1, 2), (2, 3), (7, 5), (4, 4)])
def test_tiles_are_equal_up_to_rounding(size, players):
    count = players[0] * players[1]
    masks = pixels_of(torch.eye(count, dtype=torch.bool), players, size)  # one player present in each
    assert (masks.sum(0) == 1).all()
    for axis in (0, 1):
        longest = masks.any(dim=2 - axis).sum(dim=1)  # of each tile, along this axis
        assert longest.min() >= size[axis] // players[axis]
        assert longest.max() <= -(-size[axis] // players[axis])


@pytest.mark.parametrize("size", [(24, 36), (200, 200), (97, 131), (13, 20)])
@pytest.mark.parametrize("players", [(2, 3), (7, 5), (6, 4)])
def test_tiles_lie_where_a_heat_map_draws_them(size, players):
    present = torch.arange(players[0] * players[1])[None] % 3 == 0
    drawn = F.interpolate(present.unflatten(1, players)[:, None].float(), size=size, mode="nearest-exact")[:, 0]
    # interpolate rounds at random where the centre of a pixel lies on an edge.
    clear = [((torch.arange(1, 2 * p, 2) * t) % (2 * p) != 0) for p, t in zip(size, players, strict=True)]
    clear = clear[0][:, None] & clear[1][None]
    assert torch.equal(pixels_of(present, players, size)[:, clear], drawn.bool()[:, clear])
    assert clear.float().mean() > 0.9


@BLUR
def test_low_precision_keeps_its_dtype(blur):
    images = pictures().bfloat16()
    filled = fill_absent(images, some(), (4, 6), GREY, blur)
    assert filled.dtype == torch.bfloat16
    precise = fill_absent(images.float(), some(), (4, 6), GREY, blur)
    assert torch.allclose(filled.float(), precise, atol=0.05)
