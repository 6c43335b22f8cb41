"""Where the files of an adapter are: in a folder, or fetched from the Hub; at the top, or in a subfolder."""

from __future__ import annotations

import glob
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

from shapadapter.adapter import ShapleyConfig
from shapadapter.adapter.registration import NAME
from shapadapter.core.documents import read_json, shown
from shapadapter.core.errors import CheckpointError, ShapleyError
from shapadapter.core.files import refuse_links
from shapadapter.core.phrases import argument, some
from shapadapter.core.remote import HUB_ERRORS, PROCESSOR_FILES, hub_trouble, is_path


@dataclass(frozen=True)
class AdapterFiles:
    """The files of an adapter."""

    source: str  # the folder that was asked for, or the name on the Hub
    root: Path  # that folder, or the one with what was fetched
    subfolder: str = ""  # where in it the adapter is, with slashes; empty for the top
    token: str | bool | None = field(default=None, repr=False)  # for the Hub; of no meaning for a folder

    @property
    def folder(self) -> Path:
        """Where `adapter_config.json` should be."""
        return self.root / self.subfolder

    @property
    def name(self) -> str:
        """What the adapter is called in messages."""
        return called(self.source, self.subfolder)

    @property
    def fetched(self) -> bool:
        """Whether they came from the Hub."""
        return self.root != Path(self.source)

    def config(self) -> Any:
        """The adapter's configuration, after a look at what kind of adapter it is and whether its weights are there."""
        refuse_links(self.root, self.subfolder)
        file = self.folder / CONFIG_NAME
        if not file.is_file():
            raise ShapleyError(
                f"{self.name} holds no adapter: expected {CONFIG_NAME} and {SAFETENSORS_WEIGHTS_NAME}.{self.elsewhere()}"
            )
        try:
            kind = read_json(file).get("peft_type")
        except CheckpointError as error:
            raise CheckpointError(f"{CONFIG_NAME} of {self.name} is damaged: {error}") from error
        if kind != NAME:
            other = shown(kind).strip("'")
            raise ShapleyError(
                f"{self.name} is an adapter of type {other}, not one of shapadapter. Load it with peft.AutoPeftModel."
            )
        if not (self.folder / SAFETENSORS_WEIGHTS_NAME).is_file():
            why = " The adapter is incomplete."
            if (PurePosixPath(self.subfolder) / WEIGHTS_NAME).as_posix() in self._listed():
                why = (
                    f" Its {WEIGHTS_NAME} is a pickle, which can run code of its author's when it is opened, and is not read. "
                    "Ask for a safetensors file: model.save_pretrained(folder) writes one."
                )
            raise ShapleyError(f"{self.name} holds no {SAFETENSORS_WEIGHTS_NAME}.{why}")
        return ShapleyConfig.from_pretrained(str(self.root), subfolder=self.subfolder or None)

    def processor(self) -> Path | None:
        """The folder with the processor that was saved with the adapter, or with all adapters beside it; None without.

        A folder here may be that of an adapter with a name, whose processor is in the folder above; a model's own is not.
        """
        above = self.root.resolve().parent
        alone = self.fetched or self.subfolder or (above / "config.json").is_file()
        places = (self.folder, self.root if alone else above)
        found = next((place for place in places if any((place / f).is_file() for f in PROCESSOR_FILES[:2])), None)
        if found == places[1]:  # the folder itself has been looked at
            refuse_links(found)
        return found

    def elsewhere(self) -> str:
        """Where below the root there are adapters, and what to type for one of them; nothing if there are none."""
        end = f"/{CONFIG_NAME}"
        found = sorted(file.removesuffix(end) for file in self._listed() if file.endswith(end))
        if not found:
            return ""
        there = f" There {'is one' if len(found) == 1 else 'are some'} in {some(called(self.source, one) for one in found)}."
        typed = next((inner for inner in found if _inside(inner) == inner), None)
        return f"{there} Say which: {argument('subfolder', typed, of='load')}." if self.fetched and typed else there

    def _listed(self) -> list[str]:
        """Paths from the root of adapters' files; of a repository those that were fetched, if the Hub cannot be asked."""
        if self.fetched:
            with suppress(*HUB_ERRORS):
                # The root is called like the commit.
                return HfApi().list_repo_files(self.source, revision=self.root.name, token=self.token)
        files = (*self.root.glob(f"*/{CONFIG_NAME}"), self.folder / WEIGHTS_NAME)
        return [path.relative_to(self.root).as_posix() for path in files if path.is_file()]


def called(source: str | Path, subfolder: str | None) -> str:
    """What an adapter in a subfolder is called in what is said and written about it."""
    return f"{str(source).rstrip('/')}/{subfolder}" if subfolder else str(source)


def refuse_revision(revision: str | None, folder: str | Path) -> None:
    """Refuse a revision of what is no repository."""
    if revision is not None:
        raise ShapleyError(
            f"{argument('revision', revision)} is one of a repository on the Hub, but {folder} is a folder here."
        )


def locate(source: str, subfolder: str | None, revision: str | None, token: str | bool | None) -> AdapterFiles:
    """Find the files of an adapter in a folder, or fetch them from the Hub."""
    inner = "" if subfolder is None else _inside(subfolder)
    if inner is None:
        raise ShapleyError(
            f"{argument('subfolder', subfolder)} does not name a folder inside another one: expected a name such as 'best'."
        )
    if Path(source).is_dir():
        refuse_revision(revision, source)
        return AdapterFiles(source, Path(source), inner)
    if is_path(source):
        raise ShapleyError(f"There is no folder {source}.")
    beside = f"{glob.escape(inner)}/" if inner else ""
    wanted = [f"{beside}{file}" for file in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, *PROCESSOR_FILES)]
    try:
        root = snapshot_download(source, revision=revision, token=token, allow_patterns=[*wanted, *PROCESSOR_FILES])
    except HUB_ERRORS as error:
        trouble = hub_trouble(error, source, revision)
        if trouble is None:
            raise
        raise ShapleyError(f"There is no folder {source} here. {trouble}") from error
    return AdapterFiles(source, Path(root), inner, token)


def _inside(subfolder: str) -> str | None:
    """The path of a subfolder, with slashes; None for what is not inside."""
    path = PureWindowsPath(subfolder)  # knows both kinds of slashes, and drives
    return None if path.anchor or ".." in path.parts or not path.parts else path.as_posix()
