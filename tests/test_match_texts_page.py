"""The page on texts: every code block runs, in order, on a tiny CLIP in place of the published one."""

import csv
import re
from pathlib import Path

import matching
import pytest
import texts
import torch
from PIL import Image

PAGE = Path(__file__).parents[1] / "docs" / "match-texts.md"
HERE = {
    '"openai/clip-vit-base-patch32"': '"clip"',
    "num_train_epochs=3, per_device_train_batch_size=64": "max_steps=2, use_cpu=True, report_to='none', disable_tqdm=True",
    # The tiny model knows other words.
    "a photo of a cat": "a photo of a one",
    "a photo of a dog": "a photo of a two",
    "a photo of a sofa": "a photo of a six",
    "a photo of a red sofa": "a red six",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    matching.base("clip").save_pretrained(tmp_path / "clip")
    matching.processor("clip").save_pretrained(tmp_path / "clip")
    photos = tmp_path / "photos"
    photos.mkdir()
    captions = texts.captions(50)
    for index, picture in enumerate(matching.pictures(50)):
        picture.save(photos / f"{index}.png")
    with (photos / "metadata.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file_name", "text"])
        rows.writerows([f"{index}.png", caption] for index, caption in enumerate(captions))
    return tmp_path


def blocks():
    code = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    for old, new in HERE.items():
        assert any(old in block for block in code), f"the page no longer says {old}"
        code = [block.replace(old, new) for block in code]
    return code


def test_every_block_runs(folder, capsys):
    names: dict = {}
    for block in blocks():
        exec(compile(block, str(PAGE), "exec"), names)
    assert names["explanation"].attributions.shape == (8, 4, 4, 3)
    gap = names["explanation"].logits[:, 0] - names["explanation"].logits[:, 1]
    null = names["explanation"].null_values[:, 0] - names["explanation"].null_values[:, 1]
    assert torch.allclose(names["rather"].sum(dim=(1, 2)) + null, gap, atol=1e-4)
    assert torch.allclose(names["null"] + names["maps"].sum(1), names["scores"], atol=1e-4)
    with torch.no_grad():
        direct = names["model"](**names["inputs"], text_embeds=names["later"])
    assert torch.allclose(direct.attributions, names["maps"], atol=1e-5)
    assert torch.allclose(direct.logits, names["scores"], atol=1e-5)
    assert "image to text" in capsys.readouterr().out
    assert len(names["found"].rows) == 14
    with Image.open("texts.png") as figure:
        assert figure.width > 100
