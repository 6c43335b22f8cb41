"""A demo app for a checkpoint: a folder that runs here with `python app.py`, and as a Space on the Hub."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import yaml
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

import shapadapter
from shapadapter.adapter.config import check_files
from shapadapter.core import installation
from shapadapter.core.documents import read_json
from shapadapter.core.errors import ShapleyError, redacted
from shapadapter.core.files import atomic_folder, refuse_link
from shapadapter.core.phrases import argument, one_line
from shapadapter.core.remote import BASE_FILES, HUB_ERRORS, PROCESSOR_FILES, find_base, hub_trouble, is_path
from shapadapter.hub.card.document import card_metadata
from shapadapter.hub.card.facts import LONG, text, words
from shapadapter.hub.locate import AdapterFiles
from shapadapter.hub.space.limits import open_upload
from shapadapter.hub.upload import copy_files, own_code, upload

__all__ = ["push_space", "write_space"]

GRADIO = "6.31.0"
"""The release a Space gets where none is installed: the one the app was last tested with."""

_FILES = ("README.md", "app.py", "requirements.txt")
_FOLDERS = ("adapter", "base", "examples", "shapadapter")
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")

_log = logging.getLogger(__name__)

_APP = '''\
"""A demo app: `python app.py` runs it here, and on the Hub it starts by itself."""

from pathlib import Path

from shapadapter.hub.space.app import build_app, launch

HERE = Path(__file__).parent
app = build_app(
    {arguments},
)

if __name__ == "__main__":
    launch(app)
'''

_BODY = """\
# {title}

Upload a picture, see what the model takes it for, and click a class to see which patches speak for it and which against.

{origin}

Run it on your own machine:

```bash
pip install -r requirements.txt
python app.py
```

