"""What a repository on the Hub already shows, so that a push does not undo what was written there."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import RevisionNotFoundError

from shapadapter.hub.card.facts import CONFIG, Facts, read_config
from shapadapter.hub.card.render import CARD, PICTURES, read_card, untouched, updated, write_card


def card_for_push(
    folder: Path,
    repo_id: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    subfolder: str | None = None,
    at_top: bool = False,
    tags: Sequence[str] = (),
    start: str | None = None,
) -> None:
    """Write the card of a folder that is about to be uploaded: with the repository's name, and what was edited there.

    Where both cards were edited, the one that is pushed counts, with a warning; the other one stays in the repository's
    history.

    Args:
        folder: what becomes the top of the repository; a card that is beside the adapter is the one to be pushed.
        repo_id: where it goes.
        revision: the branch.
        token: as for `huggingface_hub`.
        subfolder: where in it `adapter_config.json` is; None for the top.
        at_top: write the repository's own card all the same, about the adapter in the subfolder.
        tags: to be added to the metadata.
        start: the card to be pushed, where the one in the folder is not it.
    """
    config = read_config(folder / (subfolder or ""))
    if not config:
        return
    where = None if at_top else subfolder
    place = folder / (where or "")
    there, pictures = on_hub(repo_id, revision, token, where)
    here = read_card(place / CARD) if start is None else start
    branch = None if revision is None or revision.startswith("refs/") else revision
    facts = Facts(config, repo_id, branch, pictures, subfolder)
    if here is not None and there is not None and not _alike(here, there, facts):
        _warn_of_edits(here, there, repo_id)
    write_card(
        place,
        config,
        name=repo_id,
        revision=branch,
        subfolder=subfolder,
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


def on_hub(
    repo_id: str, revision: str | None = None, token: str | bool | None = None, subfolder: str | None = None
) -> tuple[str | None, list[str]]:
    """The card of a repository or of a subfolder of it, None without one, and the names of its pictures.

    Args:
        repo_id: of the repository.
        revision: a branch; of one that does not exist yet, the main one is what it will begin with.
        token: as for `huggingface_hub`.
        subfolder: of the repository; None for the top.
    """
    files, revision = _listed(repo_id, revision, token)
    inside = f"{subfolder}/" if subfolder else ""
    card, shown = f"{inside}{CARD}", f"{inside}{PICTURES}/"
    path = HfApi().hf_hub_download(repo_id, card, revision=revision, token=token) if card in files else None
    pictures = [file.removeprefix(shown) for file in files if file.startswith(shown)]
    return (None if path is None else read_card(Path(path))), pictures


def has_adapter(repo_id: str, revision: str | None = None, token: str | bool | None = None) -> bool:
    """Whether there is an adapter at the top of a repository, of which the card there speaks; arguments as of `on_hub`."""
    return CONFIG in _listed(repo_id, revision, token)[0]


def _listed(repo_id: str, revision: str | None, token: str | bool | None) -> tuple[list[str], str | None]:
    """The files of a repository, and the revision that they are of: of one that does not exist yet, the main one."""
    api = HfApi()
    try:
        info = api.model_info(repo_id, revision=revision, token=token)
    except RevisionNotFoundError:
        revision = None
        info = api.model_info(repo_id, token=token)
    return [file.rfilename for file in info.siblings or []], revision
