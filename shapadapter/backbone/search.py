"""Find the parts of a vision model by dry runs, not by a table of names: a sequence of patch tokens, or a feature map."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from shapadapter.backbone.anatomy import Anatomy
from shapadapter.backbone.dry_run import (
    DryRun,
    FaintSignalError,
    all_flows_through,
    channels_of,
    configured_size,
    dry_run,
    patch_side,
)
from shapadapter.backbone.families import Layout, Profile, profile_of
from shapadapter.core.errors import UnsupportedModelError

# More tokens than this in front of the cells are something else.
_MOST_PREFIX = 16

# What a feature map is looked for on: not square, so that rows and columns cannot be taken for each other, and large
# enough for several cells of 32 pixels; or so many patches, where these do not divide it.
_SAMPLE = (128, 192)
_SAMPLE_PATCHES = (8, 12)

# And where cells are of 12, 20, 24 or 40 pixels, which do not divide that either.
_OTHER_SAMPLE = (240, 360)

# The players of a model whose features have no place in the image.
_PLACELESS_CELL = (32, 32)

# So many outputs, from the classifier backwards, are tried.
_TRIES = 8

_INTERPOLATE = {"interpolate_pos_encoding": True}
_NAME_IT = "shapadapter.register_family(type(model), features=...)"


class AmbiguousModelError(UnsupportedModelError):
    """Two parts of the model could be the one that is looked for."""


def find_sequence(model: nn.Module) -> Anatomy:
    """The parts of a model that keeps one token for each patch from its first block to its last; refuses any other."""
    profile = profile_of(model)
    patches = profile.family.patches
    if profile.family.features is not None:
        raise UnsupportedModelError("its features were named, so they are read out")
    conv = next((m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == m.stride > (1, 1)), None)
    if conv is None and not patches:
        raise UnsupportedModelError("looked for the convolution that cuts images in patches, found none")
    cell = (conv.kernel_size[0], conv.kernel_size[1]) if conv is not None else (1, 1)
    run = _first_run(model, profile, (3 * cell[0], 4 * cell[1]))
    blocks, tokens, width = _blocks(run)
    rows, cols = run.image[0] // cell[0], run.image[1] // cell[1]
    if patches:
        tokens = rows * cols  # the rest is padding
    if not 0 <= tokens - rows * cols <= _MOST_PREFIX:
        raise UnsupportedModelError(f"{rows * cols} patches enter, but the blocks hold {tokens} tokens")
    return _anatomy(
        run,
        blocks[-1],
        layout="tokens",
        cell=cell,
        rounds_up=False,
        channels=conv.in_channels if conv is not None else channels_of(model),
        prefix=tokens - rows * cols,
        width=width,
        blocks=blocks,
        attentions=_attentions(run, blocks),
        pooled=_pooled(run, blocks[-1]),
    )


def find_readout(model: nn.Module) -> Anatomy:
    """The final feature map of any other model: the last before its classifier, if all that this learns flows through it."""
    profile = profile_of(model)
    if profile.family.patches:
        raise UnsupportedModelError("images that come as patches have no feature map to read out")
    side = patch_side(model)
    divides = not any(pixels % side for pixels in _SAMPLE)
    try:
        return _read_at(model, profile, _SAMPLE if divides else (_SAMPLE_PATCHES[0] * side, _SAMPLE_PATCHES[1] * side))
    except FaintSignalError:
        raise
    except UnsupportedModelError as error:
        refused = error
    try:
        return _read_at(model, profile, _OTHER_SAMPLE)
    except UnsupportedModelError:
        raise refused from None  # what was seen at the usual size says more


def _first_run(model: nn.Module, profile: Profile, image: tuple[int, int]) -> DryRun:
    """The first of three attempts that works: many models take any size, some only with an option, some one size."""
    failure: Exception | None = None
    attempts: Iterable[tuple[Any, dict[str, Any]]] = ((image, {}), (image, _INTERPOLATE), (configured_size(model), {}))
    for size, options in attempts:
        if size is None:
            continue
        try:
            return dry_run(model, profile, size, options)
        except Exception as error:
            failure = error
    raise UnsupportedModelError(
        f"a forward pass on a tiny batch of images failed ({type(failure).__name__}: {failure})"
    ) from failure


def _anatomy(run: DryRun, source: str, **parts: Any) -> Anatomy:
    """What a dry run tells of any model whose features the module `source` returns, and `parts` beside."""
    if run.scores is not None and run.scores.ndim != 2:
        raise UnsupportedModelError(
            f"expected scores of shape (batch, classes), got {tuple(run.scores.shape)}; load the model with "
            "AutoModelForImageClassification"
        )
    config: Any = run.model.config
    names, (before, after) = run.names, run.finished(source)
    first = {names[module].split(".")[0] for module in before if names.get(module)}
    late = [module for module in dict.fromkeys(after) if module not in set(before) and names.get(module)]
    # What holds the source ends after it, too, as timm's models do with a class token of their own.
    late = [module for module in late if not source.startswith(f"{names[module]}.")]
    return Anatomy(
        kind="headless" if run.scores is None else run.profile.kind,
        family=run.profile.family,
        named_fields=run.profile.named_fields,
        source=source,
        backbone=tuple(dict.fromkeys(part for name in names.values() if (part := name.split(".")[0]) in first)),
        behind=tuple(names[module] for module in late if _has_parameters(module)),
        entrance=next(names[module] for module, _ in run.order if _has_parameters(module)),
        classes=int(config.num_labels) if run.scores is None else run.scores.shape[-1],
        sample=run.image,
        options=run.options,
        **parts,
    )


def _pooled(run: DryRun, source: str) -> str:
    """The head's attention to the tokens; or the last module that returns a tensor like that of the last block, as a norm."""
    shapes, after = {run.names.get(module): shape for module, shape in run.order}, run.finished(source)[1]
    attention = next((run.names[module] for module in after if isinstance(module, nn.MultiheadAttention)), None)
    if attention and run.profile.kind == "matching":  # Siglip2's classifier has one, too, and does not ask it
        return attention
    leaves = (module for module in after if not list(module.children()))
    names = [run.names[module] for module in leaves if shapes[run.names[module]] == shapes[source]]
    return names[-1] if names else source


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(recurse=False), None) is not None


