"""Where in the image the cells of a feature map really look."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from .anatomy import Anatomy, evaluating
from .carrier import Carrier, Pass
from .dryrun import noise, unchanged
from .scoring import score

# Cells from border to border, so many that the border cuts off little of a receptive field. Odd: the middle cell is in
# the middle of the image.
_CELLS = 11

# Batches of images, by the seeds of their noise, two images each; more change the second decimal.
_BATCHES = ((0, 1), (2, 3))

# So many features average over more of them than as many images do: two are enough, and large models are slow.
_WIDE, _WIDE_BATCHES = 1024, ((0,),)

# Gradients below the first number are asked for again, multiplied by the second: float32 ends at 1e-45.
_FAINT, _LOUDER = 1e-30, 1e30


def measure_offset(model: nn.Module, anatomy: Anatomy) -> tuple[float, float]:
    """By how many cells the centre of a cell's receptive field lies below and right of the cell's own centre.

    Where convolutions are padded on one side it is about half a cell, up or down. Measured by the gradient of the
    features with respect to the pixels, on noise, for the cells in the middle: around them lie even both what attention
    to the whole image adds and what the border cuts off. A model of one token for each patch has no offset.

    Returns:
        (down, right), to a hundredth of a cell.
    """
    if anatomy.blocks or anatomy.layout == "latents":
        return 0.0, 0.0
    size = (_CELLS * anatomy.cell[0], _CELLS * anatomy.cell[1])
    try:
        reach = _reach(model, replace(anatomy, sample=size))
    except Exception:  # many things may break in a model that takes one size only
        reach = _reach(model, anatomy)
    down, right = (_centre(reach.sum(dim=1 - axis)) / anatomy.cell[axis] for axis in (0, 1))
    return round(down, 2), round(right, 2)


def _centre(reach: Tensor) -> float:
    """Centre of mass of (L,), from the middle, without the ground on which the peak stands; 0 if there is none."""
    peak = (reach - reach.median()).clamp(min=0)
    if not peak.sum() > 0:
        return 0.0
    places = torch.arange(len(peak), dtype=peak.dtype, device=peak.device) + 0.5 - len(peak) / 2
    return float((peak * places).sum() / peak.sum())


def _reach(model: nn.Module, anatomy: Anatomy) -> Tensor:
    """How much each pixel moves the features of the cells in the middle, on average: (H, W) fp64."""
    batches = _WIDE_BATCHES if anatomy.width >= _WIDE else _BATCHES
    reach = torch.cat([_sensitivity(model, anatomy, seeds) for seeds in batches])  # (R, H, W)
    return (reach / reach.sum(dim=(1, 2), keepdim=True).clamp(min=1e-300)).mean(dim=0)


def _sensitivity(model: nn.Module, anatomy: Anatomy, seeds: tuple[int, ...]) -> Tensor:
    """How much each pixel of some images moves the features of a cell in the middle, (b, H, W) fp64."""
    carrier = Carrier(anatomy)
    images = torch.cat([noise(model, anatomy.family, anatomy.sample, seed)["pixel_values"] for seed in seeds])
    rows, cols = anatomy.cells(images)
    # With an even number of cells there are four in the middle, and the images take turns; else it is one.
    corners = [row * cols + col for row in ((rows - 1) // 2, rows // 2) for col in ((cols - 1) // 2, cols // 2)]
    middle = [corners[image % 4] for image in range(len(images))]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    images.requires_grad_()
    carrier.attach(model)
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        with torch.enable_grad(), evaluating(model), unchanged(model):
            with carrier.passing(Pass(rows * cols)) as current:
                score(model, anatomy.kind, anatomy.family, {"pixel_values": images, **anatomy.options})
            assert current.features is not None
            chosen = current.features[range(len(images)), middle]  # (b, D)
            generator = torch.Generator().manual_seed(seeds[0] // 2)
            direction = torch.randn(chosen.shape, generator=generator, device="cpu").to(chosen)
            (gradient,) = torch.autograd.grad(chosen, images, direction, retain_graph=True)
            if gradient.abs().max() < _FAINT:
                (gradient,) = torch.autograd.grad(chosen, images, _LOUDER * direction)
    finally:
        carrier.detach()
        for parameter in trained:
            parameter.requires_grad_(True)
    return gradient.cpu().double().norm(dim=1)  # (b, C, H, W) -> (b, H, W)
