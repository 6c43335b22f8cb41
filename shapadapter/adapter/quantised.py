"""Base models whose weights are stored in 8 or 4 bits, by bitsandbytes or torchao."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shapadapter.errors import UnsupportedModelError

from .config import ShapleyConfig


def is_quantised(weight: Tensor) -> bool:
    """Whether a weight is stored in 8 or 4 bits: as integers or, by torchao, as what only looks like numbers."""
    return not weight.is_floating_point() or type(weight).__module__.startswith("torchao.")


@torch.no_grad()
def plain_weight(linear: nn.Linear) -> Tensor:
    """The weight (out, in) with which a linear layer computes, whatever it stores."""
    if not is_quantised(linear.weight):
        return linear.weight
    # Each library has its own way to tell; what a layer does with the unit vectors they all have in common.
    own = next((p for p in linear.parameters() if p.is_floating_point() and not is_quantised(p)), None)
    dtype = torch.float32 if own is None else own.dtype
    units = torch.eye(linear.in_features, device=linear.weight.device, dtype=dtype)  # (in, in)
    rows: Tensor = linear(units)  # (in, out)
    return (rows if linear.bias is None else rows - linear.bias.to(rows)).T


def check_trainable(model: nn.Module, config: ShapleyConfig) -> None:
    """Refuse to train what has no gradient.

    Raises:
        UnsupportedModelError: quantised weights are to be trained, or bitsandbytes has packed them for a CPU.
    """
    if config.inference_mode:
        return
    parts = set(config.modules_to_save or ())
    for path, module in model.named_modules():
        if parts & {path, f"model.{path}", path.split(".")[-1]} and any(map(is_quantised, module.parameters())):
            way = (
                "tune='full' trains them all. Use tune='lora', or load the base in full precision"
                if config.tune == "full"
                else f"modules_to_save names them. Load the base with them in full precision: BitsAndBytesConfig("
                f"llm_int8_skip_modules=[{path!r}]) or TorchAoConfig(modules_to_not_convert=[{path!r}])"
            )
            raise UnsupportedModelError(f"The weights of {path} are quantised, which cannot be trained, but {way}.")
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise UnsupportedModelError(
                f"bitsandbytes has packed the 4-bit weights of {path} for this CPU, where they pass on no gradient. Train "
                "on a GPU, or load the base in 8 bit: BitsAndBytesConfig(load_in_8bit=True)."
            )