def _blocks(run: DryRun) -> tuple[tuple[str, ...], int, int]:
    """The one list of alike modules that each map (B, T, D) to (B, T, D): names, T and D."""
    found: list[tuple[tuple[str, ...], int, int]] = []
    for module, name in run.names.items():
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


def _attentions(run: DryRun, blocks: tuple[str, ...]) -> tuple[str, ...]:
    """The attention modules in which a token can be hidden: one in each block, or none at all."""
    found = tuple(run.names[module] for module in run.attentions)
    paired = len(found) == len(blocks) and all(a.startswith(f"{b}.") for a, b in zip(found, blocks, strict=True))
    if found and not paired:
        raise UnsupportedModelError(
            f"expected one call of transformers' attention interface in each of {len(blocks)} blocks, saw {list(found)}"
        )
    return found


@dataclass(frozen=True)
class _Map:
    """How a feature map lies in a tensor."""

    layout: Layout
    rows: int
    cols: int
    prefix: int
    width: int

    def shape(self, more: int) -> tuple[int, ...]:
        """The tensor's shape for an image of so many more rows and columns."""
        rows, cols = self.rows + more, self.cols + more
        if self.layout == "tokens":
            return (2, self.prefix + rows * cols, self.width)
        return (2, self.width, rows, cols) if self.layout == "channels_first" else (2, rows, cols, self.width)


