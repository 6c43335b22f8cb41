"""Find the parts of a vision model by dry runs, not by a table of names: here, sequences of patch tokens."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from shapadapter.backbone.anatomy import Anatomy, Kind, reached
from shapadapter.backbone.dry_run import DryRun, channels_of, configured_size, dry_run
from shapadapter.backbone.families import Family, family_of
from shapadapter.backbone.forward import kind_of
from shapadapter.core.errors import UnsupportedModelError

# More tokens than this in front of the cells are something else.
MOST_PREFIX = 16

INTERPOLATE = {"interpolate_pos_encoding": True}
_Attempts = Iterable[tuple[tuple[int, int] | None, dict[str, Any]]]


class AmbiguousModelError(UnsupportedModelError):
    """Two parts of the model could be the one that is looked for."""


def find_sequence(model: nn.Module) -> Anatomy:
    """The parts of a model that keeps one token for each patch from its first block to its last.

    Raises:
        UnsupportedModelError: it is none; the message says what was looked for and found.
        AmbiguousModelError: two lists of blocks could be meant.
    """
    family, kind = known(model)
    if family.features is not None:
        raise UnsupportedModelError("its features were named, so they are read out")
    names = {module: name for name, module in model.named_modules()}
    conv = next((m for m in names if isinstance(m, nn.Conv2d) and m.kernel_size == m.stride > (1, 1)), None)
    if conv is None and not family.patches:
        raise UnsupportedModelError("looked for the convolution that cuts images in patches, found none")
    cell = (conv.kernel_size[0], conv.kernel_size[1]) if conv is not None else (1, 1)
    small = (3 * cell[0], 4 * cell[1])
    run = first_run(model, kind, family, [(small, {}), (small, INTERPOLATE), (configured_size(model), {})])
    blocks, tokens, width = _blocks(names, run)
    rows, cols = run.image[0] // cell[0], run.image[1] // cell[1]
    if family.patches:
        tokens = rows * cols  # the rest is padding
    if not 0 <= tokens - rows * cols <= MOST_PREFIX:
        raise UnsupportedModelError(f"{rows * cols} patches enter, but the blocks hold {tokens} tokens")
    return Anatomy(
        kind=settled(kind, run),
        family=family,
        source=blocks[-1],
        layout="tokens",
        backbone=leading(names, run, blocks[-1]),
        behind=behind(names, run, blocks[-1]),
        entrance=entrance(names, run),
        cell=cell,
        rounds_up=False,
        channels=conv.in_channels if conv is not None else channels_of(model),
        prefix=tokens - rows * cols,
        width=width,
        classes=classes(model, run),
        sample=run.image,
        options=run.options,
        blocks=blocks,
        attentions=_seats(names, run, blocks),
    )


def _seats(names: dict[nn.Module, str], run: DryRun, blocks: tuple[str, ...]) -> tuple[str, ...]:
    """The attention modules in which a token can be hidden: one in each block, or none at all."""
    seats = tuple(names[module] for module in run.attentions)
    hidden = len(seats) == len(blocks) and all(s.startswith(f"{b}.") for s, b in zip(seats, blocks, strict=True))
    if seats and not hidden:
        raise UnsupportedModelError(
            f"expected one call of transformers' attention interface in each of {len(blocks)} blocks, saw {list(seats)}"
        )
    return seats


def known(model: nn.Module) -> tuple[Family, Kind]:
    """What can be said of a model before it runs.

    Raises:
        UnsupportedModelError: it is no vision model, or of a refused family.
    """
    config = getattr(model, "config", None)
    if not isinstance(model, nn.Module) or config is None or not hasattr(config, "num_labels"):
        raise UnsupportedModelError(
            f"Expected a Hugging Face vision model (AutoModelForImageClassification.from_pretrained(...)), "
            f"got {type(model).__name__}.{_hint(model)}"
        )
    family = family_of(model)
    if "pixel_values" not in inspect.signature(model.forward).parameters:
        raise UnsupportedModelError(
            f"Expected a vision model, got {type(model).__name__}, whose forward takes no pixel_values.{_hint(model)}"
        )
    kind = kind_of(model)
    if kind == "matching" and not isinstance(getattr(model, "logit_scale", None), nn.Parameter):
        raise UnsupportedModelError(
            f"Expected a model that matches images with texts by a scaled product of embeddings, as CLIP and SigLIP do; "
            f"{type(model).__name__} has no logit_scale."
        )
    return family, kind


def _hint(model: Any) -> str:
    """Which model to wrap instead of one that is around it."""
    modules = model.named_modules() if isinstance(model, nn.Module) else ()
    inner = next((name for name, module in modules if name and isinstance(module, PreTrainedModel)), None)
    return "" if inner is None else f" Wrap the model inside: get_peft_model({reached('outer', inner)}, ...)."


def first_run(model: nn.Module, kind: Kind, family: Family, attempts: _Attempts) -> DryRun:
    """The first of several attempts that works: many models take any size, some only with an option, some one size."""
    failure: Exception | None = None
    for image, options in attempts:
        if image is None:
            continue
        try:
            return dry_run(model, kind, family, image, options)
        except Exception as error:
            failure = error
    raise UnsupportedModelError(
        f"a forward pass on a tiny batch of images failed ({type(failure).__name__}: {failure})"
    ) from failure


def settled(kind: Kind, run: DryRun) -> Kind:
    """What kind of model it turned out to be."""
    return "headless" if run.scores is None else kind


def classes(model: Any, run: DryRun) -> int:
    """K: what the model scores, or what its config says of one without scores.

    Raises:
        UnsupportedModelError: the scores are no (B, K).
    """
    if run.scores is None:
        return int(model.config.num_labels)
    if run.scores.ndim != 2:
        raise UnsupportedModelError(
            f"expected scores of shape (batch, classes), got {tuple(run.scores.shape)}; load the model with "
            "AutoModelForImageClassification"
        )
    return run.scores.shape[-1]


def _blocks(names: dict[nn.Module, str], run: DryRun) -> tuple[tuple[str, ...], int, int]:
    """The one list of alike modules that each map (B, T, D) to (B, T, D): names, T and D."""
    found: list[tuple[tuple[str, ...], int, int]] = []
    for module, name in names.items():
        children = list(module.children())
        if not isinstance(module, nn.ModuleList | nn.Sequential) or not children:
            continue
        if len({type(child) for child in children}) > 1 or any(len(run.calls.get(c, [])) != 1 for c in children):
            continue
        shapes = {shape for child in children for shape in run.calls[child][0]}
        shape = shapes.pop()
        if not shapes and shape is not None and len(shape) == 3 and shape[0] == 2:
            found.append((tuple(f"{name}.{key}" for key, _ in module.named_children()), shape[1], shape[2]))
    if len(found) == 1:
        return found[0]
    listed = "; ".join(f"{blocks[0]} .. {blocks[-1]}" for blocks, _, _ in found) or "none"
    message = (
        "looked for the only list of alike blocks that map (batch, tokens, features) to the same shape, found "
        f"{len(found)}: {listed}"
    )
    if len({(tokens, width) for _, tokens, width in found}) < len(found):
        raise AmbiguousModelError(
            f"{message}. Name the module whose output is the final feature map, for example: "
            f"shapadapter.register_family(type(model), features={found[-1][0][-1]!r})"
        )
    raise UnsupportedModelError(message)


def leading(names: dict[nn.Module, str], run: DryRun, source: str) -> tuple[str, ...]:
    """The model's children that ran before the features were there, in order of the model."""
    ran = {names[module].split(".")[0] for module in finished(names, run, source)[0] if names.get(module)}
    return tuple(dict.fromkeys(part for name in names.values() if (part := name.split(".")[0]) in ran))


def behind(names: dict[nn.Module, str], run: DryRun, source: str) -> tuple[str, ...]:
    """The modules with parameters of their own that ran only after the features were there."""
    before, after = finished(names, run, source)
    late = [module for module in dict.fromkeys(after) if module not in set(before) and names.get(module)]
    # What holds the source ends after it, too, as timm's models do with a class token of their own.
    late = [module for module in late if not source.startswith(f"{names[module]}.")]
    return tuple(names[module] for module in late if any(True for _ in module.parameters(recurse=False)))


def finished(names: dict[nn.Module, str], run: DryRun, source: str) -> tuple[list[nn.Module], list[nn.Module]]:
    """What had finished when the features were there, and what finished later."""
    end = max(index for index, (module, _) in enumerate(run.order) if names.get(module) == source)
    modules = [module for module, _ in run.order]
    return modules[: end + 1], modules[end + 1 :]


def entrance(names: dict[nn.Module, str], run: DryRun) -> str:
    """The first module that ran and has parameters of its own."""
    return next(names[module] for module, _ in run.order if any(True for _ in module.parameters(recurse=False)))
