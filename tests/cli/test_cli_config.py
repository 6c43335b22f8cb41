"""Options from a yaml file, and what wrong usage and errors look like."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from commands import COMMANDS, error_of, run

from shapadapter.core.phrases import argument, as_options, one_line

HOSTILE = "x'$(touch pwned)"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_teaches(command):
    said = run(command, "--help").stdout
    assert f"Example: shapadapter {command}" in said
    assert "--config" in said
    assert "--json" in said
    assert re.search(r"[A-Z][^.]+\.", said)


def test_a_config_file_is_overridden_by_the_command_line(tmp_path):
    config = tmp_path / "explain.yaml"
    config.write_text("checkpoint: out\nimages: [photos/ant, photos/bee/1.png]\ntop-k: 2\nbatch_size: 4\njson: true\n")
    document = json.loads(run("explain", "--config", config).stdout)
    assert [len(image["classes"]) for image in document["images"]] == [2, 2, 2]
    document = json.loads(run("explain", "out", "photos/dog", "--config", config, "--top-k", 1).stdout)
    assert {(image["path"][:10], len(image["classes"])) for image in document["images"]} == {("photos/dog", 1)}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("topk: 3", "unknown option 'topk'. Did you mean 'top-k'?"),
        ("xyz: 3", "See --help."),
        ("config: other.yaml", "unknown option 'config'"),
        ("top_k: three", "Invalid value for '--top-k'"),
        ("top_k: 0", "--top-k"),
        ("json: perhaps", "Expected true or false for 'json'"),
        ("top_k: {a: 1}", "a value or a list of values"),
        ("- a\n- b", "Expected options in"),
        ("a: [", "cannot be read"),
        ("top_k: !!python/object/apply:os.system ['touch ran']", "more than plain yaml"),
        ("top_k: !!python/name:os.system", "which could run code"),
        ("formats: png", "unknown option 'formats'"),
        ("format: gif", "Choose from png, html, json, npz, got 'gif'"),
    ],
)
def test_config_files_that_are_wrong_usage(tmp_path, text, said):
    config = tmp_path / "wrong.yaml"
    config.write_text(text)
    assert said in error_of("explain", "out", "photos", "--config", config, code=2)
    assert not Path("ran").exists()


def test_the_texts_of_errors_are_one_line_without_what_a_terminal_acts_upon():
    assert one_line("a\n  b\x1b[31m\x07c\u202ed") == "a b [31m cd"
    assert "holds no adapter" in error_of("explain", "base", "photos")
    assert "There is no folder ./nowhere." in error_of("explain", "./nowhere", "photos")
    assert "no device 'gpu'" in error_of("explain", "out", "photos", "--device", "gpu")
    assert "dtype must be" in error_of("explain", "out", "photos", "--dtype", "int8")
    assert "Missing argument" in error_of("explain", "out", code=2)
    assert "No such command" in error_of("explan", code=2)
    assert "No such option" in error_of("explain", "out", "photos", "--topk", "3", code=2)


def test_what_an_error_tells_to_type_is_an_option_here():
    assert "--base ./nowhere holds no model" in error_of("explain", "out", "photos", "--base", "./nowhere")
    assert "--revision v2 is one of a repository" in error_of("space", "out", "space", "--revision", "v2")
    assert argument("base", "ada/vit", of="load") == "load(..., base='ada/vit')"
    assert argument("texts", [...]) == "texts=[...]"
    assert argument("base") == "base=..."
    with as_options({"base": "--base", "trust_remote_code": "--trust-remote-code", "texts": "--texts"}):
        assert argument("base", "ada/vit", of="load") == "--base ada/vit"
        assert argument("base", HOSTILE) == f"--base {shlex.quote(HOSTILE)}"
        assert argument("trust_remote_code", True, of="load") == "--trust-remote-code"
        assert argument("texts", [...]) == "--texts ..."
        assert argument("removal", "mask") == "removal='mask'"  # which is none of the command's options
    assert argument("base") == "base=..."


def test_what_is_pasted_is_one_word(tmp_path):
    for name in (HOSTILE, f'{HOSTILE}"', "a b", "a;touch pwned", "`touch pwned`", "back\\", "x\\'$(touch pwned)"):
        with as_options({"subfolder": "--subfolder"}):
            words = f"printf %s {argument('subfolder', name, of='load').removeprefix('--subfolder ')}"
        assert subprocess.run(["sh", "-c", words], cwd=tmp_path, capture_output=True, text=True).stdout == name
    assert not list(tmp_path.iterdir())
