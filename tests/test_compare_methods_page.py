"""The page on methods: every code block runs, in order, on a tiny model, and its table names every method."""

import re
from pathlib import Path

import families
import matching
import pytest
from PIL import Image
from transformers import ViTImageProcessorPil

from shapadapter.explanation.methods import METHODS

PAGE = Path(__file__).parents[1] / "docs" / "compare-methods.md"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    pytest.importorskip("captum")
    monkeypatch.chdir(tmp_path)
    base = families.base("vit")
    base.save_pretrained("base")
    families.wrap(type(base).from_pretrained("base")).save_pretrained("out")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained("out")
    for name, picture in zip(("cat.jpg", "dog.jpg"), matching.pictures(2), strict=True):
        picture.save(name)
    return tmp_path


def test_every_block_runs(folder, capsys):
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), names)
    assert "512 evaluations" in capsys.readouterr().out
    assert names["error"].shape == (2,)
    assert names["theirs"].attributions.shape == (2, 4, 4, 1)
    assert names["theirs"].attributions.max() > 0
    with Image.open("kernel_shap.png") as figure, Image.open("methods.png") as several:
        assert several.width > 1.5 * figure.width


def test_the_table_names_every_method():
    assert tuple(re.findall(r'^\| `"(\w+)"` \|', PAGE.read_text(), re.MULTILINE)) == METHODS
