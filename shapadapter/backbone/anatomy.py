"""Find the parts of a token-sequence vision model by one dry run, not by a table of names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shapadapter.errors import ImageError, UnsupportedModelError

from .attention import recorded_attention

# Attention projections that LoRA adapts by default, under the names transformers 5 gives them.
_QUERY_VALUE = ("q_proj", "v_proj")

# What each module was given first and what it returned, call by call.
_Calls = dict[nn.Module, list[tuple[Any, Any]]]


@dataclass(frozen=True)
class Anatomy:
    """Where a token-sequence model keeps what the adapter needs.

    Attributes:
        blocks: names of the transformer blocks, first to last; each maps (B, T, D) to (B, T, D).
        attentions: names of their self-attention modules, one for each block.
        embedding: name of the convolution that cuts the image in patches.
        patch: (height, width) of a patch in pixels.
        channels: colour channels of the image.
        prefix: tokens in front of the patches (class token, distillation token, registers).
        width: D, the features of a token.
        classes: K, the model's scores.
        sample: (height, width) of an image on which a forward pass was seen to work.
        options: keyword arguments that pass was given.
    """

    blocks: tuple[str, ...]
    attentions: tuple[str, ...]
    embedding: str
    patch: tuple[int, int]
    channels: int
    prefix: int
    width: int
    classes: int
    sample: tuple[int, int]
    options: dict[str, Any]

    def grid(self, pixel_values: Tensor) -> tuple[int, int]:
        """The players' (rows, cols) on images (B, C, H, W).

        Raises:
            ImageError: the images are not (B, C, H, W), have other channels, or are smaller than a patch.
        """
        if pixel_values.ndim != 4 or pixel_values.shape[1] != self.channels:
            raise ImageError(
                f"Expected pixel_values of shape (batch, {self.channels}, height, width), got "
                f"{tuple(pixel_values.shape)}."
            )
        rows, cols = pixel_values.shape[2] // self.patch[0], pixel_values.shape[3] // self.patch[1]
        if rows * cols < 2:
            raise ImageError(
                f"An image of {pixel_values.shape[2]} x {pixel_values.shape[3]} pixels holds {rows} x {cols} "
                f"patches of {self.patch[0]} x {self.patch[1]}; the game needs at least two players. Send larger images."
            )
        return rows, cols


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run without dropout and drop path, and leave every module's mode as it was found."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def linear_layers(model: nn.Module, anatomy: Anatomy) -> list[str]:
    """Names of all linear layers inside the blocks: what PEFT's "all-linear" means here, the classifier left out."""
    inside = tuple(f"{block}." for block in anatomy.blocks)
    names = {
        original_name(name)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "lora_" not in name
    }
    return sorted(name for name in names if name.startswith(inside))


def default_targets(model: nn.Module, anatomy: Anatomy) -> list[str]:
    """The suffixes LoRA adapts when the user names no modules: the query and value projections.

    Raises:
        UnsupportedModelError: the attention modules have no projections of a known name.
    """
    attention = model.get_submodule(anatomy.attentions[0])
    names = {
        original_name(name)
        for name, module in attention.named_modules()
        if isinstance(module, nn.Linear) and "lora_" not in name
    }
    if not names.issuperset(_QUERY_VALUE):
        raise UnsupportedModelError(
            f"No default LoRA targets for {type(model).__name__}: looked for linear layers {list(_QUERY_VALUE)} in "
            f"{type(attention).__name__}, found {sorted(names)}. Name them: ShapleyConfig(target_modules=[...])."
        )
    return list(_QUERY_VALUE)


def examine(model: PreTrainedModel) -> Anatomy:
    """Find blocks, attention modules and grid of a token-sequence vision classifier by one dry run.

    The model's outputs are not used and nothing in it is changed.

    Raises:
        UnsupportedModelError: a part is missing or ambiguous; the message says what was looked for and found.
    """
    config = getattr(model, "config", None)
    if not isinstance(model, nn.Module) or config is None or not hasattr(config, "num_labels"):
        raise UnsupportedModelError(
            f"Expected a Hugging Face vision classifier (AutoModelForImageClassification.from_pretrained(...)), "
            f"got {type(model).__name__}."
        )
    before = _plain_attributes(model)
    try:
        return _examine(model)
    except UnsupportedModelError:
        # Some models adjust themselves to the image they see, as Swin does its windows.
        for module, attributes in before:
            vars(module).update(attributes)
        raise


def _plain_attributes(model: nn.Module) -> list[tuple[nn.Module, dict[str, Any]]]:
    plain = (bool, int, float, str, tuple)
    return [(m, {k: v for k, v in vars(m).items() if isinstance(v, plain)}) for m in model.modules()]


