"""Push a saved adapter to the Hub: whole, loadable by others, and nothing that does not belong there."""

from __future__ import annotations

import json
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
from shapadapter.core.errors import ShapleyError, redacted
from shapadapter.core.files import naming
from shapadapter.core.links import refuse_link
from shapadapter.hub.card.pull import card_for_push
from shapadapter.hub.load import find_base, load
from shapadapter.hub.locate import AdapterFiles
from shapadapter.hub.remote import ADAPTER_FILES, BASE_FILES, HUB_ERRORS, PROCESSOR_FILES, forget_places, hub_trouble


def copy_files(folder: Path | None, target: Path, patterns: Sequence[str]) -> None:
    """Copy those files of a folder that match a pattern; of no folder none.

    Raises:
        CheckpointError: one of them is a link out of the folder.
    """
    if folder is None:
        return
    for path in sorted(path for pattern in patterns for path in folder.glob(pattern) if path.is_file()):
        refuse_link(path, folder)
        copy = target / path.relative_to(folder)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)


def own_code(base: Path) -> list[str]:
    """The files of code in the folder of a base model without which it cannot be loaded; others there do not count.

    Raises:
        CheckpointError: its configuration is damaged.
    """
    named = str(read_json(base / "config.json").get("auto_map"))
    return sorted(path.name for path in base.glob("*.py") if f"'{path.stem}." in named)


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
    optimiser's states, no pickles. The folder stays as it is.

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
        ShapleyError: the folder holds no whole adapter, others could not load it, or the Hub refused.
        CheckpointError: a file is damaged, or the base on this computer is not the one the adapter was made for.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ShapleyError(f"There is no folder {folder}.")
    if create_pr and revision is not None:
        raise ShapleyError("A pull request goes to the main branch: leave revision out, or create_pr.")
    files = AdapterFiles(str(folder), folder)
    base = _local_base(folder, files.config(), base_repo_id)
    api = HfApi(token=token, library_name="shapadapter")
    with _staged(folder, ADAPTER_FILES) as staged:
        forget_places(staged)
        copy_files(files.processor(), staged, PROCESSOR_FILES)
        if base is not None and base_repo_id is not None:
            name, commit = _push_base(api, folder, base, base_repo_id, private)
            _rename_base(staged / CONFIG_NAME, name, commit)
        return _upload(api, staged, repo_id, private, revision, create_pr, commit_message or "Upload adapter")


def _local_base(folder: Path, config: Any, base_repo_id: str | None) -> Path | None:
    """The folder of the base model; None if it is on the Hub.

    Raises:
        ShapleyError: it is in a folder and shall stay there or cannot be pushed, or it is on the Hub and shall be pushed.
    """
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


def _push_base(api: HfApi, folder: Path, base: Path, repo_id: str, private: bool | None) -> tuple[str, str]:
    """Push the base model; its name on the Hub and its commit."""
    load(folder, base=base, device="cpu")  # were it another model, nobody could load the pushed adapter
    with _staged(base, BASE_FILES) as staged, _explained(repo_id, None):
        name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        info: CommitInfo = api.upload_folder(repo_id=name, folder_path=staged, commit_message="Upload base model")
        return name, info.oid


def _rename_base(file: Path, name: str, commit: str) -> None:
    about = read_json(file)
    about |= {"base_model_name_or_path": name, "revision": commit}
    file.write_text(json.dumps(about, indent=2, sort_keys=True), encoding="utf-8")


def _upload(
    api: HfApi,
    folder: Path,
    repo_id: str,
    private: bool | None,
    revision: str | None,
    create_pr: bool,
    message: str,
) -> str:
    with _explained(repo_id, revision):
        name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(name, branch=revision, exist_ok=True)
        card_for_push(folder, name, revision=revision, token=api.token)
        info: CommitInfo = api.upload_folder(
            repo_id=name, folder_path=folder, commit_message=message, revision=revision, create_pr=create_pr
        )
    if create_pr and info.pr_url is None:
        raise ShapleyError(f"No pull request was opened: {name} holds these very files already.")
    if create_pr:
        return str(info.pr_url)
    return redacted(f"{constants.ENDPOINT}/{name}") + (f"/tree/{revision}" if revision is not None else "")


@contextmanager
def _staged(folder: Path, patterns: Sequence[str]) -> Iterator[Path]:
    """A passing copy of those files of a folder that belong to the upload."""
    with tempfile.TemporaryDirectory() as place:
        with naming(Path(place)):
            copy_files(folder, Path(place), patterns)
        yield Path(place)


@contextmanager
def _explained(repo_id: str, revision: str | None) -> Iterator[None]:
    """Turn the client's errors into sentences.

    Raises:
        ShapleyError: there was one.
    """
    try:
        yield
    except (*HUB_ERRORS, ValueError) as error:
        trouble = hub_trouble(error, repo_id, revision) or " ".join(str(error).split())
        raise ShapleyError(f"Not pushed. {trouble}") from error
