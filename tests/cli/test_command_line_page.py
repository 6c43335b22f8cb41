"""The page on the command line: every example parses, and what is cheap runs, one after the other."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

pytest.importorskip("datasets")

from commands import COMMANDS, run
from small import NAMES, pictures
from typer.main import get_command

from shapadapter.cli import app, train

PAGE = (Path(__file__).parents[2] / "docs" / "command-line.md").read_text("utf-8")
DEAR = ("demo", "export", "push")
"""Commands that are tested elsewhere; of these the words are parsed only."""


def examples() -> list[list[str]]:
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL))
    return [shlex.split(line)[1:] for line in blocks.splitlines() if line.startswith("shapadapter ")]


@pytest.fixture(scope="module")
def place(folder, tmp_path_factory):
    """What the demo leaves, in small."""
    root = tmp_path_factory.mktemp("page")
    shutil.copytree(folder / "out", root / "demo-output" / "adapter")
    shutil.copytree(folder / "base", root / "demo-output" / "pretrained")
    names = ["eight", *list(NAMES.values())[1:]]
    config = root / "demo-output" / "adapter" / "adapter_config.json"
    words = json.loads(config.read_text())
    words |= {"id2label": dict(enumerate(names)), "base_model_name_or_path": str(root / "demo-output" / "pretrained")}
    config.write_text(json.dumps(words))
    for number, picture in enumerate(pictures(8)):
        for kind in ("test", "masks"):
            home = root / "demo-output" / kind / names[number % 4]
            home.mkdir(parents=True, exist_ok=True)
            picture.save(home / f"{18 if number == 0 else number}.png")
    return root


def test_every_example_parses_and_what_is_cheap_runs(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setattr(train, "launch", lambda *_, **__: 0)
    Path("train.yaml").write_text(re.search(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[1])
    found = examples()
    assert {words[0] for words in found} == set(COMMANDS)
    for words in found:
        command = get_command(app).commands[words[0]]
        command.make_context(words[0], words[1:])
        if words[0] in DEAR:
            continue
        # Its model has other classes than the demo's.
        words = ["bee" if word == "nine" else word for word in words]
        said = run(*words).stdout
        if "--json" in words:
            json.loads(said)
    assert Path("why/18.attribution.png").is_file()
    assert Path("report/report.html").is_file()
    assert "Relative L2 error" in Path("demo-output/adapter/README.md").read_text()
    assert Path("space/app.py").is_file()


def test_the_page_names_all_commands_and_keys(place, monkeypatch):
    monkeypatch.chdir(place)
    assert set(re.findall(r"^\| \[`(\w+)`\]", PAGE, re.MULTILINE)) == set(COMMANDS)
    document = json.loads(run("explain", "demo-output/adapter", "demo-output/test/eight", "--json").stdout)
    keys = {*document, *document["images"][0], *document["images"][0]["classes"][0]}
    assert all(f"`{key}`" in PAGE for key in keys)
