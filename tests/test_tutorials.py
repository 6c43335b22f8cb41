"""The tutorials: every code block runs, in order and in one namespace, with the sizes of `SMALL` in place of the page's."""

import re
from pathlib import Path

import numpy as np
import pages
import pytest
import torch
from PIL import Image

TUTORIALS = pages.DOCS / "tutorials"
LARGEST = 100_000  # bytes of a picture in the docs
SMALL = {
    "your-own-folder": {
        "count=5000, placements=2": "count=50",
        "pretrain_epochs=5": "pretrain_epochs=1",
        "num_train_epochs=4": "max_steps=2",
        "range(100)": "range(4)",
        "refine=256": "refine=16",
    },
    "existing-classifier": {
        "mnist_data()  #": "(part[::25] for part in mnist_data())  #",
        "train_test_split(500, seed=0)": "train_test_split(16, seed=0)",
        "patch_size=7": "patch_size=14",
        "num_train_epochs=5": "max_steps=2",
        "num_train_epochs=6": "max_steps=2",
        "(32, 128, 512)": "(4, 8)",
        "refined by 128": "refined by 8",
    },
    "cnn": {
        "count=5000": "count=50",
        "num_train_epochs=4": "max_steps=2",
        "num_train_epochs=3": "max_steps=2",
        "refine=256": "refine=16",
    },
    "clip-texts": {
        "range(4000)": "range(64)",
        "range(200)": "range(8)",
        "num_train_epochs=4, learning_rate": "max_steps=2, learning_rate",
        "num_train_epochs=4, **usual": "max_steps=2, **usual",
    },
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder to work in."""
    for name in ("datasets", "mlxtend"):
        pytest.importorskip(name)
    import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def drawn(page):
    """The pixels of the picture that the page's code has drawn."""
    with Image.open(f"{page}.png") as picture:
        return np.asarray(picture.convert("RGB"))


def test_your_own_folder(folder):
    names = pages.run("docs/tutorials/your-own-folder.md", {}, here=SMALL["your-own-folder"])
    assert names["classes"] == ["four", "one", "three", "two", "zero"]
    assert set(names["explanation"].labels) == set(names["classes"])
    assert names["explanation"].attributions.shape == (4, 8, 8, 5)
    assert names["explanation"].efficiency_gap.max() < 1e-4
    assert names["refined"].relative_errors.shape == (3, 1)
    assert 'lang="en"' in Path("mistakes.html").read_text(encoding="utf-8")
    assert drawn("your-own-folder").std() > 1


def test_existing_classifier(folder, capsys):
    names = pages.run("docs/tutorials/existing-classifier.md", {}, here=SMALL["existing-classifier"])
    said = capsys.readouterr().out
    assert "wrapped: the logits differ by 0\n" in said
    assert "trained: the logits differ by 0\n" in said
    ways = names["ways"]
    many, exact = ways["one pass, refined by 8"].attributions, names["exact"].attributions
    assert many.shape == (3, 2, 2, 1)
    assert torch.allclose(many.sum((1, 2)), exact.sum((1, 2)), atol=1e-4)
    assert not torch.equal(many, ways["one pass"].attributions)
    assert drawn("existing-classifier").std() > 1


def test_cnn(folder):
    names = pages.run("docs/tutorials/cnn.md", {}, here=SMALL["cnn"])
    assert names["one_pass"].attributions.shape == (4, 8, 8, 1)
    assert names["one_pass"].efficiency_gap.max() < 1e-4
    assert names["cam"].method == "grad_cam"
    assert not names["cam"].sums_to_logits
    assert drawn("cnn").std() > 1


def test_clip_texts(folder):
    names = pages.run("docs/tutorials/clip-texts.md", {}, here=SMALL["clip-texts"])
    explanation = names["explanation"]
    assert explanation.attributions.shape == (8, 6, 6, 4)
    assert explanation.labels == tuple(f"a {colour} digit" for colour in names["COLOURS"])
    assert explanation.efficiency_gap.max() < 1e-3
    assert len(names["hits"]) == 16
    assert drawn("clip-texts").std() > 1


@pytest.mark.parametrize("page", SMALL)
def test_the_picture_of_the_page_is_there(page):
    text = (TUTORIALS / f"{page}.md").read_text(encoding="utf-8")
    pictures = re.findall(r"!\[([^\]]+)\]\(([^)]+)\)", text)
    assert pictures
    for _, file in pictures:
        assert (TUTORIALS / file).stat().st_size < LARGEST
        assert f'savefig("{file}"' in text, f"no code of {page}.md draws {file}"
