"""`shapadapter evaluate` on a saved adapter and a folder of images."""

import json

import numpy as np
import pytest
from PIL import Image
from small import NAMES, bare, pictures, processor, wrapped
from typer.testing import CliRunner

from shapadapter import Evaluation
from shapadapter.cli import app
from shapadapter.evaluation import checkpoint as command

pytest.importorskip("matplotlib")


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
    assert list(result.methods) == ["shapadapter", "equal", "leave_one_out", "random", "centre", "saliency"]
    assert result.task["accuracy"].count == 8
    assert (output / "table.md").read_text() == result.markdown()
    with Image.open(output / "curves.png") as picture:
        assert picture.width > 500
    assert sorted(path.name for path in output.iterdir()) == ["curves.png", "evaluation.json", "records", "table.md"]


def test_json_goes_to_the_standard_output(folders):
    found = run(folders / "adapter", "--data", folders / "data", "--images", 1, "--json", "--methods", "equal")
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["about"]["images"] == 1


def test_labels_are_found_by_name(folders):
    rows = command.labelled_images(folders / "data", ["dog", "cat", "bee", "ant"], None)
    assert {(row["label"], row["image"].split("/")[-2]) for row in rows} == {
        (0, "dog"),
        (1, "cat"),
        (2, "bee"),
        (3, "ant"),
    }


def test_what_is_not_there_is_said_in_one_line(folders, tmp_path):
    (tmp_path / "wolf").mkdir()
    pictures(1)[0].save(tmp_path / "wolf" / "0.png")
    cases = {
        "holds no adapter": (folders / "base", "--data", folders / "data"),
        "subfolder of images": (folders / "adapter", "--data", folders / "base"),
        "no classes of the model": (folders / "adapter", "--data", tmp_path),
        "no mask": (folders / "adapter", "--data", folders / "data", "--masks", tmp_path),
        "no method 'shap'": (folders / "adapter", "--data", folders / "data", "--methods", "shap"),
    }
    for words, arguments in cases.items():
        found = run(*arguments)
        assert found.exit_code == 1
        assert words in found.output.replace("\n", " ")
        assert "Traceback" not in found.output


def test_an_interruption_has_its_own_code(folders, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "evaluate", interrupted)
    found = run(folders / "adapter", "--data", folders / "data")
    assert found.exit_code == 130
    assert "Interrupted" in found.output
