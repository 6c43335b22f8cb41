"""The page on the demo app: every Python block runs, in order, on a tiny model, and the numbers on it are those of the code."""

import re
from pathlib import Path

import pytest
from PIL import Image
from spaces import noise, write_checkpoint

from shapadapter.hub import space
from shapadapter.hub.space.limits import MAX_BYTES, MAX_PIXELS

DOCS = Path(__file__).parents[1] / "docs"


def test_every_block_runs(tmp_path, monkeypatch):
    gradio = pytest.importorskip("gradio")
    pushed = []
    monkeypatch.setattr(space, "push_space", lambda *given, **named: pushed.append((given, named)))
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path).rename(tmp_path / "out")
    for name in ("cat.jpg", "dog.jpg"):
        noise().save(name)
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", (DOCS / "space.md").read_text(), re.DOTALL):
        exec(compile(block, "space.md", "exec"), names)
    assert (tmp_path / "space" / "app.py").is_file()
    assert sorted(path.name for path in (tmp_path / "hub-space").iterdir()) == [
        "README.md",
        "app.py",
        "requirements.txt",
        "shapadapter",
    ]
    assert pushed == [(("space", "you/cats-and-dogs"), {"private": True})]
    assert isinstance(names["app"], gradio.Blocks)


def test_its_numbers_are_true():
    pytest.importorskip("gradio")
    from shapadapter.hub.space.app import KEPT, MAX_TEXTS, MAX_WAITING, SHOWN
    from shapadapter.hub.space.limits import MAX_DISK, MAX_REQUEST

    text = " ".join((DOCS / "space.md").read_text().split())
    assert KEPT == 30 * 60
    for words in (
        f"at most {MAX_BYTES // 2**20} MB and {MAX_PIXELS // 10**6} million pixels",
        f"{MAX_REQUEST // 2**20} MB in all and take two minutes",
        f"{MAX_DISK // 2**30} GB of the disk",
        f"at most {MAX_WAITING} visitors wait",
        f"The likeliest {SHOWN} classes are on offer, or up to {MAX_TEXTS} texts",
    ):
        assert words in text
    with Image.open(DOCS / "space.png") as picture:
        assert picture.width >= 800
    assert (DOCS / "space.png").stat().st_size < 150_000
