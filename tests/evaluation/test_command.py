"""`shapadapter evaluate` on a saved adapter and a folder of images."""

import json
import shutil

import numpy as np
import pytest
import torch
from peft import get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from small import NAMES, bare, pictures, processor, wrapped
from transformers import ViTForImageClassification
from typer.testing import CliRunner

from shapadapter import Evaluation, ShapleyConfig, ShapleyError, load
from shapadapter.cli import app
from shapadapter.cli.evaluate import evaluate_checkpoint
from shapadapter.evaluation import evaluator
from shapadapter.evaluation.dataset import labelled_images
from shapadapter.evaluation.plan import SALIENCY
from shapadapter.hub import update_card

pytestmark = pytest.mark.usefixtures("quick_evaluation")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """An adapter and its base on disk, images in class folders, and masks."""
    root = tmp_path_factory.mktemp("checkpoint")
    bare().save_pretrained(root / "base")
    processor().save_pretrained(root / "base")
    model = wrapped()
    model.peft_config["default"].base_model_name_or_path = str(root / "base")
    model.save_pretrained(root / "adapter")
    for place, picture in enumerate(pictures(8)):
        for kind, image in (("data", picture), ("masks", Image.fromarray(np.eye(40, dtype=np.uint8) * 255))):
            folder = root / kind / NAMES[place % 4]
            folder.mkdir(parents=True, exist_ok=True)
            image.save(folder / f"{place}.png")
    return root


def run(*arguments):
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


def test_the_table_and_the_files(folders, tmp_path):
    output = tmp_path / "report"
    arguments = (folders / "adapter", "--data", folders / "data", "--masks", folders / "masks", "--images", 2)
    found = run(*arguments, "--methods", "equal, leave_one_out", "--output", output)
    assert found.exit_code == 0, found.output
    assert "Error to the true Shapley values" in found.output
    assert "energy inside" in found.output
    result = Evaluation.load(output / "evaluation.json")
    assert list(result.methods) == ["shapadapter", "equal", "leave_one_out", "random", "centre", SALIENCY]
    assert result.task["accuracy"].count == 8
    assert (output / "table.md").read_text() == result.markdown()
    with Image.open(output / "curves.png") as picture:
        assert picture.width > 500
    assert sorted(path.name for path in output.iterdir()) == ["curves.png", "evaluation.json", "records", "table.md"]
    assert f"{folders / 'adapter'} on {folders / 'data'}" in result.markdown()
    assert "Only 2 images" in result.markdown()
    shutil.copytree(folders / "adapter", tmp_path / "other")
    other = run(tmp_path / "other", *arguments[1:], "--output", output)
    assert other.exit_code == 1
    assert "holds the evaluation of" in other.output


def test_the_cost_curve_is_measured_where_it_is_asked_for(folders, tmp_path):
    output = tmp_path / "report"
    arguments = (folders / "adapter", "--data", folders / "data", "--images", 1, "--cost-curve", "--output", output)
    found = run(*arguments)
    assert found.exit_code == 0, found.output
    assert "Error at equal cost" in found.output
    assert Evaluation.load(output / "evaluation.json").cost_curve
    with Image.open(output / "cost_curve.png") as picture:
        assert picture.width > 500


def test_json_goes_to_the_standard_output(folders):
    found = run(folders / "adapter", "--data", folders / "data", "--images", 1, "--json", "--methods", "equal")
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["about"]["images"] == 1


def test_labels_are_found_by_name(folders):
    rows = labelled_images(folders / "data", ["dog", "cat", "bee", "ant"], None)
    assert {(row["label"], row["image"].split("/")[-2]) for row in rows} == {
        (0, "dog"),
        (1, "cat"),
        (2, "bee"),
        (3, "ant"),
    }


