"""Imports that follow others, and modules that have moved.

What plugs into a library is imported as soon as the library is, and no earlier. A module that had another name in an
earlier version is found by that name, with a warning.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import ModuleType


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
