"""One forward pass on noise, in which everything is written down: who was called, in which order, what came out."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shapadapter.backbone.anatomy import Anatomy, Kind, evaluating, original_name
from shapadapter.backbone.attention import recorded_attention
from shapadapter.backbone.families import Family
from shapadapter.backbone.forward import ask
from shapadapter.backbone.precision import FaintSignalError, exceeds_rounding

_Shape = tuple[int, ...] | None


@dataclass(frozen=True)
class DryRun:
    """What was seen in one pass.

    Attributes:
        image: (height, width), or (rows, cols) of patches.
        options: further keyword arguments the pass was given.
        calls: for each module, the shapes of first argument and output, call by call.
        order: each finished call, by module and shape of its output.
        attentions: the modules that called transformers' attention interface, in call order.
        scores: the scores (2, K), embeddings (2, P), or None.
        reply: these, or of a model without scores the first tensor in its output.
    """

    image: tuple[int, int]
    options: dict[str, Any]
    calls: dict[nn.Module, list[tuple[_Shape, _Shape]]]
    order: list[tuple[nn.Module, _Shape]]
    attentions: list[nn.Module]
    scores: Tensor | None
    reply: Tensor | None


def dry_run(
    model: nn.Module, kind: Kind, family: Family, image: tuple[int, int], options: dict[str, Any] | None = None
) -> DryRun:
    """Run the model on two noise images without changing anything in it."""
    calls: dict[nn.Module, list[tuple[_Shape, _Shape]]] = {}
    order: list[tuple[nn.Module, _Shape]] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        came, went = _shape(args[0] if args else kwargs.get("hidden_states")), _shape(first_tensor(output))
        calls.setdefault(module, []).append((came, went))
        order.append((module, went))

    handles = [module.register_forward_hook(note, with_kwargs=True) for module in model.modules()]
    inputs = {**noise(model, family, image), **(options or {})}
    try:
        with torch.no_grad(), evaluating(model), unchanged(model), recorded_attention(model) as attentions:
            scores, replied = ask(model, kind, family, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return DryRun(image, options or {}, calls, order, attentions, scores, replied)


@dataclass
class Stream:
    """What enters the first block, and what the module with the features returns to those behind it."""

    entering: Tensor | None = None
    leaving: Tensor | None = None

    def moved(self) -> Tensor:
        """What the blocks add, (2, T, D)."""
        assert self.entering is not None
        assert self.leaving is not None
        return self.leaving - self.entering


@contextmanager
def watched(model: nn.Module, anatomy: Anatomy) -> Iterator[Stream]:
    """Watch the passes in the context from outside of a carrier that is attached already."""
    stream = Stream()

    def enter(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stream.entering = args[0] if args else kwargs["hidden_states"]

    def leave(source: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        stream.leaving = first_tensor(output)

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if original_name(name) in anatomy.blocks[:1]:
                hooks.enter_context(module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True))
            if original_name(name) == anatomy.source:
                hooks.enter_context(module.register_forward_hook(leave))
        yield stream


def all_flows_through(model: nn.Module, kind: Kind, family: Family, run: DryRun, source: str) -> bool:
    """Whether the model's reply knows nothing of the image but what the module `source` returned.

    Shown the images of the dry run, it must reply as to others if that module returns what it returned for those.

    Raises:
        FaintSignalError: the reply to both images of the dry run is the same up to rounding, which proves nothing.
    """
    first = run.reply
    if first is None:
        return True
    if first.dtype != torch.float64 and not exceeds_rounding(first[0] - first[1], first):
        raise FaintSignalError("the scores do not depend on the image")
    kept: list[Any] = []

    def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        kept.append(copy.deepcopy(output))  # what runs behind may write into it

    def exchange(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return copy.deepcopy(kept[0])

    def replied(seed: int, hook: Any) -> Tensor:
        with model.get_submodule(source).register_forward_hook(hook):
            _, found = ask(model, kind, family, {**noise(model, family, run.image, seed), **run.options})
        assert found is not None
        return found

    with torch.no_grad(), evaluating(model), unchanged(model):
        second, exchanged = replied(1, keep), replied(0, exchange)
    # Beside the difference that the images make: in an untrained model it may be tiny.
    return bool((exchanged - second).abs().max() <= 1e-2 * (second - first).abs().max())


def first_tensor(output: Any) -> Tensor | None:
    """The tensor itself, `last_hidden_state`, or the first of a tuple."""
    found = getattr(output, "last_hidden_state", output)
    if isinstance(found, tuple | list):
        found = found[0] if found else None
    return found if isinstance(found, Tensor) else None


def _shape(tensor: Any) -> _Shape:
    return tuple(tensor.shape) if isinstance(tensor, Tensor) else None


def noise(model: nn.Module, family: Family, image: tuple[int, int], seed: int = 0) -> dict[str, Tensor]:
    """Inputs of two random images, on the model's device and in its dtype; the global generator is not touched."""
    generator = torch.Generator().manual_seed(seed)
    parameter = next(p for p in model.parameters() if p.is_floating_point())
    channels, patch = channels_of(model), patch_side(model)
    if not family.patches:
        pixels = torch.randn(2, channels, *image, generator=generator, device="cpu")
        return {"pixel_values": pixels.to(parameter.device, parameter.dtype)}
    valid, padding = image[0] * image[1], 2
    patches = torch.randn(2, valid + padding, channels * patch**2, generator=generator, device="cpu")
    mask = (torch.arange(valid + padding, device="cpu") < valid).long().expand(2, -1)  # (2, N)
    return {
        "pixel_values": patches.to(parameter.device, parameter.dtype),
        "pixel_attention_mask": mask.to(parameter.device),
        "spatial_shapes": torch.tensor([image, image], device=parameter.device),
    }


