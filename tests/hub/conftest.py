"""A Hub of this computer, processes that talk to it, and an adapter that one of them has just fine-tuned."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from server import TOKEN, LocalHub
from tiny import BASE, HERE, save_base


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """The server, with the base model `ada/tiny-vit` on it."""
    with LocalHub() as running:
        running.add(BASE, save_base(tmp_path_factory.mktemp("base")))
        yield running


@pytest.fixture(scope="session")
def fresh(hub, tmp_path_factory):
    """A function that runs a script, or code, in a process of its own with an empty cache, and fails if it does.

    It returns what was printed, on both channels.
    """

    def run(script, *arguments, cwd, token=TOKEN, home=None):
        home = home or tmp_path_factory.mktemp("home")
        code = [str(script)] if isinstance(script, Path) else ["-c", script]
        loud = {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "info", "HF_HUB_VERBOSITY": "info"}
        environment = {**os.environ, **loud, **hub.environment(home, token)}
        done = subprocess.run(
            [sys.executable, *code, *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return f"{done.stdout}\n{done.stderr}"

    return run


@pytest.fixture(scope="session")
def author(hub, fresh, tmp_path_factory):
    """What `author.py` made: it fine-tunes an adapter of `ada/tiny-vit` and pushes it on every road.

    Attributes:
        folder: the adapter is in `adapter/`, the trainer's run in `run/`, what the models answered in `answers/`.
        printed: all that the process printed.
    """
    folder = tmp_path_factory.mktemp("author")
    # Without a token in the environment: each road gets it as an argument.
    printed = fresh(HERE / "author.py", TOKEN, cwd=folder, token=None)
    return SimpleNamespace(folder=folder, adapter=folder / "adapter", printed=printed)


@pytest.fixture
def online(hub, monkeypatch, tmp_path):
    """The server for this very process, with an empty cache and the owner's token."""
    import huggingface_hub
    from huggingface_hub import constants
    from transformers.utils import hub as transformers_hub

    home = tmp_path / "home"
    for name, value in {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
    monkeypatch.setattr(transformers_hub, "_hf_api", None)
    for name, value in hub.environment(home).items():
        monkeypatch.setenv(name, value)
    yield hub
    hub.broken = None
