"""A Hub of this computer, processes that talk to it, and an adapter that one of them has just fine-tuned."""

import sys
from pathlib import Path
from types import SimpleNamespace

import forks
import huggingface_hub
import pytest
import transformers

sys.path.insert(0, str(Path(__file__).parent))

from server import TOKEN, LocalHub, point_at
from tiny import BASE, HERE, save_base


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """The server, with the base model `ada/tiny-vit` on it."""
    with LocalHub() as running:
        running.add(BASE, save_base(tmp_path_factory.mktemp("base")))
        yield running


@pytest.fixture(scope="session")
def fresh(hub, tmp_path_factory):
    """A function that runs a script in a process of its own with an empty cache, and fails if it does.

    It returns what was printed, on both channels; the libraries say all they have to say.
    """

    def run(script, *arguments, cwd, token=TOKEN, home=None):
        home = home or tmp_path_factory.mktemp("home")

        def action():
            for about in (huggingface_hub.utils.logging, transformers.utils.logging):
                about.set_verbosity_info()
            point_at(hub.url, home, monkeypatch=pytest.MonkeyPatch())
            forks.script(script, *arguments)()

        return forks.run_whole(action, cwd, **hub.environment(home, token))

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
    home = tmp_path / "home"
    point_at(hub.url, home, monkeypatch)
    for name, value in hub.environment(home).items():
        monkeypatch.setenv(name, value)
    yield hub
    hub.broken = None


@pytest.fixture(autouse=True)
def _quickly(quick_evaluation, monkeypatch):
    """The models of these tests have 16 players; and what is exported is a matter of other tests."""
    monkeypatch.setattr("shapadapter.export.export_program", _exported)


def _exported(model, folder, *, images, **_):
    from shapadapter.export import ExportReport

    return ExportReport(folder / "model.pt2", {"logits": 1e-6}, len(images), None, {"model.pt2": 1})
