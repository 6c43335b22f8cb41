"""What someone is told to install, and which versions are taken."""

import json
import subprocess
import sys
import tomllib
import warnings
from importlib import metadata
from pathlib import Path

import pytest

from shapadapter.adapter.registration import LOWEST, check_versions
from shapadapter.core import installation as installing
from shapadapter.core.installation import how_to_install

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def installed(monkeypatch, **versions):
    """Let other versions be installed; transformers wants the PEFT that its versions want."""
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: versions.get(name) or real(name))
    wanted = "0.22.0" if versions.get("transformers", "5.23").startswith("5.24") else "0.20.0"
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", wanted)


@pytest.mark.parametrize("versions", [("5.23.0", "0.21.0"), ("5.23.0", "0.21.2"), ("5.25.0", "0.21.3.dev0")])
def test_versions_that_go_together_are_taken_in_silence(monkeypatch, versions):
    installed(monkeypatch, transformers=versions[0], peft=versions[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_versions()


def test_a_pair_that_does_not_go_together_is_named_with_what_to_type(monkeypatch):
    installed(monkeypatch, transformers="5.24.0", peft="0.21.2")
    with pytest.warns(UserWarning, match=r"transformers 5\.24\.0 wants peft 0\.22\.0 .* got 0\.21\.2: pip install"):
        check_versions()


def test_the_next_peft_is_taken_with_a_word(monkeypatch):
    installed(monkeypatch, transformers="5.24.0", peft="0.22.0")
    with pytest.warns(
        UserWarning, match=r'tested with peft up to 0\.21, got 0\.22\.0.*pip install "peft==0\.21\.\*"'
    ) as said:
        check_versions()
    assert len(said) == 1


@pytest.mark.parametrize(("name", "version"), [("peft", "0.20.0"), ("transformers", "5.22.2")])
def test_versions_that_are_too_old_are_refused(monkeypatch, name, version):
    installed(monkeypatch, **{name: version})
    with pytest.raises(
        ImportError, match=f'needs {name} {LOWEST[name]} or newer, got {version}: pip install "{name}>='
    ):
        check_versions()


def requirements(part):
    """Requirements by the name of the package."""
    found = {}
    for one in part:
        name = one.split("[")[0].split(">")[0].split("=")[0].split("<")[0].split("!")[0]
        found[name.lower().replace("-", "_")] = one
    return found


def floors():
    """The lowest version that pyproject allows of each package a user may install."""
    asked = [*PROJECT["dependencies"]]
    for extra in ("train", "plot", "timm", "compare", "onnx", "app", "demo"):
        asked += [one for one in PROJECT["optional-dependencies"][extra] if not one.startswith("shapadapter")]
    return {name: one.split(">=")[1].split(",")[0] for name, one in requirements(asked).items()}


def test_the_lowest_versions_are_those_of_the_project():
    lines = (ROOT / ".ci" / "lowest.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    wanted = {
        name: version
        for name, version in floors().items()
        if name not in ("torch", "timm", "torchvision", "typing_extensions")
    }
    assert {name.lower().replace("-", "_"): version for name, version in pinned.items()} == wanted
    assert {name: floors()[name] for name in LOWEST} == LOWEST


def test_the_requirements_leave_the_next_peft_a_way_in():
    from packaging.requirements import Requirement

    asked = requirements(PROJECT["dependencies"])
    peft, transformers = Requirement(asked["peft"]).specifier, Requirement(asked["transformers"]).specifier
    assert peft.contains("0.21.2")
    assert peft.contains("0.22.0")
    assert not peft.contains("0.20.0")
    assert transformers.contains("5.23.0")
    assert not transformers.contains("5.24.0")  # no PEFT that it takes is on the index
    assert transformers.contains("5.25.0")


def noted(monkeypatch, **about):
    class Distribution:
        def read_text(self, name):
            return json.dumps(about) if name == "direct_url.json" else None

    monkeypatch.setattr(metadata, "distribution", lambda name: Distribution())


COMMIT = {"vcs": "git", "commit_id": "0123456789abcdef0123456789abcdef01234567"}


def test_the_repository_that_it_came_from_is_told(monkeypatch):
    noted(monkeypatch, url="https://github.com/ada/shapadapter.git", vcs_info=COMMIT)
    url = f"git+https://github.com/ada/shapadapter.git@{COMMIT['commit_id']}"
    assert how_to_install() == (f'pip install "shapadapter @ {url}"',)


@pytest.mark.parametrize(
    "url",
    [
        "file:///home/ada/secret",
        "https://ada:token@github.com/ada/shapadapter",
        "ssh://git@github.com/ada/shapadapter",
        "https://git.inside.example/ada/shapadapter",
        'https://github.com/a"; rm -rf ~; "',
        "https://github.com/a\nb",
    ],
)
def test_no_place_of_this_machine_and_no_credentials_are_told(monkeypatch, url):
    noted(monkeypatch, url=url, vcs_info=COMMIT)
    assert how_to_install()[-1] == "pip install ."


def test_what_is_released_is_on_the_index(monkeypatch):
    monkeypatch.setattr(installing, "ON_INDEX", True)
    assert how_to_install() == ("pip install shapadapter",)


def test_old_versions_are_refused_before_what_they_lack_is_imported():
    code = (
        "from importlib import metadata; real = metadata.version\n"
        "metadata.version = lambda name: '0.18.1' if name == 'peft' else real(name)\n"
        "import sys, types; sys.modules['peft.tuners.tuners_utils'] = types.ModuleType('old')\n"
        "import shapadapter.adapter"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1].startswith("ImportError: shapadapter needs peft 0.21 or newer, got 0.18.1")
