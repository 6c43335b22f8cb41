"""Push a saved adapter to the Hub: complete, loadable by others, and nothing that does not belong there."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, constants
from peft.utils import CONFIG_NAME

from shapadapter.core.documents import read_json
from shapadapter.core.errors import CheckpointError, ShapleyError, redacted
from shapadapter.core.files import refuse_link, report_full_disk, write_together
from shapadapter.core.remote import (
    ADAPTER_FILES,
    BASE_FILES,
    HUB_ERRORS,
    PROCESSOR_FILES,
    find_base,
    hub_trouble,
)
from shapadapter.hub.card.renewal import card_for_push
from shapadapter.hub.load import load
from shapadapter.hub.locate import AdapterFiles


def push(
    folder: str | Path,
    repo_id: str,
    *,
    base_repo_id: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
    commit_message: str | None = None,
) -> str:
    """Push the folder of a saved adapter to the Hub, in one commit.

    Uploaded are the adapter's two files, the processor's, `README.md`, `evaluation.json` and `explanations/`: no
    optimiser states, no pickles. The folder stays as it is.

    Args:
        folder: what `save_pretrained` or the trainer wrote.
        repo_id: name on the Hub, `user/name` or `name`; created if need be.
        base_repo_id: where the base model goes, if it is a folder on this computer: it is pushed there first, and the
            pushed adapter names that commit as its base.
        private: whether a new repository is private; None for the account's setting.
        revision: the branch; made if it is not there.
        create_pr: open a pull request instead.
        token: that may write; None for that of `hf auth login`.
        commit_message: of the adapter's commit.

    Returns:
        The address of what was pushed: the repository, its branch, or the pull request.

    Raises:
        ShapleyError: the folder holds no complete adapter, others could not load it, or the Hub refused.
        CheckpointError: a file is damaged, or the base on this computer is not the one the adapter was made for.
    """
    folder, api = Path(folder), HfApi(token=token)
    if not folder.is_dir():
        raise ShapleyError(f"There is no folder {folder}.")
    if create_pr and revision is not None:
        raise ShapleyError("A pull request goes to the main branch: leave revision out, or create_pr.")
    files = AdapterFiles(str(folder), folder)
    base = _local_base(folder, files.config(), base_repo_id)
    with _staged(folder, ADAPTER_FILES) as staged:
        if (processor := files.processor()) is not None:
            copy_files(processor, staged, PROCESSOR_FILES)
        if base is not None and base_repo_id is not None:
            load(folder, base=base, device="cpu")  # were it another model, nobody could load the pushed adapter
            with _staged(base, BASE_FILES) as copy, hub_errors(base_repo_id):
                name = api.create_repo(base_repo_id, private=private, exist_ok=True).repo_id
                commit = upload(copy, name, message="Upload base model", token=token, card=False).oid
            about = {**read_json(staged / CONFIG_NAME), "base_model_name_or_path": name, "revision": commit}
            (staged / CONFIG_NAME).write_text(json.dumps(about, indent=2, sort_keys=True), encoding="utf-8")
        with hub_errors(repo_id, revision):
            name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            options: dict[str, Any] = {"token": token, "revision": revision, "create_pr": create_pr}
            info = upload(staged, name, message=commit_message or "Upload adapter", **options)
    if create_pr:
        if info.pr_url is None:
            raise ShapleyError(f"No pull request was opened: {name} holds these very files already.")
        return str(info.pr_url)
    return redacted(f"{constants.ENDPOINT}/{name}") + (f"/tree/{revision}" if revision is not None else "")


def _local_base(folder: Path, config: Any, base_repo_id: str | None) -> Path | None:
    """The folder of the base model to be pushed beside; None if it is on the Hub."""
    name = config.base_model_name_or_path
    if not name:
        raise ShapleyError(
            f"The adapter {folder} does not name its base model, so nobody could load it. Write its name on the Hub as "
            f"base_model_name_or_path in {folder / CONFIG_NAME}."
        )
    root = Path(find_base(folder, str(name)))
    if not root.is_dir():
        if base_repo_id is not None:
            raise ShapleyError(f"The base model {name} is on the Hub already: leave base_repo_id (--base-repo) out.")
        return None
    if base_repo_id is None:
        raise ShapleyError(
            f"The base model of {folder} is {name}, a folder on this computer, so nobody else could load the adapter. Push "
            "it beside: push(folder, repo_id, base_repo_id='user/name-of-the-base'), or --base-repo on the command line."
        )
    if not any(root.glob("model*.safetensors")):
        raise ShapleyError(
            f"The base model {root} has no safetensors file, and pickles are not pushed. Save it again: "
            "AutoModelForImageClassification.from_pretrained(folder).save_pretrained(folder)."
        )
    if code := own_code(root):
        raise ShapleyError(
            f"The base model {root} comes with code of its own ({', '.join(code)}), which is not pushed. Upload its folder "
            f"yourself: `hf upload user/name-of-the-base {shlex.quote(str(root))}`, and write that name as "
            f"base_model_name_or_path in {folder / CONFIG_NAME}."
        )
    return root


def own_code(base: Path) -> list[str]:
    """The files of code in the folder of a base model without which it cannot be loaded; others there do not count."""
    named = str(read_json(base / "config.json").get("auto_map"))
    return sorted(path.name for path in base.glob("*.py") if f"'{path.stem}." in named)


@contextmanager
def _staged(folder: Path, patterns: Sequence[str]) -> Iterator[Path]:
    """A temporary copy of those files of a folder that belong to the upload."""
    with tempfile.TemporaryDirectory() as place:
        with report_full_disk(Path(place)):
            copy_files(folder, Path(place), patterns)
        yield Path(place)


# -- the one way up, also for trainers and Spaces ---------------------------------------------------------------------


def copy_files(folder: Path, target: Path, patterns: Sequence[str], link: bool = False) -> None:
    """Copy those files of a folder that match a pattern, or give them a second name, where the disk can."""
    found = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
    for path in found:
        refuse_link(path, folder)
    for path in found:
        copy = target / path.relative_to(folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.unlink(missing_ok=True)  # a second name of a file that must stay as it is
        try:
            if link:
                os.link(path, copy)
                continue
        except OSError:
            pass
        shutil.copyfile(path, copy)


def upload(
    folder: Path,
    repo_id: str,
    *,
    message: str,
    token: str | bool | None = None,
    revision: str | None = None,
    card: bool = True,
    **options: Any,
) -> CommitInfo:
    """Upload a folder in one commit, into a branch that is made if need be.

    With `card` the folder is an adapter's: its card is written for the repository, and its evaluation loses the places of
    folders on this computer. `options` are those of `HfApi.upload_folder`.
    """
    api = HfApi(token=token, library_name="shapadapter")
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    if card:
        _hide_places(folder / "evaluation.json")
        card_for_push(folder, repo_id, revision=revision, token=token)
    return api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message, revision=revision, **options)


def _hide_places(file: Path) -> None:
    """Leave of the folders that an evaluation names their last parts; one that cannot be read is left as it is."""
    try:
        found = read_json(file)
        found["about"] |= {
            name: Path(found["about"][name]).name for name in ("checkpoint", "folder") if name in found["about"]
        }
    except (CheckpointError, KeyError, TypeError):
        return
    write_together({file: json.dumps(found, indent=1).encode()})


@contextmanager
def hub_errors(repo_id: str, revision: str | None = None) -> Iterator[None]:
    """Turn the client's errors into a `ShapleyError` with a sentence that says what to do."""
    try:
        yield
    except (*HUB_ERRORS, ValueError) as error:
        if isinstance(error, ShapleyError):
            raise
        trouble = hub_trouble(error, repo_id, revision) or " ".join(str(error).split())
        raise ShapleyError(f"Not pushed. {trouble}") from error
