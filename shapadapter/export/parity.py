"""What came out of an export, and whether it computes the same."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shapadapter.core.errors import ExportError
from shapadapter.core.files import whole_folder
from shapadapter.data.images import image_side
from shapadapter.export.deployed import OUTPUTS, Job, first_line

COMPANIONS = ("config.json", "preprocessor_config.json")


@contextmanager
def new_folder(folder: str | Path, names: tuple[str, ...]) -> Iterator[Path]:
    """A folder to write to, which takes its name at the end; after an error nothing of it is left.

    Args:
        folder: its name; an older export there is replaced.
        names: the files of such an export.

    Raises:
        FileExistsError: there is a file of that name, or a folder with other files in it.
        DiskFullError: there is no room for it.
    """
    final = Path(folder).resolve()
    foreign = [final.name] if final.is_file() else []
    if final.is_dir():
        foreign = sorted(path.name for path in final.iterdir() if path.name not in names)
    if foreign:
        raise FileExistsError(f"{folder} holds {foreign[0]}, which is no part of an export: choose a new folder.")
    with whole_folder(Path(folder)) as place:
        yield place


def write_companions(folder: Path, job: Job, processor: Any) -> None:
    """Write the model's config, with the names of its classes, and the settings of the image processor."""
    config: Any = copy.deepcopy(job.deployed.model.config)
    config.id2label = dict(enumerate(job.labels))
    config.label2id = {label: index for index, label in enumerate(job.labels)}
    config.architectures = [type(job.deployed.model).__name__]
    config.save_pretrained(folder)
    if processor is not None:
        image_side(processor).save_pretrained(folder)


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of each file, by name."""
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir())}


_BATCHES = (1, 2, 3)
"""Sizes of the batches that are compared; the model was traced with two images."""


@dataclass(frozen=True)
class ExportReport:
    """An exported model, compared with the one it came from.

    Attributes:
        path: the model's file.
        differences: by output, the largest difference of any number, in logits.
        images: how many real images were compared.
        opset: the version of ONNX's operators, None for a program of `torch.export`.
        sizes: bytes of each file, by name.
    """

    path: Path
    differences: dict[str, float]
    images: int
    opset: int | None
    sizes: dict[str, int]

    def __str__(self) -> str:
        kind = "torch.export program" if self.opset is None else f"ONNX, opset {self.opset}"
        size = sum(self.sizes.values()) / 1e6
        largest = ", ".join(f"{name} {difference:.1e}" for name, difference in self.differences.items())
        images = f"{self.images} image" + ("" if self.images == 1 else "s")
        batches = f"batches of {_BATCHES[0]} to {_BATCHES[-1]}"
        return f"{self.path} ({kind}, {size:.1f} MB)\nlargest difference on {images}, {batches}: {largest}"

    def to_dict(self) -> dict[str, Any]:
        """The same as what json can hold."""
        return {**vars(self), "path": str(self.path)}


def compare(
    run: Callable[[Tensor], Mapping[str, Tensor]], job: Job, tolerance: float, image_count: int
) -> dict[str, float]:
    """The largest difference of each output between an exported model and the user's own.

    Args:
        run: the exported model, from images (b, C, H, W) to its outputs.
        job: the images and what is expected.
        tolerance: how large a difference may be: in logits, or as a share of the output's largest number if that is more
            than 1.
        image_count: how many images there are.

    Raises:
        ExportError: one is larger, or an output has another shape.
    """
    largest = dict.fromkeys(OUTPUTS, 0.0)
    order = torch.arange(max(image_count, sum(_BATCHES)), device="cpu") % image_count
    while len(order):
        for size in _BATCHES:
            part, order = order[:size], order[size:]
            found = _ran(run, job.pixels[part]) if len(part) else {}
            for name, values in found.items():
                expected = job.expected[name][part]
                if values.shape != expected.shape:
                    raise ExportError(
                        f"The exported model returns {name} of shape {tuple(values.shape)} for a batch of {len(part)}, "
                        f"expected {tuple(expected.shape)}. Nothing was written."
                    )
                difference = float((values.double() - expected.double()).abs().max())
                largest[name] = max(largest[name], math.inf if math.isnan(difference) else difference)
    for name, difference in largest.items():
        allowed = tolerance * max(1.0, float(job.expected[name].abs().max()))
        if difference > allowed:
            raise ExportError(
                f"The exported model differs by {difference:.1e} in {name}, more than tolerance={tolerance:g} allows "
                f"({allowed:.1e} for numbers of this size). Nothing was written. If you can live with that difference, "
                "raise the tolerance."
            )
    return largest


def _ran(run: Callable[[Tensor], Mapping[str, Tensor]], pixels: Tensor) -> Mapping[str, Tensor]:
    try:
        return run(pixels)
    except Exception as error:  # of many kinds, by what runs the file
        raise ExportError(
            f"The exported model cannot run a batch of {len(pixels)}: {first_line(error)}. Nothing was written."
        ) from error