def _examine(model: PreTrainedModel) -> Anatomy:
    name, embedding = _patch_embedding(model)
    calls, attentions, logits, image, options = _dry_run(model, embedding)
    blocks, tokens, width = _blocks(model, calls)
    players = (image[0] // embedding.kernel_size[0]) * (image[1] // embedding.kernel_size[1])
    names = {module: n for n, module in model.named_modules()}
    seats = tuple(names[module] for module in attentions)
    if len(seats) != len(blocks) or any(not seat.startswith(f"{b}.") for seat, b in zip(seats, blocks, strict=True)):
        raise UnsupportedModelError(
            f"{type(model).__name__}: expected one call of transformers' attention interface in each of its "
            f"{len(blocks)} blocks, saw {len(seats)}: {list(seats)}. Without it the token cannot be hidden."
        )
    if tokens < players:
        raise UnsupportedModelError(
            f"{type(model).__name__}: {players} patches enter but the blocks hold only {tokens} tokens; "
            "the players cannot be told apart."
        )
    return Anatomy(
        blocks=blocks,
        attentions=seats,
        embedding=name,
        patch=(embedding.kernel_size[0], embedding.kernel_size[1]),
        channels=embedding.in_channels,
        prefix=tokens - players,
        width=width,
        classes=logits.shape[-1],
        sample=image,
        options=options,
    )


def _patch_embedding(model: nn.Module) -> tuple[str, nn.Conv2d]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == module.stride and min(module.kernel_size) > 1:
            return name, module
    raise UnsupportedModelError(
        f"{type(model).__name__}: looked for the convolution that cuts images in patches (kernel size equal to its "
        "stride) and found none. Supported are vision transformers that keep one token for each patch."
    )


def _dry_run(
    model: PreTrainedModel, embedding: nn.Conv2d
) -> tuple[_Calls, list[nn.Module], Tensor, tuple[int, int], dict[str, Any]]:
    """One forward pass on noise, at 3 x 4 patches where the model takes any size, else at its configured size."""
    small = (3 * embedding.kernel_size[0], 4 * embedding.kernel_size[1])
    failure: Exception | None = None
    attempts: list[tuple[tuple[int, int] | None, dict[str, Any]]] = [
        (small, {"interpolate_pos_encoding": True}),
        (_configured_size(model), {}),
    ]
    for image, options in attempts:
        if image is None:
            continue
        try:
            return (*_record(model, noise(embedding, image), options), image, options)
        except Exception as error:
            failure = error
    raise UnsupportedModelError(
        f"{type(model).__name__}: a forward pass on a tiny batch of images failed "
        f"({type(failure).__name__}: {failure}). Expected an image classifier that takes pixel_values (batch, channels, height, width)."
    ) from failure


def noise(embedding: nn.Conv2d, image: tuple[int, int], seed: int = 0) -> Tensor:
    """Two random images (2, C, H, W) on the model's device and in its dtype; the global generator is not touched."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(2, embedding.in_channels, *image, generator=generator)
    return pixels.to(embedding.weight.device, embedding.weight.dtype)


def _configured_size(model: nn.Module) -> tuple[int, int] | None:
    for config in (model.config, getattr(model.config, "vision_config", None)):
        size = getattr(config, "image_size", None)
        if size is not None:
            return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    return None


def _record(
    model: PreTrainedModel, pixel_values: Tensor, options: dict[str, Any]
) -> tuple[_Calls, list[nn.Module], Tensor]:
    """Who was called with what, who called the attention interface, and the logits (2, K)."""
    calls: _Calls = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls.setdefault(module, []).append((args[0] if args else kwargs.get("hidden_states"), output))

    handles = [module.register_forward_hook(note, with_kwargs=True) for module in model.modules()]
    try:
        with torch.no_grad(), evaluating(model), recorded_attention(model) as attentions:
            output = model(pixel_values=pixel_values, **options)
    finally:
        for handle in handles:
            handle.remove()
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[-1] != model.config.num_labels:
        raise UnsupportedModelError(
            f"expected .logits of shape (batch, num_labels={model.config.num_labels}) from {type(model).__name__}, "
            f"got {tuple(logits.shape) if isinstance(logits, Tensor) else type(output).__name__}; "
            "load it with AutoModelForImageClassification"
        )
    return calls, attentions, logits


def _blocks(model: nn.Module, calls: _Calls) -> tuple[tuple[str, ...], int, int]:
    """The one list of alike modules that each map (B, T, D) to (B, T, D): names, T and D."""
    found: list[tuple[tuple[str, ...], int, int]] = []
    for name, module in model.named_modules():
        children = list(module.children())
        if not isinstance(module, nn.ModuleList | nn.Sequential) or not children:
            continue
        if len({type(child) for child in children}) > 1 or any(len(calls.get(child, [])) != 1 for child in children):
            continue
        ends = [calls[child][0] for child in children]
        shapes = {tuple(end.shape) if isinstance(end, Tensor) else None for pair in ends for end in pair}
        shape = shapes.pop()
        if not shapes and shape is not None and len(shape) == 3:
            found.append((tuple(f"{name}.{key}" for key, _ in module.named_children()), shape[1], shape[2]))
    if len(found) != 1:
        listed = "; ".join(f"{blocks[0]} .. {blocks[-1]}" for blocks, _, _ in found) or "none"
        raise UnsupportedModelError(
            f"{type(model).__name__}: looked for the only list of alike blocks that map (batch, tokens, features) to "
            f"the same shape, found {len(found)}: {listed}. Supported are plain token-sequence vision transformers "
            "(ViT, DeiT, ViT-MSN, DINOv2, I-JEPA, CLIP, MetaCLIP 2, SigLIP)."
        )
    return found[0]


def original_name(name: str) -> str:
    """A module's name without the wrappers PEFT puts in between (base_layer, modules_to_save)."""
    kept: list[str] = []
    skip = False
    for part in name.split("."):
        if skip:
            skip = False  # the adapter's name, behind modules_to_save
        elif part == "modules_to_save":
            skip = True
        elif part not in ("original_module", "base_layer"):
            kept.append(part)
    return ".".join(kept)
