"""Forward passes on noise, in which everything is written down, and what their numbers show beside rounding.

A signal that a model's own precision loses, as that of a new network without trained norms, is looked for in float64.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from shapadapter.backbone.anatomy import first_tensor
from shapadapter.backbone.attention import recorded_attention
from shapadapter.backbone.families import Family, Profile
from shapadapter.backbone.forward import evaluating, scores_and_reply
from shapadapter.core.errors import UnsupportedModelError

# Rounding that a different split of the same sums may cause, relative to the numbers' size.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}

# Less than this share of the largest number may be rounding.
_ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-13}

_Shape = tuple[int, ...] | None
_Found = TypeVar("_Found")


@dataclass(frozen=True)
class DryRun:
    """What was seen in one pass."""

    model: nn.Module
    profile: Profile
    image: tuple[int, int]  # (height, width), or (rows, cols) of patches
    options: dict[str, Any]  # further keyword arguments the pass was given
    calls: dict[
        nn.Module, list[tuple[_Shape, _Shape]]
    ]  # shapes of each module's first argument and output, call by call
    order: list[tuple[nn.Module, _Shape]]  # each finished call, by module and shape of its output
    attentions: list[nn.Module]  # which called transformers' attention interface, in call order
    scores: Tensor | None  # the scores (2, K), or embeddings (2, P)
    reply: Tensor | None  # these, or of a model without scores the first tensor in its output

    @functools.cached_property
    def names(self) -> dict[nn.Module, str]:
        """The names of the model's modules."""
        return {module: name for name, module in self.model.named_modules()}

    def finished(self, source: str) -> tuple[list[nn.Module], list[nn.Module]]:
        """What had finished when the module `source` had, and what finished later."""
        end = max(index for index, (module, _) in enumerate(self.order) if self.names.get(module) == source)
        modules = [module for module, _ in self.order]
        return modules[: end + 1], modules[end + 1 :]

    def gives_scores(self, module: nn.Module, shape: _Shape) -> bool:
        """Whether an output of this shape, of this module, is like the scores of a classifier."""
        scores = None if self.scores is None else tuple(self.scores.shape)
        return isinstance(module, nn.Linear) and shape is not None and shape == scores