def _vision_configs(model: nn.Module) -> list[Any]:
    config: Any = getattr(model, "config", None)
    return [c for c in (getattr(config, "vision_config", None), config) if c is not None]


def channels_of(model: nn.Module) -> int:
    """Colour channels, by the config; 3 if that does not say."""
    counts = [getattr(config, "num_channels", None) for config in _vision_configs(model)]
    counts += [_timm_input(model).get("in_chans")]
    return next((count for count in counts if isinstance(count, int)), 3)


def patch_side(model: nn.Module) -> int:
    """Side of a patch in pixels, by the config; 1 if that does not say."""
    sides = (getattr(config, "patch_size", None) for config in _vision_configs(model))
    return next((side for side in sides if isinstance(side, int)), 1)


def configured_size(model: nn.Module) -> tuple[int, int] | None:
    """The (height, width) the config names."""
    sizes = [getattr(config, "image_size", None) for config in _vision_configs(model)]
    sizes += [_timm_input(model).get("img_size")]
    size = next((size for size in sizes if size is not None), None)
    if size is None:
        return None
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _timm_input(model: nn.Module) -> dict[str, Any]:
    """`in_chans` and `img_size` of a timm model: as it was told, or else as it was pretrained; of others, nothing."""
    config: Any = getattr(model, "config", None)
    own: Any = getattr(model, "timm_model", None)
    pretrained = getattr(config, "pretrained_cfg", None) or getattr(own, "pretrained_cfg", None) or {}
    channels, *size = pretrained.get("input_size") or (None,)
    told = getattr(config, "model_args", None) or {}
    return {"in_chans": channels, "img_size": size or None, **told}


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Undo what a forward pass changes: some models adjust themselves to the image they see, as Swin its windows."""
    plain = (bool, int, float, str, tuple)
    before = [(m, {k: v for k, v in vars(m).items() if isinstance(v, plain)}) for m in model.modules()]
    try:
        yield
    finally:
        for module, attributes in before:
            vars(module).update(attributes)
