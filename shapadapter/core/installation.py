"""How the package is installed and its modules are found.

Where it is installed, from wherever, `pip install "shapadapter[plot]"` finds its extras. For others it is not on the index of
packages yet; on the day of its release, `ON_INDEX = True` is all there is to change.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module, metadata
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any

ON_INDEX = False
"""Whether `pip install shapadapter` finds the package."""

PUBLIC = ("github.com", "gitlab.com", "codeberg.org", "huggingface.co")
"""Where a repository that is named in a card can be reached by its readers."""


def how_to_install() -> tuple[str, ...]:
    """What someone who has nothing yet is to type to get the package, with a word before it if need be."""
    if ON_INDEX:
        return ("pip install shapadapter",)
    if (url := _repository()) is not None:
        return (f'pip install "shapadapter @ {url}"',)
    return (
        "# shapadapter is not on the package index yet: in a clone of its repository,",
        "# or with the path of its wheel in place of the dot",
        "pip install .",
    )


def _repository() -> str | None:
    """The public repository and commit that this installation came from, as pip notes it (PEP 610); None if unknown."""
    try:
        noted: Any = json.loads(metadata.distribution("shapadapter").read_text("direct_url.json") or "{}")
    except (metadata.PackageNotFoundError, ValueError):
        return None
    url, commit = str(noted.get("url")), str(noted.get("vcs_info", {}).get("commit_id"))
    # Neither a place on this machine or of a private network, nor credentials, nor anything else that a shell would read.
    public = re.fullmatch(rf"https://({'|'.join(map(re.escape, PUBLIC))})/[\w./-]+", url)
    return f"git+{url}@{commit}" if public and re.fullmatch(r"[0-9a-f]{7,64}", commit) else None


def requirements(extras: Sequence[str], version: str) -> list[str]:
    """What pip is to install for a program that uses the package, in a folder with `copy_package` where that is needed."""
    if ON_INDEX:
        return [f"shapadapter[{','.join(extras)}]=={version}"]
    asked = [line.partition(";") for line in metadata.requires("shapadapter") or []]
    wanted = [(name.strip(), re.search(r"extra == [\"'](\w+)", marker)) for name, _, marker in asked]
    return [name for name, extra in wanted if extra is None or extra[1] in extras]


def copy_package(folder: Path) -> None:
    """Put the package into the folder of a program, which imports it from there; nothing where pip can find it."""
    if ON_INDEX:
        return
    here = Path(__file__).parent.parent
    shutil.copytree(here, folder / here.name, ignore=shutil.ignore_patterns("__pycache__"))
    license = metadata.distribution("shapadapter").read_text("licenses/LICENSE")
    (folder / here.name / "LICENSE").write_text(license or "Apache-2.0\n", encoding="utf-8")


# -- imports ---------------------------------------------------------------------------------------------------------


class _Followers(MetaPathFinder):
    """Finds nothing by itself: it lets others find a module, and has another one imported after it."""

    def __init__(self, followers: Mapping[str, str]) -> None:
        self.followers = followers

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """How to load `name`, with what follows it; None if nothing does."""
        if name not in self.followers:
            return None
        others = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((found for found in others if found is not None), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            """Load the module, then what follows it."""
            execute(module)
            # One that another thread is importing waits for this module: to wait for it here would be a deadlock.
            if self.followers[name] not in sys.modules:
                import_module(self.followers[name])

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]  # each spec has a loader of its own
        return spec


def follow(followers: Mapping[str, str]) -> None:
    """Import modules after others: now where those are there already, else when they are imported."""
    sys.meta_path.insert(0, _Followers(followers))
    for name, follower in followers.items():
        if name in sys.modules:
            import_module(follower)


class _Moved(MetaPathFinder, Loader):
    """Finds modules by the names that they had before."""

    def __init__(self, new_names: Mapping[str, str]) -> None:
        self.new_names = new_names

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """A specification for an old name, None for any other."""
        return spec_from_loader(name, self) if name in self.new_names else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The module itself: by both names it is the same object."""
        new = self.new_names[spec.name]
        warnings.warn(f"{spec.name} is {new} now.", DeprecationWarning, stacklevel=2)
        module = import_module(new)
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Give the module its own specification back: it was executed when it was imported by its new name."""
        if module.__spec__ is not None:
            module.__spec__ = module.__spec__.loader_state


def find_moved(new_names: Mapping[str, str]) -> None:
    """Let modules be imported by names they had in an earlier version."""
    sys.meta_path.append(_Moved(new_names))
