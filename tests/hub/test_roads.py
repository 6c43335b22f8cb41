"""Pushed on every road by one process, loaded on every road by another one: bit for bit the same."""

import json
import re

import pytest
from server import TOKEN
from tiny import BASE, HERE

MODEL = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
WITH_PROCESSOR = [*MODEL, "preprocessor_config.json"]


@pytest.fixture(scope="module")
def reader(author, fresh, tmp_path_factory):
    """What the second process printed."""
    home, place = tmp_path_factory.mktemp("reader-home"), tmp_path_factory.mktemp("reader")
    return fresh(HERE / "reader.py", author.folder / "answers", TOKEN, home, cwd=place, token=None, home=home)


def lines(printed, word):
    return [line.removeprefix(f"{word} ") for line in printed.splitlines() if line.startswith(f"{word} ")]


def test_every_road_gives_the_same_answers(reader):
    # Each is compared in that process, which fails if one differs.
    assert len(lines(reader, "same")) == 18


def test_no_more_is_fetched_than_needed(reader):
    assert lines(reader, "cached") == [
        "models--ada--tiny-vit config.json",
        "models--ada--tiny-vit model.safetensors",
        "models--ada--whole adapter_config.json",
        "models--ada--whole adapter_model.safetensors",
        "models--ada--whole preprocessor_config.json",
    ]


def test_a_private_repository_says_how_it_is_read(reader):
    refused = lines(reader, "refused")
    assert len(refused) == 3
    assert all("it is private and you may not see it" in line and "HF_TOKEN" in line for line in refused)


@pytest.mark.parametrize(
    ("name", "revision", "files"),
    [
        ("ada/trained", "main", WITH_PROCESSOR),
        ("ada/trained", "from-trainer", WITH_PROCESSOR),
        ("ada/pushed", "main", MODEL),
        ("ada/pushed", "v2", MODEL),
        ("ada/pushed", "refs/pr/1", MODEL),
        ("ada/secret", "main", MODEL),
        ("ada/added", "main", MODEL),
        ("ada/whole", "main", [*MODEL, "explanations/one.png", "preprocessor_config.json"]),
        ("ada/own", "main", MODEL),
        ("ada/my-base", "main", ["config.json", "model.safetensors", "preprocessor_config.json"]),
    ],
)
def test_what_is_uploaded(author, hub, name, revision, files):
    found = [path for path in hub.files(name, revision) if not re.fullmatch(r"explanations/(?!one).*", path)]
    assert found == files


def test_the_trainer_pushes_each_checkpoint_in_one_commit(author, hub):
    titles = hub.titles("ada/trained")
    steps = [f"Training in progress, step {step}" for step in (3, 2, 1)]
    assert [title for title in titles if title in steps] == steps
    assert titles[-1] == "initial commit"
    assert not list(author.folder.glob("run/.*.tmp"))
    repo = hub.repos["model", "ada/trained"]
    for sha, (files, title, _) in repo.commits.items():
        if title in steps:  # none of them is half of an adapter
            assert {"adapter_config.json", "adapter_model.safetensors"} <= set(files), sha


def test_private_is_private_and_the_address_is_told(author, hub):
    private = {
        "trained": True,
        "secret": True,
        "own": True,
        "my-base": True,
        "pushed": False,
        "added": False,
        "whole": False,
    }
    assert {name: hub.repos["model", f"ada/{name}"].private for name in private} == private
    assert lines(author.printed, "address") == [f"{hub.url}/ada/whole"]
    assert lines(author.printed, "proposed") == [f"{hub.url}/ada/pushed/discussions/1"]


def test_the_base_s_commit_is_recorded_and_kept(author, hub):
    commit = hub.commit(BASE)
    assert lines(author.printed, "recorded") == [f"{BASE} {commit}"]
    for config in (
        hub.files("ada/trained")["adapter_config.json"],
        hub.files("ada/added")["adapter_config.json"],
        (author.folder / "again" / "adapter_config.json").read_bytes(),
    ):
        about = json.loads(config)
        assert (about["base_model_name_or_path"], about["revision"]) == (BASE, commit)


def test_a_base_that_was_a_folder_is_named_as_it_was_pushed(author, hub):
    pushed = json.loads(hub.files("ada/own")["adapter_config.json"])
    assert (pushed["base_model_name_or_path"], pushed["revision"]) == ("ada/my-base", hub.commit("ada/my-base"))
    kept = json.loads((author.folder / "own" / "adapter_config.json").read_text())
    assert (kept["base_model_name_or_path"], kept["revision"]) == ("my-base", None)


def test_the_token_is_nowhere(author, reader, hub):
    assert TOKEN not in author.printed
    assert TOKEN not in reader
    for path in author.folder.rglob("*"):
        assert path.is_dir() or TOKEN.encode() not in path.read_bytes(), path
    for repo in hub.repos.values():
        for files, title, _ in repo.commits.values():
            assert TOKEN not in title
            assert not any(TOKEN.encode() in blob.data for blob in files.values())


def test_a_wrong_token_is_refused_in_words(author, hub):
    assert ("model", "ada/never") not in hub.repos
    refused = lines(author.printed, "refused")
    assert len(refused) == 2
    assert all("there is no token, or it is not valid" in line and "hf auth login" in line for line in refused)
