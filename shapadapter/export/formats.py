"""The files of an export: ONNX, through the exporter of transformers, or a program of `torch.export`; both compared."""

from __future__ import annotations

import copy
import io
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind

from shapadapter.core.errors import ExportError
from shapadapter.core.files import atomic_folder
from shapadapter.core.phrases import reason
from shapadapter.data.images import image_side
from shapadapter.export.deployed import LEVEL, OUTPUTS, Job, prepare, quiet

_ONNX, _PROGRAM = "model.onnx", "model.pt2"
_COMPANIONS = ("config.json", "preprocessor_config.json")

_TESTED = (2, 13)  # the release of torch that programs were tested with
_BATCHES = (1, 2, 3)  # sizes of the batches that are compared; the model was traced with two images
_WEIGHTS = (InputKind.PARAMETER, InputKind.BUFFER)

# What counts as having an effect though it computes something, which nobody may need, or checks what tracing has settled.
_WITHOUT_EFFECT = (torch.ops.aten.scaled_dot_product_attention.default, torch.ops.aten._assert_tensor_metadata.default)

_Run = Callable[[Tensor], Mapping[str, Tensor]]  # an exported model, from images (B, C, H, W) to its outputs by name


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
        largest = ", ".join(f"{name} {difference:.1e}" for name, difference in self.differences.items())
        return (
            f"{self.path} ({kind}, {sum(self.sizes.values()) / 1e6:.1f} MB)\nlargest difference on {self.images} "
            f"image{'s' * (self.images != 1)}, batches of {_BATCHES[0]} to {_BATCHES[-1]}: {largest}\n"
            f"attributions: {LEVEL}; a backward pass and refinement need the model itself"
        )

    def to_dict(self) -> dict[str, Any]:
        """The same as what json can hold."""
        return {**vars(self), "path": str(self.path)}


def export_onnx(
    model: nn.Module,
    folder: str | Path,
    *,
    images: Any,
    processor: Any | None = None,
    texts: Sequence[str] | str | None = None,
    tolerance: float = 1e-4,
    opset: int | None = None,
    **options: Any,
) -> ExportReport:
    """Write a wrapped model as an ONNX file that predicts and explains, and compare the two.

    The file takes `pixel_values` (B, C, H, W) fp32, of any number of images of the size that the processor makes, and
    returns `logits` (B, K), `attributions` (B, N, K), players in raster order, and `null_values` (B, K). The attributions are
    those of one forward pass, which the file's metadata say as `level`: a backward pass and `refine` need the model itself.
    It runs where onnxruntime does, without PyTorch. LoRA is folded into the weights; the model itself stays as it is.

    Args:
        model: a wrapped model.
        folder: where to write `model.onnx` and its weights `model.onnx.data`, `config.json` with the names of the classes,
            and `preprocessor_config.json`. An older export there is replaced.
        images: real images, as `shapadapter.explain` takes them, to compare the two models on.
        processor: the image processor the model was trained with; with texts, the processor of both.
        texts: for a model that matches images with texts: the texts the file compares images with, in place of classes.
        tolerance: the largest difference allowed, in logits, or as a share of an output's largest number if that is
            more than 1.
        opset: version of ONNX's operators; that of the exporter by default.
        **options: further keyword arguments of the model's forward, fixed in the file.

    Returns:
        Where the file is, how large it is, and how far it differs.

    Raises:
        ExportError: the model cannot be traced, or the file differs by more than `tolerance`. Nothing is written then.
        ShapleyError: the base is quantised, the images are of several sizes, texts or an adapter are missing, no room.
        FileExistsError: the folder holds other files.
        ImportError: a package is missing or too old.
    """
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise ImportError(f'Exporting to ONNX needs {", ".join(missing)}: pip install "shapadapter[onnx]"')
    job = prepare(model, export_onnx, images, processor, texts, options)
    with _new_folder(folder, (_ONNX, f"{_ONNX}.data", "export.json", *_COMPANIONS)) as place:
        opset = _write_onnx(job, place, opset)
        return _report(job, place, _in_onnxruntime(place / _ONNX), Path(folder) / _ONNX, opset, processor, tolerance)


def export_program(
    model: nn.Module,
    folder: str | Path,
    *,
    images: Any,
    processor: Any | None = None,
    texts: Sequence[str] | str | None = None,
    tolerance: float = 1e-4,
    **options: Any,
) -> ExportReport:
    """Write a wrapped model as a program of `torch.export` that predicts and explains, and compare the two.

    `torch.export.load(path).module()` takes `pixel_values` (B, C, H, W) fp32, of any number of images of the size that the
    processor makes, and returns a dict of `logits` (B, K), `attributions` (B, N, K) of one forward pass, and `null_values`
    (B, K). It needs PyTorch and nothing else. Arguments and errors are those of `export_onnx`; the model's file is `model.pt2`.
    """
    job = prepare(model, export_program, images, processor, texts, options)
    with _new_folder(folder, (_PROGRAM, *_COMPANIONS)) as place:
        with quiet():
            # By way of memory: torch ends the whole process where a disk is full.
            content = io.BytesIO()
            torch.export.save(_traced(job), content, extra_files={"shapadapter.json": json.dumps(job.about)})
            (place / _PROGRAM).write_bytes(content.getbuffer())
            program = torch.export.load(place / _PROGRAM).module()

        def run(pixels: Tensor) -> Mapping[str, Tensor]:
            return program(pixel_values=pixels)

        return _report(job, place, run, Path(folder) / _PROGRAM, None, processor, tolerance)


# -- the folder and the comparison -----------------------------------------------------------------------------------


