"""Bring what was measured later, and new pictures, into the card of a saved adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shapadapter.adapter.config import check_files
from shapadapter.core.documents import read_json, read_tensors
from shapadapter.core.errors import ShapleyError
from shapadapter.core.files import write_together
from shapadapter.core.links import refuse_links
from shapadapter.evaluation import Evaluation
from shapadapter.explanation.api import explain
from shapadapter.hub.card.facts import CONFIG, settled, weights_digest
from shapadapter.hub.card.render import CARD, read_pictures, write_card
from shapadapter.hub.card.results import compact
from shapadapter.hub.load import load
from shapadapter.visual import sample_pictures

_WEIGHTS = "adapter_model.safetensors"
_CLASSES = 3


def update_card(
    folder: str | Path,
    *,
    evaluation: str | Path | Evaluation | None = None,
    images: Any = None,
    processor: Any = None,
    texts: list[str] | None = None,
    name: str | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Write the card of an adapter's folder anew, with results and pictures; what the user wrote in it stays.

    Results and the list of pictures are kept in `adapter_config.json`, so that they travel with the adapter. A checkpoint
    that is whole stays whole.

    Args:
        folder: of the adapter.
        evaluation: what `evaluate` found, or the path of its `evaluation.json`.
        images: to be shown with their maps, in place of those that are shown now: paths, PIL images or arrays. A few
            held-out ones that anybody may see. An empty list takes the pictures away.
        processor: the image processor; by default the one in the folder, or the base model's.
        texts: what a model that matches images with texts compares the images with.
        name: by which the adapter is loaded in the card's code, such as `user/name`; by default the folder's own.
        trust_remote_code: whether a base with code of its own may run it here, where there are images to explain.

    Returns:
        The card's path.

    Raises:
        ShapleyError: the folder holds no adapter of ours, the evaluation is of another one, or the images cannot be
            explained.
        CheckpointError: the evaluation cannot be read, the adapter cannot be loaded, or a file in its folder is a link
            out of it.
    """
    folder = Path(folder)
    refuse_links(folder)
    config = read_json(folder / CONFIG) if (folder / CONFIG).exists() else {}
    if config.get("peft_type") != "SHAPLEY" or not (folder / _WEIGHTS).exists():
        raise ShapleyError(f"{folder} holds no adapter of shapadapter: expected {CONFIG} and {_WEIGHTS}.")
    check_files(folder / CONFIG, config)
    found = evaluation if evaluation is None or isinstance(evaluation, Evaluation) else Evaluation.load(evaluation)
    digest = weights_digest(read_tensors(folder / _WEIGHTS))
    other = None if found is None else found.about.get("weights")
    if other not in (None, digest):
        raise ShapleyError(
            f"The evaluation is of other weights than those in {folder}. Run `shapadapter evaluate` again."
        )
    record = settled(config.get("record"), digest, folder) or {}
    pictures = read_pictures(folder, config)
    if found is not None:
        found.check_whole()
        record["evaluation"] = compact(found.to_dict())
        record["players"] = list(found.about["players"])
    if images is not None:
        drawn = _drawn(folder, images, processor, texts, trust_remote_code) if len(images) else ({}, [])
        pictures, record["pictures"] = drawn
    config["record"] = record
    write_together({folder / CONFIG: json.dumps(config, indent=2, sort_keys=True).encode()})
    write_card(folder, config, pictures=pictures, name=name)
    return folder / CARD


def _drawn(
    folder: Path, images: Any, processor: Any, texts: Any, trust_remote_code: bool
) -> tuple[dict[str, bytes], list[dict[str, str]]]:
    model, own = load(folder, trust_remote_code=trust_remote_code)
    found = explain(model, images, processor or own, texts=texts, top_k=_CLASSES)
    return sample_pictures(found, _CLASSES)
