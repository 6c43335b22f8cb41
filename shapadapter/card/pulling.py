"""What a repository on the Hub already shows, so that a push does not undo what was written there."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import RevisionNotFoundError

from .facts import Facts
from .record import read_config
from .writing import CARD, PICTURES, read_card, untouched, updated, write_card


def card_for_push(
    folder: Path,
    repo_id: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    tags: Sequence[str] = (),
    start: str | None = None,
) -> None:
    """Write the card of a folder that is about to be uploaded: with the repository's name, and what was edited there.

    Where both cards were edited, the one that is pushed counts, with a warning; the other one stays in the repository's
    history.

    Args:
        folder: with `adapter_config.json`; a card that is there is the one to be pushed.
        repo_id: where it goes.
        revision: the branch.
        token: as for `huggingface_hub`.
        tags: to be added to the metadata.
        start: the card to be pushed, where the one in the folder is not it.
    """
    config = read_config(folder)
    if not config:
        return
    there, pictures = on_hub(repo_id, revision, token)
    here = read_card(folder / CARD) if start is None else start
    branch = None if revision is None or revision.startswith("refs/") else revision
    if here is not None and there is not None and not _alike(here, there, Facts(config, repo_id, branch, pictures)):
        _warn_of_edits(here, there, repo_id)
    write_card(
        folder,
        config,
        name=repo_id,
        revision=branch,
        tags=tags,
        start=_chosen(here, there) or "",
        remote=pictures,
    )


def _chosen(here: str | None, there: str | None) -> str | None:
    if there is None or (here is not None and not untouched(here)):
        return here
    return there


def _alike(here: str, there: str, facts: Facts) -> bool:
    """Whether two cards differ in nothing that a person wrote."""
    try:
        return updated(here, facts) == updated(there, facts)
    except ValueError:
        return here == there


def _warn_of_edits(here: str, there: str, repo_id: str) -> None:
    if not untouched(here) and not untouched(there):
        warnings.warn(
            f"The card of {repo_id} and the one that is pushed were both edited: the pushed one takes its place. The other "
            "is in the repository's history.",
            stacklevel=4,
        )


def on_hub(repo_id: str, revision: str | None = None, token: str | bool | None = None) -> tuple[str | None, list[str]]:
    """The card of a repository, None without one, and the names of its pictures.

    Args:
        repo_id: of the repository.
        revision: a branch; of one that does not exist yet, the main one is what it will begin with.
        token: as for `huggingface_hub`.
    """
    api = HfApi()
    try:
        info = api.model_info(repo_id, revision=revision, token=token)
    except RevisionNotFoundError:
        revision = None
        info = api.model_info(repo_id, token=token)
    files = [file.rfilename for file in info.siblings or []]
    path = api.hf_hub_download(repo_id, CARD, revision=revision, token=token) if CARD in files else None
    pictures = [file.removeprefix(f"{PICTURES}/") for file in files if file.startswith(f"{PICTURES}/")]
    return (None if path is None else read_card(Path(path))), pictures
