"""Push a saved adapter to the Hub: complete, loadable by others, and nothing that does not belong there."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, constants
from peft.utils import CONFIG_NAME

from shapadapter.core.documents import read_json
from shapadapter.core.errors import CheckpointError, ShapleyError, redacted
from shapadapter.core.files import refuse_link, report_full_disk, write_together
from shapadapter.core.phrases import one_line
from shapadapter.core.remote import ADAPTER_FILES, BASE_FILES, HUB_ERRORS, PROCESSOR_FILES, find_base, hub_trouble
from shapadapter.hub.card.renewal import card_for_push
from shapadapter.hub.load import AdapterFiles, load


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

    Uploaded are the adapter's two files, the processor's, `README.md`, `evaluation.json` and `explanations/`, nothing else.

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
    folder = Path(folder)
    if not folder.is_dir():
        raise ShapleyError(f"There is no folder {folder}.")
    if create_pr and revision is not None:
        raise ShapleyError("A pull request goes to the main branch: leave revision out, or create_pr.")
    files = AdapterFiles(str(folder), folder)
    base = _base_to_push(files, base_repo_id)
    with _staged(folder, ADAPTER_FILES) as staged:
        if (processor := files.processor()) is not None:
            copy_files(processor, staged, PROCESSOR_FILES)
        if base is not None and base_repo_id is not None:
            load(folder, base=base, device="cpu")  # were it another model, nobody could load the pushed adapter
            with _staged(base, BASE_FILES) as copy:
                name, info = _send(copy, base_repo_id, private, token, message="Upload base model", card=False)
            about = {**read_json(staged / CONFIG_NAME), "base_model_name_or_path": name, "revision": info.oid}
            (staged / CONFIG_NAME).write_text(json.dumps(about, indent=2, sort_keys=True), encoding="utf-8")
        options: dict[str, Any] = {"revision": revision, "create_pr": create_pr}
        name, info = _send(staged, repo_id, private, token, message=commit_message or "Upload adapter", **options)
    if create_pr:
        if info.pr_url is None:
            raise ShapleyError(f"No pull request was opened: {name} holds these very files already.")
        return str(info.pr_url)
    return redacted(f"{constants.ENDPOINT}/{name}") + (f"/tree/{revision}" if revision is not None else "")


def _base_to_push(files: AdapterFiles, base_repo_id: str | None) -> Path | None:
    """The folder of the base model that is pushed beside; None if the base is on the Hub."""
    config = files.config()
    base = base_folder(files, config)
    if base is None and base_repo_id is not None:
        raise ShapleyError(
            f"The base model {config.base_model_name_or_path} is on the Hub already: leave base_repo_id (--base-repo) out."
        )
    if base is not None and base_repo_id is None:
        raise ShapleyError(
            f"The base model of {files.name} is {base}, a folder on this computer, so nobody else could load the adapter. Push "
            "it beside: push(folder, repo_id, base_repo_id='user/name-of-the-base'), or --base-repo on the command line."
        )
    return base


def _send(folder: Path, repo_id: str, private: bool | None, token: Any, **options: Any) -> tuple[str, CommitInfo]:
    """Upload a folder to a repository that is created if need be; its full name, and the commit."""
    with hub_errors(repo_id, options.get("revision")):
        name = HfApi(token=token).create_repo(repo_id, private=private, exist_ok=True).repo_id
        return name, upload(folder, name, token=token, **options)


def base_folder(files: AdapterFiles, config: Any) -> Path | None:
    """The folder of an adapter's base model, all of which others can get; None if it is on the Hub."""
    file, name = files.folder / CONFIG_NAME, config.base_model_name_or_path
    if not name:
        raise ShapleyError(
            f"The adapter {files.name} does not name its base model, so nobody could load it. Write its name on the Hub as "
            f"base_model_name_or_path in {file}."
        )
    root = Path(find_base(files.folder, str(name)))
    if not (root / "config.json").is_file():
        return None
    if not any(root.glob("model*.safetensors")):
        raise ShapleyError(
            f"The base model {root} has no safetensors file, and pickles are not pushed. Save it again: "
            "AutoModelForImageClassification.from_pretrained(folder).save_pretrained(folder)."
        )
    # Code without which it cannot be loaded; other scripts beside it do not count.
    named = str(read_json(root / "config.json").get("auto_map"))
    if code := sorted(path.name for path in root.glob("*.py") if f"'{path.stem}." in named):
        raise ShapleyError(
            f"The base model {root} comes with code of its own ({', '.join(code)}), which is not pushed, and which no Space "
            f"would run. Upload its folder yourself: `hf upload user/name-of-the-base {shlex.quote(str(root))}`, and write "
            f"that name as base_model_name_or_path in {file}."
        )
    return root


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
        with suppress(OSError):
            if link:
                os.link(path, copy)
                continue
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

    With `card` the folder is an adapter's: its card is written for the repository, and of the folders that its evaluation
    names, the last parts stay. `options` are those of `HfApi.upload_folder`.
    """
    api = HfApi(token=token, library_name="shapadapter")
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    if card:
        with suppress(CheckpointError, KeyError, TypeError):  # what cannot be read is left as it is
            found = read_json(folder / "evaluation.json")
            about = found["about"]
            about |= {name: Path(about[name]).name for name in ("checkpoint", "folder") if name in about}
            write_together({folder / "evaluation.json": json.dumps(found, indent=1).encode()})
        card_for_push(folder, repo_id, revision=revision, token=token)
    return api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message, revision=revision, **options)


@contextmanager
def hub_errors(repo_id: str, revision: str | None = None) -> Iterator[None]:
    """Turn the client's errors into a `ShapleyError` with a sentence that says what to do."""
    try:
        yield
    except (*HUB_ERRORS, ValueError) as error:
        if isinstance(error, ShapleyError):
            raise
        raise ShapleyError(f"Not pushed. {hub_trouble(error, repo_id, revision) or one_line(error)}") from error
