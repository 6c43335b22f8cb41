"""A card that is written anew: before an upload, with the repository's own card in view, and with results and pictures."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import RevisionNotFoundError
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from shapadapter.adapter.saving import read_config, record_for, weights_digest, write_pictures
from shapadapter.core.documents import read_tensors
from shapadapter.core.errors import ShapleyError
from shapadapter.core.files import write_together
from shapadapter.core.remote import CARD, PICTURES, warn_of_local_base
from shapadapter.evaluation import Evaluation
from shapadapter.hub.card.document import card_metadata, read_card, renewed, untouched, write_card
from shapadapter.hub.card.facts import compact
from shapadapter.hub.level import Explainer
from shapadapter.hub.load import AdapterFiles, load
from shapadapter.visual import sample_pictures

_CLASSES = 3  # maps beside each picture


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
    """
    config = read_config(folder / (subfolder or ""))
    if not config:
        return
    inside = f"{subfolder}/" if subfolder and not at_top else ""
    files, existing = _files_on_hub(repo_id, revision, token)
    there = None
    if f"{inside}{CARD}" in files:
        there = read_card(Path(HfApi().hf_hub_download(repo_id, f"{inside}{CARD}", revision=existing, token=token)))
    here = read_card(folder / inside / CARD) if start is None else start
    ours = here is not None and not untouched(here)
    if ours and there is not None and not untouched(there) and not _same_words(str(here), there):
        warnings.warn(
            f"The card of {repo_id} and the one that is pushed were both edited: the pushed one takes its place. The other "
            "is in the repository's history.",
            stacklevel=3,
        )
    write_card(
        folder / inside,
        config,
        name=repo_id,
        revision=None if revision is None or revision.startswith("refs/") else revision,
        subfolder=subfolder,
        tags=tags,
        start=(here if there is None or ours else there) or "",
        remote=[file.removeprefix(f"{inside}{PICTURES}/") for file in files],
    )


def _same_words(one: str, other: str) -> bool:
    """Whether two cards differ in nothing that a person wrote."""
    try:
        return renewed(one, "", {}) == renewed(other, "", {})
    except ValueError:
        return one == other


def _files_on_hub(repo_id: str, revision: str | None, token: Any) -> tuple[list[str], str | None]:
    """The files of a repository, and the revision that they are of: a branch that does not exist yet begins as the main one."""
    api = HfApi()
    try:
        info = api.model_info(repo_id, revision=revision, token=token)
    except RevisionNotFoundError:
        revision = None
        info = api.model_info(repo_id, token=token)
    return [file.rfilename for file in info.siblings or []], revision


def prepare_upload(model: Any, folder: Path, repo_id: str, revision: str | None, token: Any) -> None:
    """Write the cards of a folder that transformers is about to upload, which has put the repository's card into it.

    Adapters of other names than "default" are in folders of their names. Without a default one here or there, the card at
    the top, which is what the Hub shows, is of the active one of them.
    """
    where: dict[str, Any] = {"revision": revision, "token": token}
    about, configs = read_config(folder), model.peft_config
    tags = card_metadata(folder).get("tags") or []  # with those that the caller asked for
    if about.get("peft_type") == "SHAPLEY":
        warn_of_local_base(about.get("base_model_name_or_path"))
        written = [getattr(config, "written_card", None) for config in configs.values()]
        start = next((text for place, text in filter(None, written) if place == folder.resolve()), "")
        card_for_push(folder, repo_id, tags=tags, start=start, **where)
    if not hasattr(model, "get_base_model"):  # without PEFT's wrapper, transformers saves no folders
        return
    for name in configs:
        about = read_config(folder / name)
        if name == "default" or about.get("peft_type") != "SHAPLEY":
            continue
        pictures = folder / name / PICTURES
        if "default" not in configs and name == model.active_adapter:
            warn_of_local_base(about.get("base_model_name_or_path"))
            (folder / CARD).unlink(missing_ok=True)  # of the main branch, or a form
            if CONFIG_NAME not in _files_on_hub(repo_id, **where)[0]:  # else the card there is about that adapter
                if pictures.is_dir() and not (folder / PICTURES).exists():  # else an adapter has that name
                    pictures.rename(folder / PICTURES)
                card_for_push(folder, repo_id, subfolder=name, at_top=True, tags=tags, **where)
        if pictures.is_dir():
            shutil.rmtree(pictures)  # transformers uploads no folders inside of folders
        card_for_push(folder, repo_id, subfolder=name, **where)


def update_card(
    folder: str | Path,
    *,
    evaluation: str | Path | Evaluation | None = None,
    images: Any = None,
    processor: Any = None,
    texts: list[str] | None = None,
    name: str | None = None,
    refine: int | str | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Write the card of an adapter's folder anew, with results and pictures; what the user wrote in it stays.

    Results and the list of pictures are kept in `adapter_config.json`, so they stay with the adapter wherever it is saved.

    Args:
        folder: of the adapter.
        evaluation: what `evaluate` found, or the path of its `evaluation.json`.
        images: to be shown with their maps, in place of those that are shown now: paths, PIL images or arrays. A few
            held-out ones that anybody may see. An empty list takes the pictures away.
        processor: the image processor; by default the one in the folder, or the base model's.
        texts: what a model that matches images with texts compares the images with.
        name: by which the adapter is loaded in the card's code, such as `user/name`; by default the folder's own.
        refine: level of the pictures' maps, as `explain` takes it; by default a forward and a backward pass where the model
            has gradients by presence, else one forward pass. The card names it.
        trust_remote_code: whether a base with code of its own may run it here, where there are images to explain.

    Returns:
        The card's path.

    Raises:
        ShapleyError: no adapter of ours there, an evaluation of another one, or images that cannot be explained.
        CheckpointError: a file cannot be read, or is a link out of the folder.
    """
    folder = Path(folder)
    AdapterFiles(str(folder), folder).config()  # what cannot be loaded is refused
    config, digest = read_config(folder), weights_digest(read_tensors(folder / SAFETENSORS_WEIGHTS_NAME))
    record = config["record"] = record_for(config.get("record"), digest, folder) or {}
    if evaluation is not None:
        found = evaluation if isinstance(evaluation, Evaluation) else Evaluation.load(evaluation)
        if found.about.get("weights") not in (None, digest):
            raise ShapleyError(
                f"The evaluation is of other weights than those in {folder}. Run `shapadapter evaluate` again."
            )
        found.check_whole()
        record |= {"evaluation": compact(found.to_dict()), "players": list(found.about["players"])}
    pictures: dict[str, bytes] = {}
    if images is not None:
        record["pictures"] = []
    if images is not None and len(images):
        model, own = load(folder, trust_remote_code=trust_remote_code)
        explanation = Explainer(refine)(model, images, processor or own, texts=texts, top_k=_CLASSES)
        pictures, record["pictures"] = sample_pictures(explanation, _CLASSES)
    write_together({folder / CONFIG_NAME: json.dumps(config, indent=2, sort_keys=True).encode()})
    write_pictures(folder, pictures, record)
    write_card(folder, config, name=name)
    return folder / CARD
