"""Write a Space: a folder with a demo app, and put it on the Hub."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi

from shapadapter.core.errors import ShapleyError, redacted
from shapadapter.core.files import whole_folder
from shapadapter.core.installation import copy_package
from shapadapter.core.links import refuse_link
from shapadapter.hub.card.facts import one_line
from shapadapter.hub.remote import HUB_ERRORS, hub_trouble
from shapadapter.hub.space.limits import open_upload
from shapadapter.hub.space.sources import Source, program, readme, requirements

FILES = ("README.md", "app.py", "requirements.txt")
FOLDERS = ("adapter", "base", "examples", "shapadapter")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")

logger = logging.getLogger(__name__)


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
    source, folder = Source.of(checkpoint), Path(folder)
    if revision is not None and source.adapter is not None:
        raise ShapleyError(
            f"revision={revision!r} is one of a repository on the Hub, but {checkpoint} is a folder here."
        )
    if source.base is not None and not copy_base:
        raise ShapleyError(
            f"The base model of {checkpoint} is {source.base}, a folder on this computer, of which the Space would hold a copy. "
            "If it may, pass copy_base=True"
        )
    if folder.exists() and not is_space(folder) and not (folder.is_dir() and not any(folder.iterdir())):
        raise ShapleyError(f"{folder} holds something that is not a Space of ours. Choose another folder.")
    title = one_line(title or "") or one_line(f"{source.name.split('/')[-1]} explains itself")
    texts = {
        "README.md": readme(source, title, license or source.license),
        "app.py": program(source, title, revision, bool(examples)),
        "requirements.txt": requirements(source),
    }
    with whole_folder(folder, ours=(*FILES, *FOLDERS)) as place:
        source.copy(place)
        copy_package(place)
        _copy_examples(examples, place / "examples")
        for name, text in texts.items():
            (place / name).write_text(text, encoding="utf-8")
    size = sum(path.stat().st_size for name in FOLDERS for path in (folder / name).glob("*"))
    logger.info("Wrote the Space %s; its models and samples have %.1f MB.", folder, size / 2**20)
    return folder


def is_space(folder: Path) -> bool:
    """Whether `write_space` wrote this folder."""
    try:
        return "shapadapter.hub.space" in (folder / "app.py").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False


def _copy_examples(examples: Sequence[str | Path], target: Path) -> None:
    """Copy images under names of our own."""
    if examples:
        target.mkdir()
    for number, path in enumerate(examples, start=1):
        open_upload(Path(path))  # what visitors may not upload is no sample
        suffix = Path(path).suffix.lower()
        shutil.copyfile(path, target / f"{number:03d}{suffix if suffix in SUFFIXES else '.png'}")


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
    if not is_space(folder):
        raise ShapleyError(
            f"{folder} is not a Space that shapadapter wrote. Write one first: write_space(checkpoint, folder)."
        )
    below = (path for name in FOLDERS for path in (folder / name, *(folder / name).rglob("*")))
    for path in (*(folder / name for name in FILES), *below):
        refuse_link(path, folder)
    api = HfApi(token=token)
    try:
        url = api.create_repo(repo_id, repo_type="space", space_sdk="gradio", private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id,
            repo_type="space",
            folder_path=folder,
            allow_patterns=[*FILES, *(f"{name}/*" for name in FOLDERS)],
            ignore_patterns=["*.pyc"],
            commit_message="Demo app of a shapadapter checkpoint",
        )
    except HUB_ERRORS as error:
        trouble = hub_trouble(error, repo_id)
        if trouble is None:
            raise
        raise ShapleyError(trouble) from error
    return redacted(url)