def _map_in(shape: tuple[int, ...] | None, image: tuple[int, int]) -> _Map | None:
    """How a feature map of the image may lie in a tensor of this shape: its sides are as those of the image."""
    if shape is None or shape[0] != 2:
        return None

    def alike(rows: int, cols: int) -> bool:
        return rows * cols > 1 and rows * image[1] == cols * image[0]

    if len(shape) == 4 and alike(*shape[2:]):
        return _Map("channels_first", shape[2], shape[3], 0, shape[1])
    if len(shape) == 4 and alike(*shape[1:3]):
        return _Map("channels_last", shape[1], shape[2], 0, shape[3])
    if len(shape) == 3 and shape[2] > 1:  # one feature alone is a pooled map
        for prefix in range(_MOST_PREFIX + 1):
            rows = round(max(0, (shape[1] - prefix) * image[0] / image[1]) ** 0.5)
            if rows and (shape[1] - prefix) % rows == 0 and alike(rows, (shape[1] - prefix) // rows):
                return _Map("tokens", rows, (shape[1] - prefix) // rows, prefix, shape[2])
    return None


def _read_at(model: nn.Module, profile: Profile, sample: tuple[int, int]) -> Anatomy:
    run = _first_run(model, profile, sample)
    source, found = _feature_map(run)
    height, width = run.image
    placeless = found.layout == "latents"
    cell = _PLACELESS_CELL if placeless else (-(-height // found.rows), -(-width // found.cols))
    return _anatomy(
        run,
        source,
        layout=found.layout,
        cell=cell,
        rounds_up=not placeless and _rounds_up(run, source, cell, found),
        channels=channels_of(model),
        prefix=found.prefix,
        width=found.width,
    )


def _feature_map(run: DryRun) -> tuple[str, _Map]:
    """Name of the module that returns the final feature map, and how that lies in its output."""
    if run.profile.family.features is not None:
        return run.profile.family.features, _named_map(run)
    tried = []
    for source, found in _candidates(run):
        tried.append(source)
        if all_flows_through(run, source):
            _refuse_early(run, source)
            return source, found
        if len(tried) == _TRIES:
            break
    if tried:
        raise UnsupportedModelError(
            f"the last output with the sides of the image is that of {tried[0]!r}, but the scores know of the image in "
            f"other ways, too. Name the module that returns the final feature map, or else the one you mean: {_NAME_IT}"
        )
    raise UnsupportedModelError(
        f"looked for a feature map with the sides of the image ({run.image[0]} x {run.image[1]}) before the classifier, "
        f"found none. If there is one, name the module that returns it: {_NAME_IT}"
    )


def _candidates(run: DryRun) -> Iterator[tuple[str, _Map]]:
    """Outputs that could be the final map, from the classifier backwards."""
    last = {module: index for index, (module, _) in enumerate(run.order)}
    head = next((i for i, (m, shape) in enumerate(run.order) if run.gives_scores(m, shape)), len(run.order))
    for index, (module, shape) in reversed(list(enumerate(run.order[:head]))):
        found = _map_in(shape, run.image)
        # A module that runs again later would give another map by then.
        if found is not None and last[module] == index and run.names.get(module):
            # The last of a plain sequence returns the same: gradient checkpointing may run the parts, not the sequence.
            while type(module).forward is nn.Sequential.forward and len(module):  # type: ignore[arg-type]
                module = module[-1]  # type: ignore[index]
            yield run.names[module], found


def _refuse_early(run: DryRun, source: str) -> None:
    """Refuse to read a model out where much of it is still to come."""
    heads = {module for module, shape in run.order if run.gives_scores(module, shape)}
    before, later = (sum(map(_has_parameters, {*part} - heads)) for part in run.finished(source))
    if later > before / 2:
        raise UnsupportedModelError(
            f"the last output with the sides of the image through which all flows is that of {source!r}, but {later} layers "
            f"run behind it and {before} before. If a later module returns the final feature map, name it: {_NAME_IT}"
        )


def _named_map(run: DryRun) -> _Map:
    """How the features of a registered module lie."""
    family = run.profile.family
    module = next((m for m, name in run.names.items() if name == family.features), None)
    shape = run.calls.get(module, [(None, None)])[-1][1] if module is not None else None
    if shape is None:
        raise UnsupportedModelError(
            f"features={family.features!r} was registered, but no module of that name returned a tensor"
        )
    found: _Map | None = None
    if family.layout is None:
        found = _map_in(shape, run.image)
    elif family.layout == "tokens" and len(shape) == 3:
        cells = _map_in((shape[0], shape[1] - family.prefix, shape[2]), run.image)
        found = replace(cells, prefix=family.prefix) if cells is not None and not cells.prefix else None
    elif family.layout == "latents" and len(shape) == 3:
        found = _Map("latents", 1, 1, 0, shape[2])
    elif family.layout == "channels_first" and len(shape) == 4:
        found = _Map("channels_first", shape[2], shape[3], 0, shape[1])
    elif family.layout == "channels_last" and len(shape) == 4:
        found = _Map("channels_last", shape[1], shape[2], 0, shape[3])
    if found is None:
        raise UnsupportedModelError(
            f"the output {shape} of {family.features!r} is no feature map of layout={family.layout!r} with "
            f"prefix={family.prefix} on images of {run.image[0]} x {run.image[1]}"
        )
    return found


def _rounds_up(run: DryRun, source: str, cell: tuple[int, int], found: _Map) -> bool:
    """Whether one and a half cells more in the image are two cells more in the map, not one; without more, it is no map."""
    larger = (run.image[0] + cell[0] + cell[0] // 2, run.image[1] + cell[1] + cell[1] // 2)
    try:
        again = dry_run(run.model, run.profile, larger, run.options)
    except Exception:  # the model takes one size only
        return run.image[0] % cell[0] > 0
    shape = again.calls[run.model.get_submodule(source)][-1][1]
    if shape in (found.shape(1), found.shape(2)):
        return shape == found.shape(2)
    raise UnsupportedModelError(
        f"the output of {source!r} was taken for the final feature map, but it does not grow with the image as one: it "
        f"is {shape} at {larger[0]} x {larger[1]} pixels. Name the module that returns the map: {_NAME_IT}"
    )
