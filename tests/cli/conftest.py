"""A base, an adapter of it and pictures, in the folder where the commands run."""

import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "evaluation")]

from small import NAMES, bare, pictures, processor, wrapped  # noqa: E402


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A base, an adapter of it, and pictures in class folders."""
    root = tmp_path_factory.mktemp("command")
    bare().save_pretrained(root / "base")
    processor().save_pretrained(root / "base")
    model = wrapped()
    model.peft_config["default"].base_model_name_or_path = str(root / "base")
    model.save_pretrained(root / "out")
    for place, picture in enumerate(pictures(8)):
        home = root / "photos" / NAMES[place % 4]
        home.mkdir(parents=True, exist_ok=True)
        picture.save(home / f"{place}.png")
    return root


@pytest.fixture(autouse=True)
def _here(folder, monkeypatch, quick_evaluation):
    monkeypatch.chdir(folder)
