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
    units = torch.eye(linear.in_features, device=linear.weight.device, dtype=_float_of(linear))  # (in, in)
    rows: Tensor = linear(units)  # (in, out)
    return (rows if linear.bias is None else rows - linear.bias.to(rows)).T


def _float_of(linear: nn.Linear) -> torch.dtype:
    """In what numbers a quantised layer reckons: its bias is left as it was."""
    return torch.float32 if linear.bias is None else linear.bias.dtype


def check_apart(model: nn.Module) -> None:
    """Refuse layers in which the images and patches of a batch influence each other.

    Raises:
        UnsupportedModelError: bitsandbytes looks for outliers in the whole batch.
    """
    for path, module in model.named_modules():
        if getattr(getattr(module, "state", None), "threshold", 0) > 0:
            raise UnsupportedModelError(
                f"{path} looks for outliers in the whole batch, so that removed patches and the Shapley token would "
                "influence the others. Load the base without that: BitsAndBytesConfig(load_in_8bit=True, "
                "llm_int8_threshold=0.0)."
            )


def check_trainable(model: nn.Module, config: ShapleyConfig) -> None:
    """Refuse to train what has no gradient, or what lies before it.

    Raises:
        UnsupportedModelError: quantised weights are to be trained, or pass on no gradient.
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
    layers = ((path, m) for path, m in model.named_modules() if isinstance(m, nn.Linear) and is_quantised(m.weight))
    path, first = next(layers, ("", None))
    if first is not None and not _passes_gradient(first):
        raise UnsupportedModelError(
            f"The weights of {path} are quantised in a way that passes on no gradient here, so that nothing before them "
            "would be trained. Use BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0) or TorchAoConfig("
            "Int8WeightOnlyConfig()); bitsandbytes' 4 bits can be trained on a GPU."
        )


def _passes_gradient(linear: nn.Linear) -> bool:
    trained = linear.training
    linear.train()
    try:
        with torch.inference_mode(False), torch.enable_grad():
            leaf = torch.ones(
                2, linear.in_features, device=linear.weight.device, dtype=_float_of(linear)
            ).requires_grad_()
            (gradient,) = torch.autograd.grad(linear(1 * leaf).sum(), leaf)
        return bool(gradient.any())
    except RuntimeError:  # there is no graph, or bitsandbytes writes into what has none
        return False
    finally:
        linear.train(trained)
