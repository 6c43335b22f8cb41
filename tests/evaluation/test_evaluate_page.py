"""The page on evaluation: every code block runs, in order, on a tiny model."""

import re
from pathlib import Path

import pytest
from PIL import Image
from small import NAMES, bare, pictures, processor, wrapped

from shapadapter import Evaluation

pytestmark = pytest.mark.usefixtures("quick_evaluation")

PAGE = Path(__file__).parents[2] / "docs" / "evaluate.md"
HERE = {
    'cache="records")\nprint': 'cache="records", images=2, budgets=(16, 64))\nprint',
    "images=8,": "images=2,",
    "images=4, cost_curve": "images=1, truth_evaluations=256, budgets=(16, 64), cost_curve",
    'ShapleyTrainingArguments(\n        "out",': 'ShapleyTrainingArguments("out", use_cpu=True, report_to="none", disable_tqdm=True,',
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    bare().save_pretrained("base")
    model = wrapped()
    model.peft_config["default"].base_model_name_or_path = "base"
    model.save_pretrained("out")
    processor().save_pretrained("out")
    for place, picture in enumerate(pictures(8)):
        kind = tmp_path / "photos" / NAMES[place % 4]
        kind.mkdir(parents=True, exist_ok=True)
        picture.save(kind / f"{place}.png")
        (tmp_path / "masks").mkdir(exist_ok=True)
        picture.convert("L").save(tmp_path / "masks" / f"{place}.png")
    return tmp_path


def test_every_block_runs(folder, capsys):
    page = PAGE.read_text()
    for old, new in HERE.items():
        assert old in page, f"the page no longer says {old}"
        page = page.replace(old, new)
    names: dict = {"shuffled": wrapped()}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), names)
    printed = capsys.readouterr().out
    assert "Error to the true Shapley values" in printed
    assert list(Evaluation.load("evaluation.json").methods)[1:3] == ["leave_one_out", "kernel_shap"]
    assert names["masked"][0]["mask"].mode == "L"
    assert "refined by 64" in names["result"].methods
    assert names["at_cost"].cost_curve
    for name in ("curves", "cost_curve"):
        with Image.open(f"{name}.png") as figure:
            assert figure.width > 100
