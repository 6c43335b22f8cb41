"""Which layers of a vision model LoRA adapts, and which of its children are trained in full."""

from __future__ import annotations

from torch import nn

from shapadapter.backbone.anatomy import Anatomy
from shapadapter.backbone.dry_run import dry_run
from shapadapter.backbone.families import original_name
from shapadapter.core.errors import UnsupportedModelError

# Attention projections that LoRA adapts by default, under the names they have in transformers and timm.
_QUERY_VALUE = (("q_proj", "v_proj"), ("query", "value"), ("query_proj", "value_proj"), ("qkv",))


def linear_layers(model: nn.Module, anatomy: Anatomy) -> list[str]:
    """Names of all linear layers inside the backbone: what PEFT's "all-linear" means here, the classifier left out."""
    return [name for name, module in _inside(model, anatomy) if isinstance(module, nn.Linear)]


def default_targets(model: nn.Module, anatomy: Anatomy) -> list[str]:
    """The layers LoRA adapts when the user names no modules.

    In a transformer the query and value projections of all attention modules; in a convolutional model every linear
    layer and every convolution that mixes all channels, the first one left out. Suffixes if they fit no other part of
    the model, else whole names.
    """
    inside = _inside(model, anatomy)
    linear = [name for name, module in inside if isinstance(module, nn.Linear)]
    for suffixes in _QUERY_VALUE:
        found = [name for name in linear if name.split(".")[-1] in suffixes]
        if {name.split(".")[-1] for name in found} == set(suffixes):
            names = {original_name(name) for name, _ in model.named_modules() if "lora_" not in name}
            only_there = {name for name in names if name.split(".")[-1] in suffixes} == set(found)
            return list(suffixes) if only_there else found
    if anatomy.attentions:
        raise UnsupportedModelError(
            f"no default LoRA targets: looked for linear layers {[list(pair) for pair in _QUERY_VALUE]}, found "
            f"{sorted({name.split('.')[-1] for name in linear})}. Name them: ShapleyConfig(target_modules=[...])"
        )
    mixing = [n for n, m in inside if isinstance(m, nn.Linear) or (isinstance(m, nn.Conv2d) and m.groups == 1)]
    mixing = [name for name in mixing if name != anatomy.entrance]
    if not mixing:
        raise UnsupportedModelError("no default LoRA targets: the backbone has neither linear layers nor convolutions")
    return mixing


def _inside(model: nn.Module, anatomy: Anatomy) -> list[tuple[str, nn.Module]]:
    """The backbone's modules, by original name: the blocks', or all that the image runs through.

    Only those that are called: of some layers, as of timm's BEiT, the model takes the weights alone, and LoRA on them
    would train nothing.
    """
    inside = tuple(f"{part}." for part in anatomy.blocks or anatomy.backbone)
    called = dry_run(model, anatomy, anatomy.sample, anatomy.options).calls
    named = {original_name(name): m for name, m in model.named_modules() if m in called and "lora_" not in name}
    behind = tuple(f"{part}." for part in anatomy.behind)
    return [(n, m) for n, m in named.items() if f"{n}.".startswith(inside) and not f"{n}.".startswith(behind)]


def trainable_parts(model: nn.Module, anatomy: Anatomy, prediction: str, own: str) -> list[str]:
    """The model's children that full training trains: the backbone, and the classifier if it predicts; not `own`."""
    heads = [
        name
        for name, child in model.named_children()
        if name not in (*anatomy.backbone, own) and any(True for _ in child.parameters())
    ]
    backbone = [name for name in anatomy.backbone if any(True for _ in model.get_submodule(name).parameters())]
    return [_unmistakable(model, name) for name in (*backbone, *(heads if prediction == "classifier" else []))]


def head_parts(model: nn.Module, anatomy: Anatomy, *, new: bool) -> list[str]:
    """The modules that lead from the final features to the scores: the classifier.

    A classifier is new if the model was loaded without it, from a checkpoint of another number of classes or of a
    backbone, and it was not trained since. transformers marks each weight that it has read; where no weight is marked,
    the model was made from a configuration, or copied, and what its linear layers hold decides.
    With `new`, the new modules only. Returns names by which PEFT finds them and no others.
    """
    weights = [(n, p) for n, p in model.named_parameters() if "lora_" not in n and ".modules_to_save." not in n]
    named = {original_name(name): weight for name, weight in weights}
    read = {n for n, w in named.items() if getattr(w, "_is_hf_initialized", False) or not w.is_floating_point()}
    behind = {name for name in named if name.startswith(tuple(f"{part}." for part in anatomy.behind))}
    outside = {name for name in behind if name.split(".")[0] not in anatomy.backbone}
    wanted = (outside or behind) if not new else behind - read if read else outside
    layers = [(original_name(name), m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    linear = [layer for name, layer in layers if f"{name}.weight" in wanted]
    unknown = not read and any(layer.bias is None for layer in linear)
    if new and (unknown or any(map(_is_trained, linear))):
        return []
    tops = sorted({_top(name, wanted, set(named)) for name in wanted})
    return [_unmistakable(model, top, but=tuple(tops)) for top in tops]


def _is_trained(linear: nn.Linear) -> bool:
    """Whether a layer is not as layers start: with biases of zero, or evenly spread between torch's own bounds."""
    if linear.bias is None or not linear.bias.any():
        return False
    bound, weight = linear.in_features**-0.5, linear.weight.float()
    largest = max(weight.abs().max(), linear.bias.abs().max())
    return bool(largest > 1.005 * bound or weight.square().mean().sqrt() < 0.5 * bound)  # an even spread has 0.58


def _top(name: str, wanted: set[str], names: set[str]) -> str:
    """The largest module around a parameter all of whose parameters are `wanted`."""
    parts = name.split(".")[:-1]
    paths = [".".join(parts[: depth + 1]) for depth in range(len(parts))]
    return next(path for path in paths if {n for n in names if n.startswith(f"{path}.")} <= wanted)


def _unmistakable(model: nn.Module, name: str, but: tuple[str, ...] = ()) -> str:
    """A module's name such that PEFT, which compares the ends of names, finds no other module by it than those in `but`.

    With a part of the name that PEFT's wrapper puts in front, if need be; such a model cannot take the adapter without
    the wrapper, by `add_adapter`.
    """
    others = (path for path, _ in model.named_modules() if path not in ("", name, *but))
    return f"model.{name}" if name == "model" or any(path.endswith(name) for path in others) else name
