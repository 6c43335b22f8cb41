"""Exported models: the same numbers elsewhere, for any batch, or an error and nothing written."""

import json
import os
import subprocess
import sys
import zipfile
from importlib import util
from pathlib import Path
from unittest.mock import MagicMock

import families
import matching
import numpy as np
import pytest
import torch
import zoo
from torch import nn
from transformers import ViTImageProcessorPil as Processor

from shapadapter import (
    ExportError,
    ImageError,
    ShapleyError,
    UnsupportedModelError,
    explain,
    export_onnx,
    export_program,
)
from shapadapter.export import formats
from shapadapter.export.deployed import OUTPUTS
from shapadapter.export.formats import _new_folder

needs_onnx = pytest.mark.skipif(
    any(util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="needs shapadapter[onnx]",
)
PROCESSOR = Processor(size={"height": families.SIDE, "width": families.SIDE}, image_std=[0.3, 0.4, 0.5])
NAMES = {0: "<script>alert(1)</script>", 1: "b", 2: "c", 3: "d", 4: 'e"'}
TEXTS = ["a photo of a one", "a photo of a two", "a six"]


def pictures(count=4):
    return matching.pictures(count, side=40)


def vit():
    model = families.wrap(families.build("vit", id2label=NAMES, num_hidden_layers=1), "classifier")
    return model, {"images": pictures(), "processor": PROCESSOR}


def resnet():
    model = families.wrap(zoo.base("resnet"), "classifier", fill="blur", grid=(4, 4))
    return model, {"images": zoo.inputs("resnet", 4)}


def clip():
    processor = matching.processor("clip")
    return matching.wrapped("clip", "classifier"), {"images": pictures(), "processor": processor, "texts": TEXTS}


# v(empty), which `classifier` prediction asks of the base model, is a number in the file: the way of removal is not.
CASES = {
    "drop": vit,
    "pixels": resnet,
    "texts": clip,
}


def on(*cases):
    return pytest.mark.parametrize("case", ["drop", *(pytest.param(one, marks=pytest.mark.families) for one in cases)])


def in_onnxruntime(path):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda pixels: dict(
        zip(OUTPUTS, map(torch.tensor, session.run(list(OUTPUTS), {"pixel_values": pixels.numpy()})), strict=True)
    )


def in_torch(path):
    program = torch.export.load(path).module()
    with torch.no_grad():
        return lambda pixels: program(pixel_values=pixels)


def pixels_of(given):
    if "processor" not in given:
        return given["images"]["pixel_values"]
    side = getattr(given["processor"], "image_processor", given["processor"])
    return side(given["images"], return_tensors="pt")["pixel_values"]


def assert_agrees(run, model, given):
    """All outputs, for batches other than the traced one; and the exported numbers themselves add up."""
    explanation = explain(model, given["images"], given.get("processor"), texts=given.get("texts"))
    pixels = pixels_of(given)
    for count in (1, 4):
        found = run(pixels[:count])
        assert set(found) == set(OUTPUTS)
        scale = max(1, explanation.logits.abs().max().item(), explanation.attributions.abs().max().item())
        expected = explanation.attributions[:count].flatten(1, 2)
        torch.testing.assert_close(found["attributions"], expected, atol=1e-4 * scale, rtol=0)
        for name in ("logits", "null_values"):
            torch.testing.assert_close(found[name], getattr(explanation, name)[:count], atol=1e-4 * scale, rtol=0)
        # As exact as in the model: rounding grows with what is given and taken, not with the sum.
        given_and_taken = found["attributions"].abs().sum(1).clamp(min=1)
        gap = (found["null_values"] + found["attributions"].sum(1) - found["logits"]).abs()
        assert (gap <= 1e-6 * given_and_taken).all()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A function that exports a case, each one once; it returns model, images and report."""
    known = {}

    def export(case, function):
        if (case, function) not in known:
            model, given = CASES[case]()
            folder = tmp_path_factory.mktemp(case) / "exported"
            known[case, function] = model, given, function(model, folder, **given)
        return known[case, function]

    return export


@needs_onnx
@on("texts")
def test_onnx_computes_the_same_for_any_batch(case, exported, capfd):
    model, given, report = exported(case, export_onnx)
    assert capfd.readouterr().out == ""  # where --json prints
    assert_agrees(in_onnxruntime(report.path), model, given)
    assert report.images == 4
    assert 0 < max(report.differences.values()) < 1e-3
    assert report.sizes == {path.name: path.stat().st_size for path in report.path.parent.iterdir()}


@on("pixels")
def test_a_program_computes_the_same_for_any_batch(case, exported):
    model, given, report = exported(case, export_program)
    assert_agrees(in_torch(report.path), model, given)
    assert report.opset is None
    program = torch.export.load(report.path)
    names = [*program.state_dict, *program.constants]
    assert not [name for name in names if "text_model" in name or "original_module" in name or "lora_A" in name]


@needs_onnx
def test_the_files_of_an_onnx_export(exported):
    import onnx

    report = exported("drop", export_onnx)[2]
    folder = report.path.parent
    listed = {"model.onnx", "model.onnx.data", "export.json", "config.json", "preprocessor_config.json"}
    assert {path.name for path in folder.iterdir()} == set(report.sizes) == listed
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    config = json.loads((folder / "config.json").read_text())
    assert config["id2label"] == {str(index): name for index, name in NAMES.items()}
    assert Processor.from_pretrained(folder).image_std == PROCESSOR.image_std
    saved = onnx.load(report.path, load_external_data=False)
    about = {entry.key: entry.value for entry in saved.metadata_props}
    assert json.loads(about["labels"]) == list(NAMES.values())
    assert json.loads(about["players"]) == [4, 4]
    assert about["level"] == "one forward pass"
    shapes = {
        value.name: [part.dim_param or part.dim_value for part in value.type.tensor_type.shape.dim]
        for value in (*saved.graph.input, *saved.graph.output)
    }
    assert shapes == {
        "pixel_values": ["batch", 3, 32, 32],
        "logits": ["batch", 5],
        "attributions": ["batch", 16, 5],
        "null_values": ["batch", 5],
    }
    assert [(entry.domain, entry.version) for entry in saved.opset_import] == [("", report.opset)]
    text = str(report)
    assert f"opset {report.opset}" in text
    assert "largest difference on 4 images, batches of 1 to 3: logits" in text
    assert "attributions: one forward pass; a backward pass and refinement need the model itself" in text
    assert json.loads(json.dumps(report.to_dict()))["differences"] == report.differences
    assert_tells_no_place(b"".join(path.read_bytes() for path in folder.iterdir()))


def test_the_files_of_a_program(exported):
    report = exported("drop", export_program)[2]
    listed = {"model.pt2", "config.json", "preprocessor_config.json"}
    assert {path.name for path in report.path.parent.iterdir()} == set(report.sizes) == listed
    extra = {"shapadapter.json": ""}
    torch.export.load(report.path, extra_files=extra)
    assert json.loads(json.loads(extra["shapadapter.json"])["labels"]) == list(NAMES.values())
    with zipfile.ZipFile(report.path) as archive:
        assert_tells_no_place(b"".join(archive.read(name) for name in archive.namelist()))


def assert_tells_no_place(content):
    """Nothing in these bytes says where on whose machine they were made."""
    assert str(Path(__file__).parents[1]).encode() not in content
    assert sys.prefix.encode() not in content


def test_the_model_stays_as_it_is_and_half_precision_is_exported_in_full(tmp_path):
    model = families.wrap("vit", "classifier", modules_to_save=["classifier"]).to(torch.bfloat16).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        said = model.eval()(pixel_values=families.images(2).bfloat16())
        model.train()
    report = export_program(model, tmp_path / "program", images=pictures(2), processor=PROCESSOR)
    assert model.training
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        again = model.eval()(pixel_values=families.images(2).bfloat16())
    assert torch.equal(again.attributions, said.attributions)
    assert any(parameter.requires_grad for parameter in model.parameters())
    found = in_torch(report.path)(pixels_of({"images": pictures(2), "processor": PROCESSOR}))
    assert {value.dtype for value in found.values()} == {torch.float32}
    assert model.dtype == torch.bfloat16
    expected = explain(model.float(), pictures(2), PROCESSOR)
    torch.testing.assert_close(found["logits"], expected.logits, atol=1e-4, rtol=0)


# -- nothing half-written --------------------------------------------------------------------------------------------


def small():
    return families.wrap(families.build("vit", num_hidden_layers=1))


def test_a_difference_above_the_tolerance_leaves_nothing_behind(tmp_path):
    model = small()
    with pytest.raises(ExportError, match=r"differs by .* more than tolerance=0 allows .* Nothing was written"):
        export_program(model, tmp_path / "program", images=pictures(1), processor=PROCESSOR, tolerance=0)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_computes_something_else_is_found_out(tmp_path, monkeypatch):
    trace = formats._traced

    def wrong(job):
        with torch.no_grad():
            modules = job.deployed.model.named_modules()
            share = next(module for name, module in modules if name.endswith("lora_shapley_share.default"))
            share.weight.mul_(1.01)  # the attributions change, their sum does not
        return trace(job)

    monkeypatch.setattr(formats, "_traced", wrong)
    with pytest.raises(ExportError, match=r"differs by .* in attributions"):
        export_program(small(), tmp_path / "program", images=pictures(1), processor=PROCESSOR)
    assert list(tmp_path.iterdir()) == []


@needs_onnx
def test_an_opset_the_exporter_cannot_write_is_an_error(tmp_path, monkeypatch):
    wrote = MagicMock()
    wrote.program.opset_imports = {"": 18}
    monkeypatch.setattr("transformers.exporters.OnnxExporter.export", lambda *_, **__: wrote)
    given = {"images": pictures(1), "processor": PROCESSOR}
    with pytest.raises(ExportError, match="cannot write opset 9, it wrote 18"):
        export_onnx(small(), tmp_path / "onnx", **given, opset=9)
    assert list(tmp_path.iterdir()) == []


def test_a_file_for_one_batch_size_alone_is_found_out(tmp_path, monkeypatch):
    def fixed(job):
        return torch.export.export(job.deployed, (), {"pixel_values": job.two_images()})

    monkeypatch.setattr(formats, "_traced", fixed)
    with pytest.raises(ExportError, match="cannot run a batch of 1"):
        export_program(small(), tmp_path / "program", images=pictures(1), processor=PROCESSOR)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_traced_is_named(tmp_path, monkeypatch):
    model = small()

    def refuse(*_, **__):
        raise RuntimeError("This cannot be traced.\nA long story.")

    monkeypatch.setattr(torch.export, "export", refuse)
    expected = r"ViTForImageClassification cannot be exported to torch\.export: RuntimeError: This cannot be traced\."
    with pytest.raises(ExportError, match=expected) as caught:
        export_program(model, tmp_path / "program", images=pictures(1), processor=PROCESSOR)
    assert "long story" not in str(caught.value)
    assert "pip install" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(torch, "__version__", "2.6.0+cpu")
    with pytest.raises(ExportError, match=r'Tested with torch 2\.13, got 2\.6\.0\+cpu: pip install "torch>=2\.13"$'):
        export_program(model, tmp_path / "program", images=pictures(1), processor=PROCESSOR)


def test_a_folder_takes_its_name_when_it_is_complete(tmp_path):
    names, folder = ("model.pt2", "config.json"), tmp_path / "a" / "program"
    for content in ("old", "new"):
        with _new_folder(folder, names) as place:
            (place / "model.pt2").write_text(content)
            assert not folder.exists() or (folder / "model.pt2").read_text() == "old"
    with pytest.raises(ZeroDivisionError), _new_folder(folder, names) as place:
        (place / "model.pt2").write_text(str(1 / 0))
    assert [path.name for path in folder.parent.iterdir()] == ["program"]
    assert [path.read_text() for path in folder.iterdir()] == ["new"]


def test_other_files_are_left_alone(tmp_path):
    model = small()
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path, tmp_path / "file"):
        with pytest.raises(FileExistsError, match="file, which is no part of an export"):
            export_program(model, folder, images=pictures(1), processor=PROCESSOR)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("export", [pytest.param(export_onnx, marks=needs_onnx), export_program])
def test_what_is_refused(export, tmp_path, monkeypatch):
    model, folder = small(), tmp_path / "out"
    with pytest.raises(ShapleyError, match="active Shapley adapter"):
        export(families.base("vit"), folder, images=pictures(1), processor=PROCESSOR)
    with pytest.raises(ShapleyError, match="leave texts out"):
        export(model, folder, images=pictures(1), processor=PROCESSOR, texts=TEXTS)
    with pytest.raises(TypeError, match="interpolate_pos_encoding"):
        export(model, folder, images=pictures(1), processor=PROCESSOR, interpolate_pos_encodin=True)
    with pytest.raises(ImageError):
        export(model, folder, images=[], processor=PROCESSOR)
    with pytest.raises(ShapleyError, match=r"pass texts=\[\.\.\.\]"):
        export(matching.wrapped("clip"), folder, images=pictures(1), processor=matching.processor("clip"))
    naflex = families.wrap(zoo.base("siglip2"))
    with pytest.raises(ImageError, match="NaFlex"):
        export(naflex, folder, images=zoo.inputs("siglip2", 2))
    model.get_base_model().vit.packed = nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match="quantised, which cannot be exported"):
        export(model, folder, images=pictures(1), processor=PROCESSOR)
    assert list(tmp_path.iterdir()) == []


def test_missing_packages_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "find_spec", lambda name: None if name == "onnxruntime" else True)
    with pytest.raises(ImportError, match=r'needs onnxruntime: pip install "shapadapter\[onnx\]"'):
        export_onnx(small(), tmp_path / "onnx", images=pictures(1), processor=PROCESSOR)


# -- where nothing of ours is installed ------------------------------------------------------------------------------


def test_a_program_needs_torch_and_nothing_else(exported, tmp_path):
    _, given, report = exported("drop", export_program)
    pixels = pixels_of(given)
    np.save(tmp_path / "pixels.npy", pixels.numpy())
    script = """
import sys, numpy, torch
program = torch.export.load(sys.argv[1]).module()
output = program(pixel_values=torch.from_numpy(numpy.load(sys.argv[2])))
assert not {"shapadapter", "transformers", "peft"} & set(sys.modules)
numpy.save(sys.argv[3], output["attributions"].detach().numpy())
"""
    line = [sys.executable, "-c", script, report.path, tmp_path / "pixels.npy", tmp_path / "maps.npy"]
    subprocess.run(line, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    expected = in_torch(report.path)(pixels)["attributions"].detach()
    torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / "maps.npy")), expected, atol=1e-6, rtol=0)
