"""`shapadapter push`, and the other commands on what it pushed, by its name."""

import json
import re

import pytest
from server import OWNER, TOKEN
from test_pushing import folders  # noqa: F401 - a fixture
from typer.testing import CliRunner

from shapadapter.cli import app


def run(*arguments, code=0):
    found = CliRunner().invoke(app, list(map(str, arguments)))
    assert found.exit_code == code, f"{found.output}\n{found.exception!r}"
    assert TOKEN not in found.output
    return found


def test_pushed_by_one_command_and_read_by_others(folders, online, tmp_path):  # noqa: F811
    name = f"{OWNER}/by-command"
    words = ("push", folders / "own", name, "--base-repo", f"{OWNER}/base-by-command", "--private", "--json")
    assert json.loads(run(*words).stdout) == {"url": f"{online.url}/{name}"}
    assert "adapter_model.safetensors" in online.files(name)
    assert online.repos["model", name].private
    found = json.loads(run("inspect", name, "--json").stdout)
    assert (found["adapter"], found["supported"], found["base"]) == (True, True, f"{OWNER}/base-by-command")
    assert re.fullmatch("[0-9a-f]{40}", found["base_revision"])
    (tmp_path / "red").mkdir()
    from PIL import Image

    Image.new("RGB", (32, 32), "red").save(tmp_path / "red" / "1.png")
    there = json.loads(run("explain", name, tmp_path / "red", "--json").stdout)["images"]
    here = json.loads(run("explain", folders / "own", tmp_path / "red", "--json").stdout)["images"]
    assert there == here
    assert json.loads(run("evaluate", name, "--data", tmp_path, "--images", 1, "--json", "--methods", "equal").stdout)
    assert "no revision" in run("explain", name, tmp_path / "red", "--revision", "gone", code=1).stderr
    assert run("push", folders / "own", f"bob/{name[4:]}", "--base-repo", "bob/base", code=1).stderr.count("\n") <= 2


def test_a_space_is_pushed_too(folders, online, tmp_path):  # noqa: F811
    pytest.importorskip("gradio")
    words = ("space", folders / "adapter", tmp_path / "space", "--push", f"{OWNER}/demo-by-command", "--json")
    assert json.loads(run(*words).stdout)["url"].startswith(online.url)
    assert "app.py" in online.files(f"{OWNER}/demo-by-command", kind="space")
