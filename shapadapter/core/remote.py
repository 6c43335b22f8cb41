"""Names on the Hub and of folders, the files that are exchanged with it, and its client's errors in words."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath

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

from shapadapter.core.errors import ShapleyError, redacted

CARD = "README.md"
PICTURES = "explanations"
"""The folder beside the card that holds its pictures."""

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
    CARD,
    "evaluation.json",
    f"{PICTURES}/*",
)
"""Patterns of all that is uploaded of an adapter's folder: no optimiser states, no pickles, no logs."""

BASE_FILES = ("config.json", "model*.safetensors", "model.safetensors.index.json", *PROCESSOR_FILES, CARD)
"""The same of a base model's folder."""

HUB_ERRORS = (OSError, HFValidationError, EntryNotFoundError, RevisionResolutionError, httpx.HTTPError)
"""What the client and transformers raise when something at the Hub is not as it should be."""

_UNREACHED = (LocalEntryNotFoundError, OfflineModeIsEnabled, RevisionResolutionError)


def _redact(record: logging.LogRecord) -> bool:
    """Take credentials out of what is logged."""
    record.msg, record.args = redacted(record.getMessage()), None
    return True


if "@" in constants.ENDPOINT:
    for _name in ("huggingface_hub.utils._http", "httpx", "httpx2"):  # which log every address they ask
        logging.getLogger(_name).addFilter(_redact)
    # PEFT's warning when it saves an adapter whose base it cannot look up quotes the address, too.
    warnings.filterwarnings("ignore", message="Unable to fetch remote file", module="peft")


def is_path(name: str) -> bool:
    """Whether a name can only be that of a folder, and not one on the Hub."""
    path = Path(name)
    return path.is_absolute() or name.startswith((".", "~")) or len(path.parts) > 2 or "\\" in name


def find_base(folder: Path, name: str) -> str:
    """The folder of an adapter's base model, or its name on the Hub.

    A path was saved as it was seen from wherever the training ran. It is looked for here, from the adapter's folder and
    those above it, and beside the adapter; with the slashes of either system.
    """
    folder, path, windows = folder.resolve(), Path(name), PureWindowsPath(name)
    last = windows.name or path.name
    places = [path, *(above / path for above in (folder, *folder.parents))]
    if "\\" in name and not windows.anchor:
        places += [above.joinpath(*windows.parts) for above in (Path(), folder, *folder.parents)]
    # What may be a Hub id is not taken for a folder that happens to have the same name.
    places += [folder.parent / last] if is_path(name) else []
    for place in places:
        try:
            if (place / "config.json").is_file():
                return name if place == path else str(place)
        except OSError:  # a name that is too long
            continue
    if is_path(name):
        raise ShapleyError(
            f"The base model {name} of the adapter {folder} is not there. Put its folder beside the adapter, as "
            f"{folder.parent / last}."
        )
    return name


def warn_of_local_base(name: str | None) -> None:
    """Warn, before an adapter with this `base_model_name_or_path` is uploaded, if others could not find its base model."""
    if name and not Path(name).exists() and not is_path(name):
        return
    where = f"{redacted(name)} is a folder on this computer" if name else "has no name"
    warnings.warn(
        f"The adapter is pushed, but its base model {where}: nobody else can load it. Push both from a saved folder: from "
        "shapadapter.hub import push; push(folder, repo_id, base_repo_id='user/name-of-the-base').",
        stacklevel=3,
    )


def hub_trouble(error: BaseException, repo_id: str, revision: str | None = None) -> str | None:
    """What an error of the Hub's client, or one raised from it, means for the user; None if it is of another kind.

    Credentials in the error itself, which a traceback shows, are removed.
    """
    causes = list(_causes(error))
    for cause in causes:
        cause.args = tuple(redacted(one) if isinstance(one, str) else one for one in cause.args)
    login = "log in with `hf auth login`, or set HF_TOKEN."
    by_kind = (
        (
            GatedRepoError,
            f"{repo_id} is gated: accept its conditions at {constants.ENDPOINT}/{repo_id}, then {login}",
        ),
        (
            RevisionNotFoundError,
            f"{repo_id} has no revision {revision or 'main'}: no branch, tag or commit of that name.",
        ),
        (
            RepositoryNotFoundError,
            f"There is no repository {repo_id} at {constants.ENDPOINT}, or it is private and you may not see it. If it is "
            f"private, {login}",
        ),
        (HFValidationError, f"{repo_id!r} cannot be the name of a repository on the Hub, which reads user/name."),
        (
            _UNREACHED,
            f"{repo_id} was not loaded before, and the Hub at {constants.ENDPOINT} cannot be asked: there is no "
            "connection to it, or HF_HUB_OFFLINE=1 forbids it.",
        ),
        (httpx.TransportError, f"There is no connection to the Hub at {constants.ENDPOINT}."),
    )
    for kind, words in by_kind:
        if any(isinstance(cause, kind) for cause in causes):
            return words
    responses = (cause.response for cause in causes if isinstance(cause, HfHubHTTPError))
    code = next((response.status_code for response in responses if response is not None), None)
    by_code = {
        None: None,
        401: f"The Hub does not know who is asking for {repo_id}: there is no token, or it is not valid. L{login[1:]}",
        403: f"This token may not write to {repo_id}. Log in as somebody who may, or choose another name.",
    }
    return by_code.get(code, f"The Hub at {constants.ENDPOINT} answered {code} about {repo_id}.")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