Written by shapadapter {version}.
"""


def write_space(
    checkpoint: str | Path,
    folder: str | Path,
    *,
    revision: str | None = None,
    title: str | None = None,
    license: str | None = None,
    copy_base: bool = False,
    examples: Sequence[str | Path] = (),
) -> Path:
    """Write a Gradio app that runs with `python app.py`, and as a Space on the Hub.

    The Hub is not asked. A checkpoint on the Hub, and a base model there, is named; a folder is copied, with `copy_base` the
    folder of its base, too, so that the Space runs anywhere: it is then as large as both together. Of a Space that is
    written again, what this function once wrote is replaced, all at once, and other files stay.

    Args:
        checkpoint: the folder of an adapter, or its name on the Hub.
        folder: to write.
        revision: branch, tag or commit of a checkpoint on the Hub; a commit makes sure that the Space stays what it is.
        title: heading; from the checkpoint's name by default.
        license: such as "apache-2.0"; by default that of the card in the checkpoint's folder, if there is one.
        copy_base: whether a base model that is a folder on this computer is copied into the Space. The adapter names that
            folder, so an adapter from elsewhere could name any.
        examples: images for visitors to click, which are copied.

    Returns:
        The folder.

    Raises:
        ShapleyError: there is no such checkpoint, its base is a folder here and is not to be copied, or the folder holds
            something else.
        CheckpointError: files of the checkpoint are damaged, or links out of its folder.
        DiskFullError: there is no room for it; what was there is unchanged.
        ImageError: an example is not a PNG, JPEG or WebP image, or too large.
    """
    source, folder = _source(checkpoint), Path(folder)
    if folder.exists() and not _is_space(folder) and not (folder.is_dir() and not any(folder.iterdir())):
        raise ShapleyError(f"{folder} holds something that is not a Space of ours. Choose another folder.")
    if revision is not None and source.adapter is not None:
        raise ShapleyError(
            f"{argument('revision', revision)} is one of a repository on the Hub, but {checkpoint} is a folder here."
        )
    if source.base is not None and not copy_base:
        raise ShapleyError(
            f"The base model of {checkpoint} is {source.base}, a folder on this computer, of which the Space would hold a copy. "
            f"If it may, pass {argument('copy_base', True)}"
        )
    title = one_line(title or "", LONG) or one_line(f"{source.name.split('/')[-1]} explains itself", LONG)
    readme = _readme(source, title, license or source.license)
    program = _program(source, title, revision, bool(examples))
    with atomic_folder(folder, ours=(*_FILES, *_FOLDERS)) as place:
        source.copy(place)
        installation.copy_package(place)
        _copy_examples(examples, place / "examples")
        for name, content in zip(_FILES, (readme, program, _requirements(source)), strict=True):
            (place / name).write_text(content, encoding="utf-8")
    size = sum(path.stat().st_size for name in _FOLDERS for path in (folder / name).glob("*"))
    _log.info("Wrote the Space %s; its models and samples have %.1f MB.", folder, size / 2**20)
    return folder


def _copy_examples(examples: Sequence[str | Path], target: Path) -> None:
    """Copy images under names of our own."""
    if examples:
        target.mkdir()
    for number, path in enumerate(map(Path, examples), start=1):
        open_upload(path)  # what visitors may not upload is no sample
        suffix = path.suffix.lower() if path.suffix.lower() in _SUFFIXES else ".png"
        shutil.copyfile(path, target / f"{number:03d}{suffix}")


def push_space(
    folder: str | Path, repo_id: str, *, private: bool | None = None, token: str | bool | None = None
) -> str:
    """Upload a folder that `write_space` wrote, as a Space that starts by itself.

    Args:
        folder: the Space; of its files those that `write_space` writes go up.
        repo_id: `user/name` of the Space, made if it is not there.
        private: whether a new Space is private; None for the account's default.
        token: None for that of `hf auth login`.

    Returns:
        The address of the Space.

    Raises:
        ShapleyError: the folder is no Space of ours, or the Hub refuses it.
        CheckpointError: a file in it is a link out of it.
    """
    folder = Path(folder)
    if not _is_space(folder):
        raise ShapleyError(
            f"{folder} is not a Space that shapadapter wrote. Write one first: write_space(checkpoint, folder)."
        )
    below = (path for name in _FOLDERS for path in (folder / name, *(folder / name).rglob("*")))
    for path in (*(folder / name for name in _FILES), *below):
        refuse_link(path, folder)
    try:
        url = HfApi(token=token).create_repo(
            repo_id, repo_type="space", space_sdk="gradio", private=private, exist_ok=True
        )
        upload(
            folder,
            repo_id,
            message="Demo app of a shapadapter checkpoint",
            token=token,
            card=False,
            repo_type="space",
            allow_patterns=[*_FILES, *(f"{name}/*" for name in _FOLDERS)],
            ignore_patterns=["*.pyc"],
        )
    except HUB_ERRORS as error:
        trouble = hub_trouble(error, repo_id)
        if trouble is None:
            raise
        raise ShapleyError(trouble) from error
    return redacted(url)


def _is_space(folder: Path) -> bool:
    """Whether `write_space` wrote this folder."""
    try:
        return __name__ in (folder / "app.py").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False


# -- the checkpoint ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """Where a Space finds its model.

    Attributes:
        name: the checkpoint on the Hub, or the name of its folder.
        adapter: its folder here, None if it stays on the Hub.
        base: the folder of its base model here, None if that stays on the Hub or is not known.
        models: names of models on the Hub.
        license: that the checkpoint's card states, if it is here and does.
        timm: whether the base is one of timm's.
    """

    name: str
    adapter: Path | None
    base: Path | None
    models: tuple[str, ...]
    license: str | None = None
    timm: bool = False

    def copy(self, target: Path) -> None:
        """Copy what is here: adapter into `adapter/`, base into `base/`; model and processor files alone."""
        if self.adapter is not None:
            (target / "adapter").mkdir()
            copy_files(self.adapter, target / "adapter", (SAFETENSORS_WEIGHTS_NAME,))
            if (processor := AdapterFiles(str(self.adapter), self.adapter).processor()) is not None:
                copy_files(processor, target / "adapter", PROCESSOR_FILES)
            config = read_json(self.adapter / CONFIG_NAME)
            # Nobody else has the author's folder, nor need they know its name.
            config |= {"base_model_name_or_path": "base"} if self.base is not None else {}
            content = json.dumps(config, indent=2, sort_keys=True)
            (target / "adapter" / CONFIG_NAME).write_text(content, encoding="utf-8")
        if self.base is not None:
            (target / "base").mkdir()
            copy_files(self.base, target / "base", BASE_FILES)


def _source(checkpoint: str | Path) -> _Source:
    """Look at a checkpoint, without asking the Hub."""
    folder, name = Path(checkpoint), str(checkpoint)
    if not folder.is_dir():
        return _Source(_hub_name(name), None, None, (name,))
    AdapterFiles(name, folder).config()  # what could not be loaded is not shown
    config = read_json(folder / CONFIG_NAME)
    check_files(folder / CONFIG_NAME, config)
    if not config.get("base_model_name_or_path"):
        raise ShapleyError(f"The adapter {folder} does not name its base model in {CONFIG_NAME}.")
    base = find_base(folder, str(config["base_model_name_or_path"]))
    local = Path(base) if (Path(base) / "config.json").is_file() else None
    if local is not None and not any(local.glob("model*.safetensors")):
        raise ShapleyError(f"The base model {local} has no safetensors file; pickles are not copied.")
    if local is not None and (code := own_code(local)):
        raise ShapleyError(
            f"The base model {local} comes with code of its own ({', '.join(code)}), which is not copied, and which the "
            "app would not run: this adapter cannot be shown."
        )
    return _Source(
        name=folder.resolve().name,
        adapter=folder,
        base=local,
        models=() if local is not None else (_hub_name(base),),
        license=text(card_metadata(folder).get("license")),
        timm="timm" in str((config.get("auto_mapping") or {}).get("parent_library")),
    )


def _hub_name(name: str) -> str:
    try:
        validate_repo_id(name)
        valid = not is_path(name)
    except HFValidationError:
        valid = False
    if not valid:
        raise ShapleyError(f"There is no folder {name}, and it cannot be a name on the Hub, which reads user/name.")
    return name


# -- the texts --------------------------------------------------------------------------------------------------------


def _readme(source: _Source, title: str, license: str | None) -> str:
    """README.md, whose header is what the Hub reads."""
    header = {
        "title": title,
        "emoji": "🔎",
        "colorFrom": "red",
        "colorTo": "blue",
        "sdk": "gradio",
        "sdk_version": _installed("gradio") or GRADIO,
        "python_version": "3.12",
        "app_file": "app.py",
        "pinned": False,
        "models": list(source.models),
        "tags": ["shapadapter", "image-classification", "explainability", "shapley-values"],
        "license": license,
    }
    used = {name: value for name, value in header.items() if value not in (None, [])}
    written = yaml.safe_dump(used, sort_keys=False, allow_unicode=True, width=10_000)
    models = ", ".join(f"[{name}](https://huggingface.co/{name})" for name in source.models)
    origin = f"Made with {models}." if models else "The model is in this repository."
    return f"---\n{written}---\n\n" + _BODY.format(title=words(title), origin=origin, version=shapadapter.__version__)


def _program(source: _Source, title: str, revision: str | None, examples: bool) -> str:
    """app.py; every text in it is a Python literal."""
    arguments = [repr(source.name) if source.adapter is None else 'HERE / "adapter"']
    arguments += ['base=HERE / "base"'] if source.base is not None else []
    arguments += [f"revision={revision!r}"] if revision is not None else []
    arguments += [f"title={title!r}"]
    arguments += ['examples=sorted((HERE / "examples").iterdir())'] if examples else []
    return _APP.format(arguments=",\n    ".join(arguments))


def _requirements(source: _Source) -> str:
    """requirements.txt; gradio is not in it where the header's `sdk_version` brings it."""
    asked = installation.requirements(("app", "timm") if source.timm else ("app",), shapadapter.__version__)
    pinned = {name: f"{name}=={_installed(name)}" for name in ("transformers", "peft")}
    return "\n".join([*(one for one in asked if not one.startswith(tuple(pinned))), *pinned.values()]) + "\n"


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
