"""Draw presence.png: what the gradient by presence is made of, on one test picture of the demo.

python docs/presence.py demo-output docs/presence.png
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch
from matplotlib import pyplot as plt
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor

from shapadapter import attribute, explain, load
from shapadapter.adapter import ShapleyLayer
from shapadapter.backbone import ForwardCall, base_forward
from shapadapter.core.statistics import relative_l2


def own_contributions(model, pixels: Tensor, target: int) -> Tensor:
    """What each patch votes by itself for one class, (N,)."""
    layer = next(module for module in model.modules() if isinstance(module, ShapleyLayer))
    cells = layer.tiling(pixels).cells
    with torch.no_grad(), layer.hooks.during(ForwardCall(math.prod(cells))) as call:
        base_forward(model.get_base_model())(pixel_values=pixels)
        head = layer.head(layer.active)
        return head.vote(head.norm(call.features))[0, :, target] / math.prod(cells)


def main(demo: Path, output: Path) -> None:
    model, processor = load(str(demo / "adapter"))[0].eval(), AutoImageProcessor.from_pretrained(demo / "pretrained")
    pictures = sorted((demo / "test" / "eight").glob("*.png"))
    named = explain(model, pictures, processor, top_k=1).top(1)
    picture = next(file for file, best in zip(pictures, named, strict=True) if best[0].label == "eight")
    options = {"top_k": 1, "seed": 0}
    felt = attribute(model, picture, processor, method="presence_gradient", **options)
    truth = attribute(model, picture, processor, method="permutation", evaluations=126 * 80, **options)
    both = explain(model, picture, processor, top_k=1, refine="gradient")
    grid = felt.attributions.shape[1:3]
    pixels = processor(Image.open(picture).convert("RGB"), return_tensors="pt")["pixel_values"]
    own = own_contributions(model, pixels, int(felt.classes[0, 0])).view(grid)
    total, true, mean = (each.attributions[0, ..., 0] for each in (felt, truth, both))

    def near(values: Tensor) -> str:
        return f"error {relative_l2(values.flatten(), true.flatten()):.2f}"

    maps = {
        "a patch's own\ncontribution": own - own.mean() + true.mean(),
        "what the others say\nbecause of it": total - own + own.mean(),
        f"the sum: the gradient\n{near(total)}": total,
        f"mean of gradient and head\n{near(mean)}": mean,
        "the Shapley values": true,
    }
    bound = float(max(values.abs().max() for values in maps.values()))
    figure, axes = plt.subplots(1, 1 + len(maps), figsize=(13, 2.7), layout="constrained")
    axes[0].imshow(felt.images[0].numpy())
    axes[0].set_title(f"{felt.top(1)[0][0].label}", fontsize=10)
    for axis, (title, values) in zip(axes[1:], maps.items(), strict=True):
        axis.imshow(values.numpy(), cmap="RdBu_r", vmin=-bound, vmax=bound)
        axis.set_title(title, fontsize=10)
    for axis in axes:
        axis.set_axis_off()
    figure.savefig(output, dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