def dry_run(
    model: nn.Module, profile: Profile, image: tuple[int, int], options: dict[str, Any] | None = None
) -> DryRun:
    """Run the model on two noise images without changing anything in it."""
    calls: dict[nn.Module, list[tuple[_Shape, _Shape]]] = {}
    order: list[tuple[nn.Module, _Shape]] = []

    def shape_of(tensor: Any) -> _Shape:
        return tuple(tensor.shape) if isinstance(tensor, Tensor) else None

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        came, went = shape_of(args[0] if args else kwargs.get("hidden_states")), shape_of(first_tensor(output))
        calls.setdefault(module, []).append((came, went))
        order.append((module, went))

    handles = [module.register_forward_hook(note, with_kwargs=True) for module in model.modules()]
    inputs = {**noise(model, profile.family, image), **(options or {})}
    try:
        with undisturbed(model), recorded_attention(model) as attentions:
            scores, reply = scores_and_reply(model, profile, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return DryRun(model, profile, image, options or {}, calls, order, attentions, scores, reply)


def all_flows_through(run: DryRun, source: str) -> bool:
    """Whether the model's reply knows nothing of the image but what the module `source` returned.

    Shown the images of the dry run, it must reply as to others if that module returns what it returned for those.
    The same reply, up to rounding, to both images of the dry run proves nothing.
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

    def reply_to(seed: int, hook: Any) -> Tensor:
        inputs = {**noise(run.model, run.profile.family, run.image, seed), **run.options}
        with run.model.get_submodule(source).register_forward_hook(hook):
            _, found = scores_and_reply(run.model, run.profile, inputs)
        assert found is not None
        return found

    with undisturbed(run.model):
        second, exchanged = reply_to(1, keep), reply_to(0, exchange)
    # Beside the difference that the images make: in an untrained model it may be tiny.
    return bool((exchanged - second).abs().max() <= 1e-2 * (second - first).abs().max())


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


def _configured(model: nn.Module, name: str, timm_name: str | None = None) -> list[Any]:
    """What the configs say of `name`; of a timm model, as it was told, or else as it was pretrained."""
    config: Any = getattr(model, "config", None)
    own: Any = getattr(model, "timm_model", None)
    pretrained = getattr(config, "pretrained_cfg", None) or getattr(own, "pretrained_cfg", None) or {}
    channels, *size = pretrained.get("input_size") or (None,)
    timm = {"in_chans": channels, "img_size": size or None, **(getattr(config, "model_args", None) or {})}
    configs = (getattr(config, "vision_config", None), config)
    return [getattr(each, name, None) for each in configs] + [timm.get(timm_name)]


def channels_of(model: nn.Module) -> int:
    """Color channels, by the config; 3 if that does not say."""
    return next((count for count in _configured(model, "num_channels", "in_chans") if isinstance(count, int)), 3)


def patch_side(model: nn.Module) -> int:
    """Side of a patch in pixels, by the config; 1 if that does not say."""
    return next((side for side in _configured(model, "patch_size") if isinstance(side, int)), 1)


def configured_size(model: nn.Module) -> tuple[int, int] | None:
    """The (height, width) the config names."""
    size = next((size for size in _configured(model, "image_size", "img_size") if size is not None), None)
    if size is None:
        return None
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


@contextmanager
def undisturbed(model: nn.Module, gradients: bool = False) -> Iterator[None]:
    """Run in evaluation mode, without gradients unless asked for, and undo what a forward pass changes.

    Some models adjust themselves to the image they see, as Swin its windows.
    """
    plain = (bool, int, float, str, tuple)
    with torch.set_grad_enabled(gradients), evaluating(model):
        before = [(m, {k: v for k, v in vars(m).items() if isinstance(v, plain)}) for m in model.modules()]
        try:
            yield
        finally:
            for module, attributes in before:
                vars(module).update(attributes)


class FaintSignalError(UnsupportedModelError):
    """What was looked for may be there, but less than the model's own precision can show."""


def exceeds_rounding(part: Tensor, total: Tensor) -> bool:
    """Whether `part`, a difference of numbers as large as `total`, is more than their rounding; in half precision, any is."""
    limit = _ROUNDING.get(total.dtype, 0.0) * total.abs().max().item()
    return part.abs().max().item() > limit


def equal_up_to_rounding(one: Tensor, other: Tensor, moved: Tensor, tolerance: float | None = None) -> bool:
    """Whether features are equal but for rounding, measured by how far blocks `moved` them.

    By themselves they would hide a difference where the blocks are all but silent, as those of a new model with a
    LayerScale of 1e-5.
    """
    share = 10 * (tolerance or TOLERANCE.get(one.dtype, 5e-3))
    eps = torch.finfo(one.dtype).eps
    one, other, moved = (part.detach().cpu().double() for part in (one, other, moved))  # squares of tiny numbers
    return bool((one - other).norm() <= share * moved.norm() + eps * one.norm())


def in_sufficient_precision(ask: Callable[[], _Found], model: nn.Module) -> _Found:
    """What `ask` finds in the model or, where that is too faint, in the model in float64."""
    try:
        return ask()
    except FaintSignalError as error:
        faint = error
    own = [(tensor, tensor.data) for tensor in {*model.parameters(), *model.buffers()} if tensor.is_floating_point()]
    try:
        # The model itself, not a copy, whose methods may still be bound to the original.
        for tensor, data in own:
            tensor.data = data.double()
        return ask()
    except UnsupportedModelError as error:
        why = "" if str(faint) in str(error) else f" Tried in float64, because in the model's own precision {faint}."
        raise UnsupportedModelError(f"{error}{why}") from error
    except (RuntimeError, TypeError) as error:  # quantised weights, or a device that knows no float64
        raise UnsupportedModelError(f"{type(model).__name__}: {faint}, as far as its precision shows.") from error
    finally:
        for tensor, data in own:
            tensor.data = data
