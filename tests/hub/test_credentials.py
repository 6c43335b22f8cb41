"""Credentials in HF_ENDPOINT, in names and in other people's errors are echoed nowhere."""

import logging
import time
import traceback
import warnings
from functools import partial

import forks
import pytest
from huggingface_hub import constants
from peft import get_peft_model
from server import point_at
from tiny import save_base
from transformers import AutoModelForImageClassification
from typer.testing import CliRunner

from shapadapter import CheckpointError, ShapleyConfig, ShapleyError, load
from shapadapter.cli.commands import app
from shapadapter.core.errors import redacted
from shapadapter.core.remote import hub_trouble, warn_of_local_base
from shapadapter.hub import push
from shapadapter.hub.card.facts import code
from shapadapter.hub.space import push_space, write_space

NAME = "https://me:secret@hub.example/ada/mine"


def take_every_road(endpoint, home):
    """All that asks the Hub, or names it, with everything that is logged."""
    point_at(endpoint, home, pytest.MonkeyPatch())
    constants.HF_HUB_OFFLINE = True
    logging.basicConfig(level=logging.DEBUG, force=True)
    model = get_peft_model(AutoModelForImageClassification.from_pretrained("base"), ShapleyConfig(r=2))
    model.peft_config["default"].base_model_name_or_path = "ada/gone"
    model.save_pretrained("adapter")
    write_space("adapter", "space")
    for road in (
        lambda: load("ada/mine"),
        lambda: load("ada/mine?token=secret"),
        lambda: load(NAME),
        lambda: load("adapter"),
        lambda: load("adapter", base=NAME),
        lambda: push("adapter", "ada/mine"),
        lambda: push("adapter", NAME),
        lambda: push_space("space", "ada/mine"),
        lambda: push_space("space", NAME),
    ):
        try:
            road()
        except Exception:
            traceback.print_exc()
    for words in (
        ("push", "adapter", NAME),
        ("push", "adapter", "ada/mine"),
        ("inspect", NAME),
        ("explain", NAME, "x.png"),
    ):
        print(CliRunner().invoke(app, words).output)  # noqa: T201


def test_nothing_that_is_printed_holds_them(tmp_path):
    save_base(tmp_path / "base")
    endpoint = "http://me:secret@127.0.0.1:9"
    quick = {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "1", "HF_TOKEN": "", "NO_PROXY": "*"}
    said = forks.run_whole(partial(take_every_road, endpoint, tmp_path / "home"), tmp_path, **quick)
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
