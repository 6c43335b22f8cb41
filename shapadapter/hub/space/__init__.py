"""A demo app for a checkpoint: a folder that runs here with `python app.py`, and as a Space on the Hub."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

import shapadapter
from shapadapter.core import installation
from shapadapter.core.documents import read_json
from shapadapter.core.errors import ShapleyError, redacted
from shapadapter.core.files import atomic_folder, refuse_link, write_together
from shapadapter.core.phrases import argument, one_line
from shapadapter.core.remote import BASE_FILES, PROCESSOR_FILES, is_path
from shapadapter.hub.card.document import card_metadata
from shapadapter.hub.card.facts import LONG, repository, text, words
from shapadapter.hub.load import AdapterFiles, refuse_revision
from shapadapter.hub.space.limits import open_upload
from shapadapter.hub.upload import base_folder, copy_files, hub_errors, upload

__all__ = ["push_space", "write_space"]

GRADIO = "6.31.0"  # the release a Space gets where none is installed: the one the app was last tested with
_FILES = ("README.md", "app.py", "requirements.txt")
_FOLDERS = ("adapter", "base", "examples", "shapadapter")
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
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
    """Write a Gradio app that runs with `python app.py`, and as a Space; written again, it keeps files of others.

    The Hub is not asked: a checkpoint and a base model there are named, those in folders are copied.

    Args:
        checkpoint: the folder of an adapter, or its name on the Hub.
        folder: to write.
        revision: branch, tag or commit of a checkpoint on the Hub; a commit makes sure that the Space stays what it is.
        title: heading; from the checkpoint's name by default.
        license: such as "apache-2.0"; by default that of the card in the checkpoint's folder, if there is one.
        copy_base: whether a base model in a folder here is copied into the Space; an adapter from elsewhere could name any.
        examples: images for visitors to click, which are copied.

    Returns:
        The folder.

    Raises:
        ShapleyError: no such checkpoint, a base that may not be copied, damaged files, an example that is no PNG, JPEG or
            WebP image, a folder that holds something else, or no room.
    """
    folder, name = Path(folder), str(checkpoint)
    files = AdapterFiles(name, Path(name)) if Path(name).is_dir() else None
    config = None if files is None else files.config()
    base = None if files is None else base_folder(files, config)
    if folder.exists() and not _is_space(folder) and not (folder.is_dir() and not any(folder.iterdir())):
        raise ShapleyError(f"{folder} holds something that is not a Space of ours. Choose another folder.")
    if files is not None:
        refuse_revision(revision, name)
    if base is not None and not copy_base:
        raise ShapleyError(
            f"The base model of {checkpoint} is {base}, a folder on this computer, of which the Space would hold a copy. "
            f"If it may, pass {argument('copy_base', True)}"
        )
    on_hub = None if base is not None else _hub_name(name if config is None else config.base_model_name_or_path)
    if files is not None:
        license = license or text(card_metadata(files.folder).get("license"))
        name = files.folder.resolve().name
    title = one_line(title or "", LONG) or one_line(f"{name.split('/')[-1]} explains itself", LONG)
    timm = "timm" in str((getattr(config, "auto_mapping", None) or {}).get("parent_library"))
    program = _program(name if files is None else None, base is not None, revision, title, bool(examples))
    texts = (_readme(title, license, on_hub), program, _requirements(timm))
    with atomic_folder(folder, ours=(*_FILES, *_FOLDERS)) as place:
        if files is not None:
            _copy_adapter(files, base, place)
        installation.copy_package(place)
        _copy_examples(examples, place / "examples")
        write_together(
            {place / file: content.encode() for file, content in zip(_FILES, texts, strict=True)}, tidy=False
        )
    return folder


def _copy_examples(examples: Sequence[str | Path], target: Path) -> None:
    """Copy images under names of our own."""
    for number, path in enumerate(map(Path, examples), start=1):
        open_upload(path)  # what visitors may not upload is no sample
        suffix = path.suffix.lower() if path.suffix.lower() in _SUFFIXES else ".png"
        target.mkdir(exist_ok=True)
        shutil.copyfile(path, target / f"{number:03d}{suffix}")


def _copy_adapter(files: AdapterFiles, base: Path | None, place: Path) -> None:
    """Copy the adapter into `adapter/` and a base that is here into `base/`: model and processor files alone."""
    (place / "adapter").mkdir()
    copy_files(files.folder, place / "adapter", (SAFETENSORS_WEIGHTS_NAME,))
    if (processor := files.processor()) is not None:
        copy_files(processor, place / "adapter", PROCESSOR_FILES)
    about = read_json(files.folder / CONFIG_NAME)
    if base is not None:
        copy_files(base, place / "base", BASE_FILES)
        about["base_model_name_or_path"] = "base"  # nobody else has the author's folder, nor need they know its name
    (place / "adapter" / CONFIG_NAME).write_text(json.dumps(about, indent=2, sort_keys=True), encoding="utf-8")


def _hub_name(name: str) -> str:
    if is_path(name) or repository(name) is None:
        raise ShapleyError(f"There is no folder {name}, and it cannot be a name on the Hub, which reads user/name.")
    return name


def _readme(title: str, license: str | None, on_hub: str | None) -> str:
    """README.md, whose header is what the Hub reads."""
    header = {
        "title": title,
        "emoji": "🔎",
        "colorFrom": "red",
        "colorTo": "blue",
        "sdk": "gradio",
        "sdk_version": metadata.version("gradio") if find_spec("gradio") else GRADIO,
        "python_version": "3.12",
        "app_file": "app.py",
        "pinned": False,
        **({} if on_hub is None else {"models": [on_hub]}),
        "tags": ["shapadapter", "image-classification", "explainability", "shapley-values"],
        **({} if license is None else {"license": license}),
    }
    written = yaml.safe_dump(header, sort_keys=False, allow_unicode=True, width=10_000)
    origin = "The model is in this repository."
    if on_hub is not None:
        origin = f"Made with [{on_hub}](https://huggingface.co/{on_hub})."
    return f"---\n{written}---\n\n" + _BODY.format(title=words(title), origin=origin, version=shapadapter.__version__)


def _program(name: str | None, base: bool, revision: str | None, title: str, examples: bool) -> str:
    """app.py; every text in it is a Python literal."""
    arguments = ['HERE / "adapter"' if name is None else repr(name)]
    arguments += ['base=HERE / "base"'] if base else []
    arguments += [f"revision={revision!r}"] if revision is not None else []
    arguments += [f"title={title!r}"]
    arguments += ['examples=sorted((HERE / "examples").iterdir())'] if examples else []
    return _APP.format(arguments=",\n    ".join(arguments))


def _requirements(timm: bool) -> str:
    """requirements.txt; gradio is not in it where the header's `sdk_version` brings it."""
    asked = installation.requirements(("app", "timm") if timm else ("app",), shapadapter.__version__)
    pinned = {name: f"{name}=={metadata.version(name)}" for name in ("transformers", "peft")}
    return "\n".join([*(one for one in asked if not one.startswith(tuple(pinned))), *pinned.values()]) + "\n"


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
    with hub_errors(repo_id):
        options: dict[str, Any] = {"repo_type": "space", "private": private, "exist_ok": True}
        url = HfApi(token=token).create_repo(repo_id, space_sdk="gradio", **options)
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
    return redacted(url)


def _is_space(folder: Path) -> bool:
    """Whether `write_space` wrote this folder."""
    try:
        return __name__ in (folder / "app.py").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False
