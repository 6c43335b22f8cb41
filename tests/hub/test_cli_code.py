"""A base model with code of its own, at the command line: nothing of it runs unless that is typed."""

import json

import pytest
from peft import get_peft_model
from PIL import Image
from test_cli_push import run
from tiny import BASE, NAMES, with_code
from transformers import AutoModelForImageClassification

from shapadapter import ShapleyConfig

TYPED = "--trust-remote-code"
COMMANDS = {
    "explain": ("out", "photos", "--json"),
    "evaluate": ("out", "--data", "photos", "--images", "1", "--methods", "equal", "--json"),
    "report": ("out", "--data", "photos", "--images", "1", "--methods", "equal", "--shown", "1", "--json"),
    "export": ("out", "exported", "--to", "torch", "--images", "photos", "--json"),
    "card": ("out", "--images", "photos", "--json"),
    "inspect": ("out", "--json"),
}


KINDS = ("a repository", "a folder")


@pytest.fixture(params=KINDS)
def trace(request, online, tmp_path, monkeypatch):
    """Where the code of the base leaves a file; the base is `ada/own-code` or a folder, and `out` its adapter."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    monkeypatch.chdir(tmp_path)
    get_peft_model(AutoModelForImageClassification.from_pretrained(BASE), ShapleyConfig(r=2)).save_pretrained("out")
    files = with_code(online.files(BASE), tmp_path / "it-ran")
    if request.param == "a repository":
        base = "ada/own-code"
        online.add(base, files)
    else:
        base = str(tmp_path / "own-code")
        (tmp_path / "own-code").mkdir()
        for name, data in files.items():
            (tmp_path / "own-code" / name).write_bytes(data)
    config = tmp_path / "out" / "adapter_config.json"
    mapping = {"base_model_class": "OwnModel", "parent_library": "transformers_modules.own"}
    fields = {"base_model_name_or_path": base, "revision": None, "auto_mapping": mapping}
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))
    (tmp_path / "photos" / NAMES[1]).mkdir(parents=True)
    Image.new("RGB", (32, 32), (80, 10, 200)).save(tmp_path / "photos" / NAMES[1] / "0.png")
    return tmp_path / "it-ran"


@pytest.mark.parametrize(
    ("trace", "command"),
    [
        (kind, command)
        for kind in KINDS
        for command in COMMANDS
        if kind == "a folder" or command in ("explain", "report")
    ],
    indirect=["trace"],
)
def test_code_runs_only_where_that_is_typed(trace, command):
    refused = run(command, *COMMANDS[command], code=1)
    assert "Read it, and if you trust it, --trust-remote-code." in refused.stderr
    assert not refused.stdout
    assert not trace.exists()
    json.loads(run(command, *COMMANDS[command], TYPED).stdout)
    assert trace.exists()


def test_a_base_before_it_is_wrapped(trace):
    base = json.loads((trace.parent / "out" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert f"if you trust it, {TYPED}." in run("inspect", base, code=1).stderr
    assert not trace.exists()
    found = json.loads(run("inspect", base, "--json", TYPED).stdout)
    assert (found["family"], found["model_class"], found["supported"]) == ("own", "OwnModel", True)


@pytest.mark.parametrize("trace", ["a folder"], indirect=True)
def test_no_code_is_pushed(trace, online):
    said = run("push", "out", "ada/never-pushed", "--base-repo", "ada/never-pushed-base", code=1).stderr
    assert "comes with code of its own (own.py), which is not pushed" in said
    assert "hf upload" in said
    assert "(own.py), which is not pushed, and which no Space would run" in run("space", "out", "space", code=1).stderr
    assert not (trace.parent / "space").exists()
    assert not trace.exists()
    assert not {("model", "ada/never-pushed"), ("model", "ada/never-pushed-base")} & set(online.repos)
