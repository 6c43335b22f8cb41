"""Find the final feature map of a model that is no sequence of patch tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import nn

from shapadapter.backbone.anatomy import Anatomy, Kind
from shapadapter.backbone.dry_run import DryRun, all_flows_through, channels_of, configured_size, dry_run, patch_side
from shapadapter.backbone.families import Family, Layout
from shapadapter.backbone.precision import FaintSignalError
from shapadapter.backbone.sequence import (
    INTERPOLATE,
    MOST_PREFIX,
    behind,
    classes,
    entrance,
    finished,
    first_run,
    known,
    leading,
    settled,
)
from shapadapter.core.errors import UnsupportedModelError

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

_NAME_IT = "shapadapter.register_family(type(model), features=...)"


def find_readout(model: nn.Module) -> Anatomy:
    """The final feature map of any other model: the last before its classifier, if all that this learns flows through it.

    Raises:
        UnsupportedModelError: there is none; the message says what was looked for.
        FaintSignalError: the model's precision does not show what flows where.
    """
    family, kind = known(model)
    if family.patches:
        raise UnsupportedModelError("images that come as patches have no feature map to read out")
    try:
        return _read_at(model, kind, family, _sample(model))
    except FaintSignalError:
        raise
    except UnsupportedModelError as error:
        refused = error
    try:
        return _read_at(model, kind, family, _OTHER_SAMPLE)
    except UnsupportedModelError:
        raise refused from None  # what was seen at the usual size says more


def _read_at(model: nn.Module, kind: Kind, family: Family, sample: tuple[int, int]) -> Anatomy:
    names = {module: name for name, module in model.named_modules()}
    run = first_run(model, kind, family, [(sample, {}), (sample, INTERPOLATE), (configured_size(model), {})])
    source, place = _feature_map(model, kind, family, run)
    height, width = run.image
    cell = _PLACELESS_CELL if place.layout == "latents" else (-(-height // place.rows), -(-width // place.cols))
    return Anatomy(
        kind=settled(kind, run),
        family=family,
        source=source,
        layout=place.layout,
        backbone=leading(names, run, source),
        behind=behind(names, run, source),
        entrance=entrance(names, run),
        cell=cell,
        rounds_up=_rounds_up(model, kind, family, run, source, cell, place),
        channels=channels_of(model),
        prefix=place.prefix,
        width=place.width,
        classes=classes(model, run),
        sample=run.image,
        options=run.options,
    )


def _sample(model: nn.Module) -> tuple[int, int]:
    side = patch_side(model)
    if any(pixels % side for pixels in _SAMPLE):
        return _SAMPLE_PATCHES[0] * side, _SAMPLE_PATCHES[1] * side
    return _SAMPLE


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
        for prefix in range(MOST_PREFIX + 1):
            rows = round(max(0, (shape[1] - prefix) * image[0] / image[1]) ** 0.5)
            if rows and (shape[1] - prefix) % rows == 0 and alike(rows, (shape[1] - prefix) // rows):
                return _Place("tokens", rows, (shape[1] - prefix) // rows, prefix, shape[2])
    return None


def _feature_map(model: nn.Module, kind: Kind, family: Family, run: DryRun) -> tuple[str, _Place]:
    """Name of the module that returns the final feature map, and how that lies in its output."""
    names = {module: name for name, module in model.named_modules()}
    if family.features is not None:
        return family.features, _named_place(names, run, family)
    tried = []
    for source, place in _candidates(names, run):
        tried.append(source)
        if all_flows_through(model, kind, family, run, source):
            _refuse_early(names, run, source)
            return source, place
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


def _candidates(names: dict[nn.Module, str], run: DryRun) -> Iterator[tuple[str, _Place]]:
    """Outputs that could be the final map, from the classifier backwards."""
    last = {module: index for index, (module, _) in enumerate(run.order)}
    head = next((i for i, (m, shape) in enumerate(run.order) if _classifies(m, shape, run)), len(run.order))
    for index, (module, shape) in reversed(list(enumerate(run.order[:head]))):
        place = _place(shape, run.image)
        # A module that runs again later would give another map by then.
        if place is not None and last[module] == index and names.get(module):
            yield names[_last_of(module)], place


def _refuse_early(names: dict[nn.Module, str], run: DryRun, source: str) -> None:
    """Refuse to read a model out where much of it is still to come."""
    heads = {module for module, shape in run.order if _classifies(module, shape, run)}
    before, later = (
        sum(any(True for _ in module.parameters(recurse=False)) for module in {*part} - heads)
        for part in finished(names, run, source)
    )
    if later > before / 2:
        raise UnsupportedModelError(
            f"the last output with the sides of the image through which all flows is that of {source!r}, but {later} layers "
            f"run behind it and {before} before. If a later module returns the final feature map, name it: {_NAME_IT}"
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
    place = _told_place(shape, run.image, family)
    if place is None:
        raise UnsupportedModelError(
            f"the output {shape} of {family.features!r} is no feature map of layout={family.layout!r} with "
            f"prefix={family.prefix} on images of {run.image[0]} x {run.image[1]}"
        )
    return place


def _told_place(shape: tuple[int, ...], image: tuple[int, int], family: Family) -> _Place | None:
    if family.layout is None:
        return _place(shape, image)
    if len(shape) != (4 if family.layout.startswith("channels") else 3):
        return None
    if family.layout == "latents":
        return _Place("latents", 1, 1, 0, shape[2])
    if family.layout == "channels_first":
        return _Place("channels_first", shape[2], shape[3], 0, shape[1])
    if family.layout == "channels_last":
        return _Place("channels_last", shape[1], shape[2], 0, shape[3])
    cells = _place((shape[0], shape[1] - family.prefix, shape[2]), image)
    return replace(cells, prefix=family.prefix) if cells is not None and not cells.prefix else None


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
        f"is {shape} at {larger[0]} x {larger[1]} pixels. Name the module that returns the map: {_NAME_IT}"
    )
