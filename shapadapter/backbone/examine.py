"""Find the parts of a vision model by dry runs, not by a table of names."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from shapadapter.errors import UnsupportedModelError

from .anatomy import Anatomy, Kind
from .dryrun import DryRun, channels_of, configured_size, dry_run, patch_side
from .families import Family, Layout, family_of
from .scoring import kind_of

# What a feature map of a readout is looked for on: not square, so that rows and columns cannot be taken for each other,
# and large enough for several cells of 32 pixels; or so many patches, where these do not divide it.
_READOUT_SAMPLE = (128, 192)
_READOUT_PATCHES = (8, 12)

# More tokens than this in front of the cells are something else.
_MOST_PREFIX = 16

# The players of a model whose features have no place in the image.
_PLACELESS_CELL = (32, 32)

_INTERPOLATE = {"interpolate_pos_encoding": True}
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
    run = _first_run(model, kind, family, [(small, {}), (small, _INTERPOLATE), (configured_size(model), {})])
    blocks, tokens, width = _blocks(names, run)
    rows, cols = run.image[0] // cell[0], run.image[1] // cell[1]
    if family.patches:
        tokens = rows * cols  # the rest is padding
    if not 0 <= tokens - rows * cols <= _MOST_PREFIX:
        raise UnsupportedModelError(f"{rows * cols} patches enter, but the blocks hold {tokens} tokens")
    seats = [names[module] for module in run.attentions]
    hidden = len(seats) == len(blocks) and all(s.startswith(f"{b}.") for s, b in zip(seats, blocks, strict=True))
    if seats and not hidden:
        raise UnsupportedModelError(
            f"expected one call of transformers' attention interface in each of {len(blocks)} blocks, saw {seats}"
        )
    return Anatomy(
        kind=_settled(kind, run),
        family=family,
        source=blocks[-1],
        layout="tokens",
        backbone=_leading(names, run, blocks[-1]),
        behind=_behind(names, run, blocks[-1]),
        entrance=_entrance(names, run),
        cell=cell,
        rounds_up=False,
        channels=conv.in_channels if conv is not None else channels_of(model),
        prefix=tokens - rows * cols,
        width=width,
        classes=_classes(model, run),
        sample=run.image,
        options=run.options,
        blocks=blocks,
        attentions=tuple(seats),
    )


def find_readout(model: nn.Module) -> Anatomy:
    """The final feature map of any other model: the last map before its classifier.

    Raises:
        UnsupportedModelError: there is none; the message says what was looked for.
    """
    family, kind = known(model)
    if family.patches:
        raise UnsupportedModelError("images that come as patches have no feature map to read out")
    names = {module: name for name, module in model.named_modules()}
    sample = _readout_sample(model)
    run = _first_run(model, kind, family, [(sample, {}), (sample, _INTERPOLATE), (configured_size(model), {})])
    source, place = _feature_map(names, run, family)
    height, width = run.image
    cell = _PLACELESS_CELL if place.layout == "latents" else (-(-height // place.rows), -(-width // place.cols))
    return Anatomy(
        kind=_settled(kind, run),
        family=family,
        source=source,
        layout=place.layout,
        backbone=_leading(names, run, source),
        behind=_behind(names, run, source),
        entrance=_entrance(names, run),
        cell=cell,
        rounds_up=_rounds_up(model, kind, family, run, source, cell, place),
        channels=channels_of(model),
        prefix=place.prefix,
        width=place.width,
        classes=_classes(model, run),
        sample=run.image,
        options=run.options,
    )


def _readout_sample(model: nn.Module) -> tuple[int, int]:
    side = patch_side(model)
    if any(pixels % side for pixels in _READOUT_SAMPLE):
        return _READOUT_PATCHES[0] * side, _READOUT_PATCHES[1] * side
    return _READOUT_SAMPLE


def known(model: nn.Module) -> tuple[Family, Kind]:
    """What can be said of a model before it runs.

    Raises:
        UnsupportedModelError: it is no vision model, or of a refused family.
    """
    config = getattr(model, "config", None)
    if not isinstance(model, nn.Module) or config is None or not hasattr(config, "num_labels"):
        raise UnsupportedModelError(
            f"Expected a Hugging Face vision model (AutoModelForImageClassification.from_pretrained(...)), "
            f"got {type(model).__name__}."
        )
    family = family_of(model)
    if "pixel_values" not in inspect.signature(model.forward).parameters:
        raise UnsupportedModelError(
            f"Expected a vision model, got {type(model).__name__}, whose forward takes no pixel_values."
        )
    return family, kind_of(model)


def _first_run(model: nn.Module, kind: Kind, family: Family, attempts: _Attempts) -> DryRun:
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


def _settled(kind: Kind, run: DryRun) -> Kind:
    return "headless" if run.scores is None else kind


def _classes(model: Any, run: DryRun) -> int:
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


@dataclass(frozen=True)
class _Place:
    """How a feature map lies in a tensor."""

    layout: Layout
    rows: int
    cols: int
    prefix: int
    width: int


def _place(shape: tuple[int, ...] | None, image: tuple[int, int]) -> _Place | None:
    """How a feature map of the image may lie in a tensor of this shape: its sides are as those of the image."""
    if shape is None or shape[0] != 2:
        return None

    def alike(rows: int, cols: int) -> bool:
        return rows * cols > 1 and rows * image[1] == cols * image[0]

    if len(shape) == 4 and alike(*shape[2:]):
        return _Place("channels_first", shape[2], shape[3], 0, shape[1])
    if len(shape) == 4 and alike(*shape[1:3]):
        return _Place("channels_last", shape[1], shape[2], 0, shape[3])
    if len(shape) == 3 and shape[2] > 1:  # one feature alone is a pooled map
        for prefix in range(_MOST_PREFIX + 1):
            rows = round(max(0, (shape[1] - prefix) * image[0] / image[1]) ** 0.5)
            if rows and (shape[1] - prefix) % rows == 0 and alike(rows, (shape[1] - prefix) // rows):
                return _Place("tokens", rows, (shape[1] - prefix) // rows, prefix, shape[2])
    return None


def _feature_map(names: dict[nn.Module, str], run: DryRun, family: Family) -> tuple[str, _Place]:
    """Name of the module that returns the final feature map, and how that lies in its output."""
    if family.features is not None:
        return family.features, _named_place(names, run, family)
    last = {module: index for index, (module, _) in enumerate(run.order)}
    head = next((i for i, (m, shape) in enumerate(run.order) if _classifies(m, shape, run)), len(run.order))
    for index, (module, shape) in reversed(list(enumerate(run.order[:head]))):
        place = _place(shape, run.image)
        # A module that runs again later would give another map by then.
        if place is not None and last[module] == index and names.get(module):
            return names[_last_of(module)], place
    raise UnsupportedModelError(
        f"looked for a feature map with the sides of the image ({run.image[0]} x {run.image[1]}) before the classifier, "
        "found none"
    )


def _last_of(module: nn.Module) -> nn.Module:
    """The module whose output a plain sequence hands on: gradient checkpointing may run the parts, not the sequence."""
    while type(module).forward is nn.Sequential.forward and len(module):  # type: ignore[arg-type]
        module = module[-1]  # type: ignore[index]
    return module


def _named_place(names: dict[nn.Module, str], run: DryRun, family: Family) -> _Place:
    """How the features of a registered module lie."""
    module = next((m for m, name in names.items() if name == family.features), None)
    shape = run.calls.get(module, [(None, None)])[-1][1] if module is not None else None
    if shape is None:
        raise UnsupportedModelError(
            f"features={family.features!r} was registered, but no module of that name returned a tensor"
        )
    if family.layout == "latents":
        return _Place("latents", 1, 1, 0, shape[2])
    known = {
        "channels_first": lambda: _Place("channels_first", shape[2], shape[3], 0, shape[1]),
        "channels_last": lambda: _Place("channels_last", shape[1], shape[2], 0, shape[3]),
        "tokens": lambda: _place((2, shape[1] - family.prefix, shape[2]), run.image),
        None: lambda: _place(shape, run.image),
    }
    place = known[family.layout]()
    if place is None or (family.layout == "tokens" and place.prefix):
        raise UnsupportedModelError(
            f"the output {shape} of {family.features!r} is no feature map of layout={family.layout!r} with "
            f"prefix={family.prefix} on an image of {run.image[0]} x {run.image[1]}"
        )
    return _Place(place.layout, place.rows, place.cols, family.prefix, place.width)


def _classifies(module: nn.Module, shape: tuple[int, ...] | None, run: DryRun) -> bool:
    scores = None if run.scores is None else tuple(run.scores.shape)
    return isinstance(module, nn.Linear) and shape is not None and shape == scores


def _rounds_up(
    model: nn.Module, kind: Kind, family: Family, run: DryRun, source: str, cell: tuple[int, int], place: _Place
) -> bool:
    """Whether one and a half cells more in the image are two cells more in the map, not one.

    Raises:
        UnsupportedModelError: the map does not grow with the image, so it is none.
    """
    if place.layout == "latents":
        return False
    larger = (run.image[0] + cell[0] + cell[0] // 2, run.image[1] + cell[1] + cell[1] // 2)
    try:
        again = dry_run(model, kind, family, larger, run.options)
    except Exception:  # the model takes one size only
        return run.image[0] % cell[0] > 0
    shape = again.calls[model.get_submodule(source)][-1][1]
    for more in (1, 2):
        rows, cols = place.rows + more, place.cols + more
        grown = {
            "tokens": (2, place.prefix + rows * cols, place.width),
            "channels_first": (2, place.width, rows, cols),
            "channels_last": (2, rows, cols, place.width),
        }
        if shape == grown[place.layout]:
            return more == 2
    raise UnsupportedModelError(
        f"the output of {source!r} was taken for the final feature map, but it does not grow with the image as one: it "
        f"is {shape} at {larger[0]} x {larger[1]} pixels. Name the module that returns the map: "
        "shapadapter.register_family(type(model), features=...)"
    )


def _leading(names: dict[nn.Module, str], run: DryRun, source: str) -> tuple[str, ...]:
    """The model's children that ran before the features were there, in order of the model."""
    ran = {names[module].split(".")[0] for module in _finished(names, run, source)[0] if names.get(module)}
    return tuple(dict.fromkeys(part for name in names.values() if (part := name.split(".")[0]) in ran))


def _behind(names: dict[nn.Module, str], run: DryRun, source: str) -> tuple[str, ...]:
    """The modules with parameters of their own that ran only after the features were there."""
    before, after = _finished(names, run, source)
    late = [module for module in dict.fromkeys(after) if module not in set(before) and names.get(module)]
    # What holds the source ends after it, too, as timm's models do with a class token of their own.
    late = [module for module in late if not source.startswith(f"{names[module]}.")]
    return tuple(names[module] for module in late if any(True for _ in module.parameters(recurse=False)))


def _finished(names: dict[nn.Module, str], run: DryRun, source: str) -> tuple[list[nn.Module], list[nn.Module]]:
    """What had finished when the features were there, and what finished later."""
    end = max(index for index, (module, _) in enumerate(run.order) if names.get(module) == source)
    modules = [module for module, _ in run.order]
    return modules[: end + 1], modules[end + 1 :]


def _entrance(names: dict[nn.Module, str], run: DryRun) -> str:
    """The first module that ran and has parameters of its own."""
    return next(names[module] for module, _ in run.order if any(True for _ in module.parameters(recurse=False)))
