"""Credentials in HF_ENDPOINT, in names and in other people's errors are echoed nowhere."""

import os
import subprocess
import sys
import time
import warnings

import pytest
from tiny import save_base

from shapadapter import CheckpointError, ShapleyError
from shapadapter.core.errors import redacted
from shapadapter.core.remote import hub_trouble, warn_of_local_base
from shapadapter.hub.card.facts import code

SCRIPT = """
import logging, traceback
logging.basicConfig(level=logging.DEBUG)
from peft import get_peft_model
from transformers import AutoModelForImageClassification
from typer.testing import CliRunner
from shapadapter import ShapleyConfig, load
from shapadapter.cli.app import app
from shapadapter.hub import push
from shapadapter.hub.space import push_space, write_space

model = get_peft_model(AutoModelForImageClassification.from_pretrained("base"), ShapleyConfig(r=2))
model.peft_config["default"].base_model_name_or_path = "ada/gone"
model.save_pretrained("adapter")
write_space("adapter", "space")
name = "https://me:secret@hub.example/ada/mine"
for road in (
    lambda: load("ada/mine"),
    lambda: load("ada/mine?token=secret"),
    lambda: load(name),
    lambda: load("adapter"),
    lambda: load("adapter", base=name),
    lambda: push("adapter", "ada/mine"),
    lambda: push("adapter", name),
    lambda: push_space("space", "ada/mine"),
    lambda: push_space("space", name),
):
    try:
        road()
    except Exception:
        traceback.print_exc()
for words in (["push", "adapter", name], ["push", "adapter", "ada/mine"], ["inspect", name], ["explain", name, "x.png"]):
    print(CliRunner().invoke(app, words).output)
"""


def test_nothing_that_is_printed_holds_them(tmp_path):
    save_base(tmp_path / "base")
    endpoint = {"HF_ENDPOINT": "http://me:secret@127.0.0.1:9", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_XET": "1"}
    quick = {"HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "", "OMP_NUM_THREADS": "1", "NO_PROXY": "*"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=tmp_path,
        env={**os.environ, **endpoint, **quick},
        capture_output=True,
        text=True,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert said.count("ShapleyError") >= 9
    assert "http://127.0.0.1:9" in said
    assert [
        line for line in said.splitlines() if "secret" in line and "load(" not in line and "name =" not in line
    ] == []


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:secret@host/x", "https://host/x"),
        ("https://secret@host:80/x@y", "https://host:80/x@y"),
        ("at http://me:se@cr:et@host, http://a:secret@b", "at http://host, http://b"),
        ("https://me:sec/ret@host", "https://host"),
        ("'you/model?token=secret'", "'you/model'"),
        ("https://host/a.png?X-Sig=secret&y=%20 is gone", "https://host/a.png is gone"),
        ("hf_" + "aB3" * 11, "hf_..."),
        ("hf_oauth_eyJhbGciOi.eyJz_dWI.c-2VjcmV0", "hf_..."),
        ("hf-internal-testing/tiny, hf_internal_testing/tiny", "hf-internal-testing/tiny, hf_internal_testing/tiny"),
        ("Is it you@example.org? load(..., base='x')", "Is it you@example.org? load(..., base='x')"),
        ("https://host/a/b", "https://host/a/b"),
    ],
)
def test_what_is_taken_out_of_texts(text, shown):
    assert redacted(text) == shown
    assert str(ShapleyError(text)) == str(CheckpointError(text)) == shown
    assert code(text) == f"`{shown}`"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_local_base(f"./{text}")
    assert shown in str(caught[0].message)
    assert "secret" not in str(caught[0].message)


def test_errors_of_others_that_stand_behind_ours_hold_none_either():
    inner = ValueError("for url 'https://me:secret@host/x?sig=secret'")
    outer = OSError("no way to https://me:secret@host")
    outer.__cause__ = inner
    assert hub_trouble(outer, "ada/mine") is None
    assert "secret" not in f"{inner} {outer}"


def test_long_texts_take_no_time():
    begin = time.monotonic()
    for text in ("://a:" * 100_000, "?a" * 100_000, "hf_" * 100_000, "a@" * 100_000, "https://" + "a@" * 100_000):
        redacted(text)
    assert time.monotonic() - begin < 10