def test_classes_are_found_in_whatever_order_the_configuration_lists_them(folders, tmp_path):
    expected = evaluate_checkpoint(folders / "adapter", folders / "data", None, (), None, images=1, progress=False)[-1]
    shutil.copytree(folders / "adapter", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(file.read_text())
    config["id2label"] = dict(reversed(config["id2label"].items()))
    file.write_text(json.dumps(config))
    found = evaluate_checkpoint(tmp_path / "adapter", folders / "data", None, (), None, images=1, progress=False)[-1]
    assert found.task["cross_entropy"] == expected.task["cross_entropy"]


def test_an_adapter_with_a_new_classifier_of_the_base_s_own(folders, tmp_path):
    base = ViTForImageClassification.from_pretrained(folders / "base", num_labels=3, ignore_mismatched_sizes=True)
    model = get_peft_model(base, ShapleyConfig(r=4, prediction="classifier", modules_to_save=["classifier"])).eval()
    model.save_pretrained(tmp_path / "adapter")
    loaded, _ = load(tmp_path / "adapter")
    pixels = torch.randn(1, 3, 24, 24)
    assert torch.equal(loaded.eval()(pixel_values=pixels).logits, model(pixel_values=pixels).logits)


@pytest.mark.parametrize("saved", ["run/base", "base", "/gone/base", "./run/base"])
def test_a_base_whose_path_was_saved_from_elsewhere(folders, tmp_path, saved):
    shutil.copytree(folders / "base", tmp_path / "run" / "base")
    shutil.copytree(folders / "adapter", tmp_path / "run" / "adapter")
    file = tmp_path / "run" / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": saved}))
    loaded, _ = load(tmp_path / "run" / "adapter")
    pixels = torch.randn(1, 3, 24, 24)
    assert torch.equal(loaded.eval()(pixel_values=pixels).logits, wrapped()(pixel_values=pixels).logits)
    shutil.rmtree(tmp_path / "run" / "base")
    with pytest.raises(ShapleyError, match=f"base model {saved} .* is not there"):
        load(tmp_path / "run" / "adapter")


def test_what_is_not_there_is_said_in_one_line(folders, tmp_path):
    (tmp_path / "wolf").mkdir()
    pictures(1)[0].save(tmp_path / "wolf" / "0.png")
    cases = {
        "holds no adapter": (folders / "base", "--data", folders / "data"),
        "subfolder of images": (folders / "adapter", "--data", folders / "base"),
        "no classes of the model": (folders / "adapter", "--data", tmp_path),
        "There is no folder nope.": (folders / "adapter", "--data", "nope"),
        "There is no folder nowhere.": (folders / "adapter", "--data", folders / "data", "--masks", "nowhere"),
        "no mask": (folders / "adapter", "--data", folders / "data", "--masks", tmp_path),
        "'kernel_shap'? The methods are": (folders / "adapter", "--data", folders / "data", "--methods", "kernelshap"),
    }
    for words, arguments in cases.items():
        found = run(*arguments)
        assert found.exit_code == 1
        assert words in found.output.replace("\n", " ")
        assert "Traceback" not in found.output
        assert "function" not in found.output


def test_an_interruption_has_its_own_code(folders, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluator, "evaluate", interrupted)
    found = run(folders / "adapter", "--data", folders / "data")
    assert found.exit_code == 130
    assert "Interrupted" in found.output


def test_an_evaluation_goes_into_the_card_of_its_own_adapter_alone(folders, tmp_path):
    result = evaluate_checkpoint(folders / "adapter", folders / "data", None, (), None, images=1, progress=False)[-1]
    copy = shutil.copytree(folders / "adapter", tmp_path / "copy")
    assert "| Accuracy ↑ |" in update_card(copy, evaluation=result).read_text()
    tensors = load_file(copy / "adapter_model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, copy / "adapter_model.safetensors")
    before = (copy / "README.md").read_bytes()
    with pytest.raises(ShapleyError, match="The evaluation is of other weights"):
        update_card(copy, evaluation=result)
    assert (copy / "README.md").read_bytes() == before
