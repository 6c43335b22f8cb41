"""What travels to the Hub and back, and what went wrong there, in words: the client's own errors do not say what to type."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)
from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

from shapadapter.core.documents import read_json
from shapadapter.core.errors import CheckpointError, redacted
from shapadapter.core.files import write_together

_UNREACHED = (LocalEntryNotFoundError, OfflineModeIsEnabled, RevisionResolutionError)

PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
)
"""All that processors of images, or of images and texts, are saved as; one of the first two is always there."""

ADAPTER_FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    *PROCESSOR_FILES,
    "README.md",
    "evaluation.json",
    "explanations/*",
)
"""Patterns of all that is uploaded of an adapter's folder: no optimiser's states, no pickles, no logs."""

BASE_FILES = ("config.json", "model*.safetensors", "model.safetensors.index.json", *PROCESSOR_FILES, "README.md")
"""The same of a base model's folder."""

HUB_ERRORS = (OSError, HFValidationError, EntryNotFoundError, RevisionResolutionError, httpx.HTTPError)
"""What the client and transformers raise when something at the Hub is not as it should be."""


def _discreet(record: logging.LogRecord) -> bool:
    """Take credentials out of what is logged."""
    record.msg, record.args = redacted(record.getMessage()), None
    return True


if "@" in constants.ENDPOINT:
    for _name in ("huggingface_hub.utils._http", "httpx", "httpx2"):  # which log every address that they ask
        logging.getLogger(_name).addFilter(_discreet)
    # PEFT's warning when it saves an adapter whose base it cannot look up quotes the address, too.
    warnings.filterwarnings("ignore", message="Unable to fetch remote file", module="peft")


def warn_of_local_base(name: str | None) -> None:
    """Warn, before an adapter is uploaded, if others could not find its base model.

    Args:
        name: the adapter's `base_model_name_or_path`.
    """
    if name and not Path(name).exists() and not is_path(name):
        return
    where = f"{redacted(name)} is a folder on this computer" if name else "has no name"
    warnings.warn(
        f"The adapter is pushed, but its base model {where}: nobody else can load it. Push both from a saved folder: from "
        "shapadapter.hub import push; push(folder, repo_id, base_repo_id='user/name-of-the-base').",
        stacklevel=3,
    )


def forget_places(folder: Path) -> None:
    """Leave of the folders in an evaluation that is uploaded their own names, without where they are on this computer.

    Args:
        folder: with `evaluation.json`, or without; one whose file cannot be read is left as it is.
    """
    file = folder / "evaluation.json"
    try:
        found = read_json(file)
        about = found["about"]
        about |= {name: Path(about[name]).name for name in ("checkpoint", "folder") if name in about}
    except (CheckpointError, KeyError, TypeError):
        return
    write_together({file: json.dumps(found, indent=1).encode()})


def is_path(name: str) -> bool:
    """Whether a name can only be that of a folder, and not one on the Hub."""
    path = Path(name)
    return path.is_absolute() or name.startswith((".", "~")) or len(path.parts) > 2 or "\\" in name


def hub_trouble(error: BaseException, repo_id: str, revision: str | None = None) -> str | None:
    """What an error of the Hub's client, or one that was raised from it, means for the user.

    Args:
        error: the exception.
        repo_id: the repository that was asked for.
        revision: the branch, tag or commit that was asked for.

    Returns:
        Sentences without a token in them, or None if the error is of another kind. Credentials in the error itself, which
        a traceback shows, are gone.
    """
    causes = list(_causes(error))
    for cause in causes:
        cause.args = tuple(redacted(one) if isinstance(one, str) else one for one in cause.args)
    for kind, words in (
        (
            GatedRepoError,
            f"{repo_id} asks its visitors for consent. Give it at {constants.ENDPOINT}/{repo_id}, then log in with "
            "`hf auth login`, or pass token=.",
        ),
        (
            RevisionNotFoundError,
            f"{repo_id} has no revision {revision or 'main'}: no branch, tag or commit of that name.",
        ),
        (
            RepositoryNotFoundError,
            f"There is no repository {repo_id} at {constants.ENDPOINT}, or it is private and you may not see it. If it is "
            "private, log in with `hf auth login`, or pass token=.",
        ),
        (HFValidationError, f"{repo_id!r} cannot be the name of a repository on the Hub, which reads user/name."),
        (
            _UNREACHED,
            f"{repo_id} was not loaded before, and the Hub at {constants.ENDPOINT} cannot be asked: there is no "
            "connection to it, or HF_HUB_OFFLINE=1 forbids it.",
        ),
        (httpx.TransportError, f"There is no connection to the Hub at {constants.ENDPOINT}."),
    ):
        if any(isinstance(cause, kind) for cause in causes):
            return words
    code = next(
        (c.response.status_code for c in causes if isinstance(c, HfHubHTTPError) and c.response is not None), None
    )
    if code == 401:
        return (
            f"The Hub does not know who asks for {repo_id}: there is no token, or it is not valid. Log in with "
            "`hf auth login`, or pass token=."
        )
    if code == 403:
        return (
            f"This token may not write to {repo_id}. Log in as somebody who may, pass token=, or choose another name."
        )
    return None if code is None else f"The Hub at {constants.ENDPOINT} answered {code} about {repo_id}."


def _causes(error: BaseException) -> Iterator[BaseException]:
    step: BaseException | None = error
    while step is not None:
        yield step
        step = step.__cause__ or step.__context__
