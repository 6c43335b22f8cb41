"""ROAD's imputation: against a dense solve written pixel by pixel, and on images whose answer is known."""

import numpy as np
import pytest
import torch

from shapadapter.evaluation.deletion import noisy_linear_imputation


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def problem(images=3, height=16, width=16, share=0.6):
    pixels = torch.randn(images, 3, height, width, generator=generator())
    tiles = torch.rand(images, height // 4, width // 4, generator=generator(1)) < share
    tiles[:, 0, 1] = False
    return pixels, tiles.repeat_interleave(4, dim=1).repeat_interleave(4, dim=2)


def dense(image, absent):
    """One image (C, H, W) by one equation per absent pixel: the sum over its neighbours of w (neighbour - pixel) = 0."""
    channels, height, width = image.shape
    places = [(row, col) for row in range(height) for col in range(width) if absent[row, col]]
    index = {place: number for number, place in enumerate(places)}
    matrix, right = np.zeros((len(places), len(places))), np.zeros((len(places), channels))
    for (row, col), number in index.items():
        for down in (-1, 0, 1):
            for along in (-1, 0, 1):
                near = row + down, col + along
                if near == (row, col) or not (0 <= near[0] < height and 0 <= near[1] < width):
                    continue
                weight = 1 / 12 if down and along else 1 / 6
                matrix[number, number] += weight
                if near in index:
                    matrix[number, index[near]] -= weight
                else:
                    right[number] += weight * image[:, near[0], near[1]]
    result = image.copy()
    result[:, [place[0] for place in places], [place[1] for place in places]] = np.linalg.solve(matrix, right).T
    return result


@pytest.mark.parametrize(("height", "width"), [(16, 16), (12, 20), (20, 8)])
def test_it_solves_the_linear_system(height, width):
    pixels, absent = problem(height=height, width=width)
    imputed = noisy_linear_imputation(pixels.double(), absent, generator(), noise=0)
    for image in range(3):
        want = dense(pixels[image].double().numpy(), absent[image].numpy())
        assert np.abs(imputed[image].numpy() - want).max() < 1e-12


def test_masks_need_not_be_tiles_and_may_leave_one_pixel():
    pixels = torch.randn(2, 1, 9, 7, generator=generator()).double()
    absent = torch.rand(2, 9, 7, generator=generator(1)) < 0.5
    absent[1] = True
    absent[1, 4, 2] = False
    imputed = noisy_linear_imputation(pixels, absent, generator(), noise=0)
    assert np.abs(imputed[0].numpy() - dense(pixels[0].numpy(), absent[0].numpy())).max() < 1e-12
    assert torch.allclose(imputed[1], pixels[1, :, 4, 2, None, None].expand(1, 9, 7))  # nothing else is known


def test_present_pixels_stay_as_they_are():
    pixels, absent = problem()
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        images = pixels.to(dtype)
        imputed = noisy_linear_imputation(images, absent, generator())
        present = ~absent[:, None].expand_as(images)
        assert imputed.dtype == dtype
        assert torch.equal(imputed[present], images[present])
        assert (imputed[~present] != images[~present]).float().mean() > 0.9
    assert torch.equal(noisy_linear_imputation(pixels, torch.zeros_like(absent), generator()), pixels)


def test_a_ramp_is_filled_without_a_seam():
    ramp = torch.linspace(-1, 1, 16).double()
    images = (ramp[:, None] + 2 * ramp)[None, None].clone()  # linear in both directions
    absent = torch.zeros(1, 16, 16, dtype=torch.bool)
    absent[:, 4:12, 4:8] = True
    assert torch.allclose(noisy_linear_imputation(images, absent, generator(), noise=0), images, atol=1e-12)


def test_noise_has_its_standard_deviation_and_its_seed():
    pixels, absent = problem(images=8, height=32, width=32)
    quiet = noisy_linear_imputation(pixels, absent, generator(), noise=0)
    hidden = absent[:, None].expand_as(pixels)
    for noise in (0.01, 0.2):
        difference = (noisy_linear_imputation(pixels, absent, generator(2), noise=noise) - quiet)[hidden]
        assert difference.std().item() == pytest.approx(noise, rel=0.05)
        assert abs(difference.mean().item()) < 4 * noise / len(difference) ** 0.5
    usual = noisy_linear_imputation(pixels, absent, generator(2))
    assert torch.equal(usual, noisy_linear_imputation(pixels, absent, generator(2), noise=0.01))
    assert not torch.equal(usual, noisy_linear_imputation(pixels, absent, generator(3)))


def test_images_do_not_see_each_other():
    pixels, absent = problem()
    together = noisy_linear_imputation(pixels, absent, generator(), noise=0)
    for image in range(3):
        alone = noisy_linear_imputation(pixels[image : image + 1], absent[image : image + 1], generator(), noise=0)
        assert torch.allclose(together[image : image + 1], alone, atol=1e-6)


def test_it_refuses_what_cannot_be_filled():
    pixels, absent = problem()
    absent[1] = True
    with pytest.raises(ValueError, match="present pixel"):
        noisy_linear_imputation(pixels, absent, generator())
    with pytest.raises(ValueError, match=r"\(B, C, H, W\)"):
        noisy_linear_imputation(pixels, absent[:, :8], generator())
