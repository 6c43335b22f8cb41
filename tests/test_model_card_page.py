"""The page on the model card: its Python runs, in order, on a tiny model."""

import re
from pathlib import Path

from test_card_training import evaluation  # noqa: F401 - a fixture
from test_trainer import Processor, images, tiny_vit, wrapped
from transformers import ViTForImageClassification

PAGE = Path(__file__).parents[1] / "docs" / "model-card.md"


def test_the_page_runs(tmp_path, monkeypatch, evaluation):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    tiny_vit().save_pretrained("base")
    wrapped(base=ViTForImageClassification.from_pretrained("base")).save_pretrained("out")
    Processor(size={"height": 32, "width": 32}).save_pretrained("out")
    data = images(6)
    for name in ("rust/1.png", "healthy/2.png"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True)
        data[0]["image"].save(tmp_path / "photos" / name)
    known = {"train": data, "test": data}
    first, second = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    more = "max_steps=3, use_cpu=True, report_to='none', disable_tqdm=True"
    exec(first.replace("max_steps=3", more), known)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert card.count("](explanations/") == 2
    assert "# Leaves\n" in card
    assert "license: mit" in card
    evaluation.save("report/evaluation.json")
    exec(second, known)
    assert "Accuracy ↑" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_the_page_s_picture_is_there():
    assert (PAGE.parent / "model-card.png").is_file()