@contextmanager
def _new_folder(folder: str | Path, names: tuple[str, ...]) -> Iterator[Path]:
    """A folder to write to, which takes its name at the end, in place of an older export with the files `names`."""
    final = Path(folder).resolve()
    there = sorted(path.name for path in final.iterdir()) if final.is_dir() else [final.name] * final.is_file()
    if foreign := [name for name in there if final.is_file() or name not in names]:
        raise FileExistsError(f"{folder} holds {foreign[0]}, which is no part of an export: choose a new folder.")
    with atomic_folder(Path(folder)) as place:
        yield place


def _report(
    job: Job, place: Path, run: _Run, path: Path, opset: int | None, processor: Any, tolerance: float
) -> ExportReport:
    """Compare what was written at `place`, and add the model's config and the settings of the processor."""
    config: Any = copy.deepcopy(job.deployed.model.config)
    config.id2label = dict(enumerate(job.labels))
    config.label2id = {label: index for index, label in enumerate(job.labels)}
    config.architectures = [type(job.deployed.model).__name__]
    config.save_pretrained(place)
    if processor is not None:
        image_side(processor).save_pretrained(place)
    differences = _compare(run, job, tolerance)
    sizes = {file.name: file.stat().st_size for file in sorted(place.iterdir())}
    return ExportReport(path, differences, len(job.pixels), opset, sizes)


def _compare(run: _Run, job: Job, tolerance: float) -> dict[str, float]:
    """The largest difference of each output between an exported model and the user's own, on batches of several sizes."""
    largest, count = dict.fromkeys(OUTPUTS, 0.0), len(job.pixels)
    order = torch.arange(max(count, sum(_BATCHES)), device="cpu") % count
    sizes = itertools.cycle(_BATCHES)
    while len(order):
        size = next(sizes)
        part, order = order[:size], order[size:]
        try:
            with torch.no_grad():
                found = run(job.pixels[part])
        except Exception as error:  # of many kinds, by what runs the file
            raise ExportError(
                f"The exported model cannot run a batch of {len(part)}: {reason(error).rstrip('.')}. Nothing was written."
            ) from error
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


# -- ONNX ------------------------------------------------------------------------------------------------------------


def _write_onnx(job: Job, place: Path, opset: int | None) -> int:
    """Trace the model and write its files; returns the version of ONNX's operators."""
    from transformers.exporters import OnnxConfig, OnnxExporter  # type: ignore[attr-defined]

    sample: Any = {"pixel_values": job.two_images()}  # (2, C, H, W)
    deployed: Any = job.deployed
    config = OnnxConfig(dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch")}}, opset_version=opset)
    with quiet():
        try:
            exported = OnnxExporter().export(deployed, sample, config=config)
        except ImportError:  # of a package that is too old
            raise
        except Exception as error:  # of many kinds, from many layers
            raise ExportError(job.refused("ONNX", error)) from error
        graph = exported.program.graph
        for part in (graph, *exported.program.functions.values()):
            for node in part.all_nodes():
                node.metadata_props.clear()  # where in which file on this machine it was traced
        for value in (*graph.inputs, *graph.outputs):
            value.shape = type(value.shape)(["batch", *list(value.shape)[1:]])
        exported.program.metadata_props.update(job.about)
        exported.save_pretrained(place)
    written = int(exported.program.opset_imports[""])
    if opset not in (None, written):
        raise ExportError(f"The exporter cannot write opset {opset}, it wrote {written}. Nothing was kept.")
    return written


def _in_onnxruntime(path: Path) -> _Run:
    """The written file in onnxruntime."""
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # of onnxruntime's own kinds
        raise ExportError(
            f"onnxruntime cannot load the file: {reason(error).rstrip('.')}. Try another opset."
        ) from error
    names = [output.name for output in session.get_outputs()]

    def run(pixels: Tensor) -> dict[str, Tensor]:
        found: list[Any] = session.run(names, {"pixel_values": np.ascontiguousarray(pixels.numpy())})
        return {name: torch.from_numpy(value) for name, value in zip(names, found, strict=True)}

    return run


# -- torch.export ----------------------------------------------------------------------------------------------------


def _traced(job: Job) -> torch.export.ExportedProgram:
    """The model as a program, without weights that nothing reads and without paths of this machine."""
    try:
        program = torch.export.export(
            job.deployed,
            args=(),
            kwargs={"pixel_values": job.two_images()},
            dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch")}},
            strict=False,
        )
    except Exception as error:  # of many kinds, from many layers
        tested, older = ".".join(map(str, _TESTED)), ""
        # torch 2.6 cannot trace them.
        if tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < _TESTED:
            older = f' Tested with torch {tested}, got {torch.__version__}: pip install "torch>={tested}"'
        raise ExportError(job.refused("torch.export", error) + older) from error
    if job.deployed.text_embeds is not None:
        program = program.run_decompositions({})  # without operations in place, which would keep the text tower alive
    graphs = (part.graph for part in program.graph_module.modules() if isinstance(part, torch.fx.GraphModule))
    for node in itertools.chain.from_iterable(graph.nodes for graph in graphs):
        node.meta.pop("stack_trace", None)
    # No operation reads the text tower of a model whose texts are fixed.
    program.graph.eliminate_dead_code(lambda node: node.is_impure() and node.target not in _WITHOUT_EFFECT)
    places = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    signature = program.graph_signature
    unused = [spec for spec in signature.input_specs if spec.kind in _WEIGHTS and not places[spec.arg.name].users]
    for spec in unused:
        program.graph.erase_node(places[spec.arg.name])
        program.state_dict.pop(spec.target, None)
        program.constants.pop(spec.target, None)
        signature.input_specs.remove(spec)
    program.graph_module.recompile()
    return program
