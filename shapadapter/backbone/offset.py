"""Where in the image the cells of a feature map really look."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .anatomy import Anatomy, evaluating
from .carrier import Carrier, Pass
from .dryrun import noise, unchanged
from .scoring import score

# Images the receptive field is measured on; more change the second decimal.
_IMAGES = 4


def measure_offset(model: nn.Module, anatomy: Anatomy) -> tuple[float, float]:
    """By how many cells the centre of a cell's receptive field lies below and right of the cell's own centre.

    Where convolutions are padded on one side it is about half a cell, up or down. Measured by the gradient of the
    features with respect to the pixels, on noise, around the middle of the map: there, what attention to the whole image
    adds is even. A model of one token for each patch has no offset.

    Returns:
        (down, right), to a hundredth of a cell.
    """
    if anatomy.blocks or anatomy.layout == "latents":
        return 0.0, 0.0
    images = torch.cat(
        [noise(model, anatomy.family, anatomy.sample, seed)["pixel_values"] for seed in range(_IMAGES // 2)]
    )
    rows, cols = anatomy.cells(images)
    reach = _sensitivity(model, anatomy, images, (rows // 2, cols // 2))  # (H, W)
    if not reach.sum() > 0:
        return 0.0, 0.0
    found = []
    for axis, (count, size) in enumerate(zip((rows, cols), anatomy.cell, strict=True)):
        along = reach.sum(dim=1 - axis)  # (H,) or (W,)
        centre = (along * (torch.arange(len(along)) + 0.5)).sum() / along.sum()
        found.append(round(float(centre) / size - (count // 2 + 0.5), 2))
    return found[0], found[1]


def _sensitivity(model: nn.Module, anatomy: Anatomy, images: Tensor, cell: tuple[int, int]) -> Tensor:
    """How much each pixel moves the features of one cell, (H, W)."""
    carrier = Carrier(anatomy)
    carrier.attach(model)
    images = images.detach().requires_grad_()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        with torch.enable_grad(), evaluating(model), unchanged(model):
            rows, cols = anatomy.cells(images)
            with carrier.passing(Pass(rows * cols)) as current:
                score(model, anatomy.kind, anatomy.family, {"pixel_values": images, **anatomy.options})
            assert current.features is not None
            chosen = current.features[:, cell[0] * cols + cell[1]]  # (B, D)
            direction = torch.randn(chosen.shape, generator=torch.Generator().manual_seed(0)).to(chosen)
            (gradient,) = torch.autograd.grad((chosen * direction).sum(), images)
    finally:
        carrier.detach()
        for parameter in trained:
            parameter.requires_grad_(True)
    return gradient.float().square().sum(dim=(0, 1)).cpu()  # (B, C, H, W) -> (H, W)
