"""The files of an export: ONNX, through the exporter of transformers, or a program of `torch.export`."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind

from shapadapter.core.errors import ExportError
from shapadapter.export.deployed import Job, first_line, prepare, quiet
from shapadapter.export.parity import COMPANIONS, ExportReport, compare, new_folder, sizes, write_companions

_FILE = "model.onnx"
_FILES = (_FILE, f"{_FILE}.data", "export.json", *COMPANIONS)


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
    returns `logits` (B, K), `attributions` (B, N, K), players in raster order, and `null_values` (B, K). It runs where
    onnxruntime does, without PyTorch. LoRA is folded into the weights; the model itself stays as it is.

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
        UnsupportedModelError: the base model is quantised.
        ImageError: the images cannot be read, or are of several sizes.
        ShapleyError: texts or an active adapter are missing.
        FileExistsError: the folder holds other files.
        DiskFullError: there is no room for it; what was there is unchanged.
        ImportError: a package is missing or too old.
    """
    _need_packages()
    job = prepare(model, export_onnx, images, processor, texts, options)
    with new_folder(folder, _FILES) as place:
        opset = _write(job, place, opset)
        write_companions(place, job, processor)
        differences = compare(_runner(place / _FILE), job, tolerance, len(job.pixels))
        written = sizes(place)
    return ExportReport(Path(folder) / _FILE, differences, len(job.pixels), opset, written)


def _need_packages() -> None:
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise ImportError(f'Exporting to ONNX needs {", ".join(missing)}: pip install "shapadapter[onnx]"')


def _write(job: Job, place: Path, opset: int | None) -> int:
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


def _runner(path: Path) -> Callable[[Tensor], dict[str, Tensor]]:
    """The written file in onnxruntime."""
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # of onnxruntime's own kinds
        raise ExportError(f"onnxruntime cannot load the file: {first_line(error)}. Try another opset.") from error
    names = [output.name for output in session.get_outputs()]

    def run(pixels: Tensor) -> dict[str, Tensor]:
        """The outputs for images (B, C, H, W), by name."""
        found: list[Any] = session.run(names, {"pixel_values": np.ascontiguousarray(pixels.numpy())})
        return {name: torch.from_numpy(value) for name, value in zip(names, found, strict=True)}

    return run


TESTED = (2, 13)
"""The release of torch that programs were tested with."""

_FILE_OF_PROGRAM = "model.pt2"
_WEIGHTS = (InputKind.PARAMETER, InputKind.BUFFER)

# What counts as having an effect though it computes something, which nobody may need, or checks what tracing has settled.
_WITHOUT_EFFECT = (
    torch.ops.aten.scaled_dot_product_attention.default,
    torch.ops.aten._assert_tensor_metadata.default,
)


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
    processor makes, and returns a dict of `logits` (B, K), `attributions` (B, N, K) and `null_values` (B, K). It needs
    PyTorch and nothing else.

    Args:
        model: a wrapped model.
        folder: where to write `model.pt2`, `config.json` with the names of the classes, and `preprocessor_config.json`. An
            older export there is replaced.
        images: real images, as `shapadapter.explain` takes them, to compare the two models on.
        processor: the image processor the model was trained with; with texts, the processor of both.
        texts: for a model that matches images with texts: the texts the program compares images with.
        tolerance: the largest difference allowed, in logits, or as a share of an output's largest number if that is
            more than 1.
        **options: further keyword arguments of the model's forward, fixed in the program.

    Returns:
        Where the file is, how large it is, and how far it differs.

    Raises:
        ExportError: the model cannot be traced, or the program differs by more than `tolerance`. Nothing is written then.
        UnsupportedModelError: the base model is quantised.
        ImageError: the images cannot be read, or are of several sizes.
        ShapleyError: texts or an active adapter are missing.
        FileExistsError: the folder holds other files.
        DiskFullError: there is no room for it; what was there is unchanged.
    """
    job = prepare(model, export_program, images, processor, texts, options)
    with new_folder(folder, (_FILE_OF_PROGRAM, *COMPANIONS)) as place:
        with quiet():
            # By way of memory: torch ends the whole process where a disk is full.
            content = io.BytesIO()
            torch.export.save(_traced(job), content, extra_files={"shapadapter.json": json.dumps(job.about)})
            (place / _FILE_OF_PROGRAM).write_bytes(content.getbuffer())
            run = torch.export.load(place / _FILE_OF_PROGRAM).module()
        write_companions(place, job, processor)
        with torch.no_grad():
            differences = compare(lambda pixels: run(pixel_values=pixels), job, tolerance, len(job.pixels))
        written = sizes(place)
    return ExportReport(Path(folder) / _FILE_OF_PROGRAM, differences, len(job.pixels), None, written)


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
        raise ExportError(job.refused("torch.export", error) + _older()) from error
    if job.deployed.text_embeds is not None:
        program = program.run_decompositions({})  # without operations in place, which would keep the text tower alive
    graphs = (part.graph for part in program.graph_module.modules() if isinstance(part, torch.fx.GraphModule))
    for node in itertools.chain.from_iterable(graph.nodes for graph in graphs):
        node.meta.pop("stack_trace", None)
    return _without_unused(program)


def _older() -> str:
    """What to try where torch is older than the one that the programs were tested with; torch 2.6 cannot trace them."""
    release = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    return (
        ""
        if release >= TESTED
        else (
            f" Tested with torch {'.'.join(map(str, TESTED))}, got {torch.__version__}: "
            f'pip install "torch>={".".join(map(str, TESTED))}"'
        )
    )


def _without_unused(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Leave out the weights that no operation reads, such as the text tower of a model whose texts are fixed."""
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
