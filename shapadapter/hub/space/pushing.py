"""Put a written Space on the Hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi

from shapadapter.errors import ShapleyError, redacted
from shapadapter.files import refuse_link
from shapadapter.remote import HUB_ERRORS, hub_trouble

from .writing import FILES, FOLDERS, is_space


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
