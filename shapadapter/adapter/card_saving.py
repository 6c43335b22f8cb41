"""Where PEFT and transformers write a model card: for a Shapley adapter they write ours, for any other one their own."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from shapadapter.adapter.config import WRITTEN, ShapleyConfig
from shapadapter.adapter.layer import ShapleyLayer
from shapadapter.core.errors import ImageError
from shapadapter.core.links import break_links
from shapadapter.hub.card.facts import read_config, weights_digest
from shapadapter.hub.card.metadata import is_ours
from shapadapter.hub.card.pull import card_for_push, has_adapter
from shapadapter.hub.card.render import CARD, PICTURES, card_metadata, read_card, write_card
from shapadapter.hub.remote import warn_of_local_base

_NAME = "SHAPLEY"


def note(model: nn.Module, layer: ShapleyLayer, config: ShapleyConfig, saved: dict[str, Tensor]) -> None:
    """Leave with a configuration what its card needs to know of the model, just before both are saved.

    Args:
        model: the model that is saved, with or without PEFT's wrapper.
        layer: its Shapley layer.
        config: of the adapter that is saved.
        saved: the adapter's tensors.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    config.weights = weights_digest(saved)
    config.model_tags = [str(tag) for tag in getattr(base, "model_tags", None) or []]
    kind = "matching" if layer.anatomy.kind == "matching" else "classifier"
    players = _players(base, layer)
    record = {"kind": kind, **({} if players is None else {"players": players}), **(config.record or {})}
    if getattr(base, "quantization_method", None) is not None:
        record["quantised"] = str(getattr(base.quantization_method, "value", base.quantization_method))
    config.record = record


def _players(base: PreTrainedModel, layer: ShapleyLayer) -> list[int] | None:
    """(rows, cols) on images of the base model's own size; None where it names none."""
    size = getattr(base.config, "image_size", None)
    sides = [size, size] if isinstance(size, int) else list(size) if isinstance(size, list | tuple) else []
    if layer.active is None or len(sides) != 2 or not all(isinstance(side, int) for side in sides):
        return None
    try:
        return list(layer.tiling(torch.empty(1, layer.anatomy.channels, *sides, device="meta")).players)
    except (ImageError, RuntimeError):  # it takes images of another form
        return None


def install() -> None:
    """Lead PEFT's and transformers' own cards past Shapley adapters; a second call changes nothing.

    PEFT's `create_or_update_model_card` replaces tags that a user added, and `push_to_hub` of transformers puts the card
    of the repository, or an empty form, in the place of the one that was just written.
    """
    wrap_method(PeftModel, "create_or_update_model_card", _card_of_peft)
    wrap_method(PeftModel, "_upload_modified_files", _upload)
    wrap_method(PreTrainedModel, "_upload_modified_files", _upload)


def wrap_method(owner: type, name: str, ours: Callable[..., Any]) -> None:
    """Put `ours(self, theirs, ...)` in the place of a method; a second call changes nothing."""
    theirs = getattr(owner, name, None)
    # Two of these names are not public: a release without them shall cost a card at a push, not the whole package.
    if theirs is None or hasattr(theirs, "_of_shapadapter"):
        return

    @wraps(theirs)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        """The wrapped method, with what it wraps as its first argument."""
        return ours(self, theirs, *args, **kwargs)

    method._of_shapadapter = True  # type: ignore[attr-defined]
    setattr(owner, name, method)


def _card_of_peft(model: Any, theirs: Callable[..., None], output_dir: str) -> None:
    if any(isinstance(config, ShapleyConfig) for config in model.peft_config.values()):
        for folder in (output_dir, *(Path(output_dir) / name for name in model.peft_config)):
            break_links(Path(folder), (*WRITTEN, *model.peft_config))
    config = model.peft_config.get("default")  # the one that is saved into this folder; others have folders in it
    if not isinstance(config, ShapleyConfig):
        theirs(model, output_dir)
    elif not is_ours(read_card(Path(output_dir) / CARD) or ""):  # else it is renewed when the weights are there, too
        write_card(Path(output_dir), config.to_dict(), tags=config.model_tags)


def _upload(model: Any, theirs: Callable[..., Any], working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
    folder = Path(working_dir)
    where: dict[str, Any] = {"revision": kwargs.get("revision"), "token": kwargs.get("token")}
    if (about := read_config(folder)).get("peft_type") == _NAME:
        warn_of_local_base(about.get("base_model_name_or_path"))
        written = [config.written_card for config in model.peft_config.values() if isinstance(config, ShapleyConfig)]
        start = next((text for place, text in filter(None, written) if place == folder.resolve()), "")
        card_for_push(folder, repo_id, tags=_tags(folder), start=start, **where)
    if isinstance(model, PeftModel):
        _cards_below(model, folder, repo_id, where)
    return theirs(model, working_dir, repo_id, *args, **kwargs)


def _tags(folder: Path) -> list[str]:
    """What stands there is the repository's card or a form, with the tags that the caller asked for."""
    return card_metadata(folder).get("tags") or []


def _cards_below(model: PeftModel, folder: Path, repo_id: str, where: dict[str, Any]) -> None:
    """The cards of adapters of other names than "default", which are saved in folders of their names.

    Without a default one here or there, the card at the top, which is what the Hub shows, is of the active one of them.
    """
    configs = model.peft_config
    named = [name for name, config in configs.items() if name != "default" and isinstance(config, ShapleyConfig)]
    for name in named:
        pictures = folder / name / PICTURES
        if "default" not in configs and name == model.active_adapter:
            warn_of_local_base(read_config(folder / name).get("base_model_name_or_path"))
            _card_at_top(folder, repo_id, name, where)
        if pictures.is_dir():
            shutil.rmtree(pictures)  # transformers uploads no folders inside of folders
        card_for_push(folder, repo_id, subfolder=name, **where)


def _card_at_top(folder: Path, repo_id: str, name: str, where: dict[str, Any]) -> None:
    tags = _tags(folder)
    (folder / CARD).unlink(missing_ok=True)  # what transformers puts there is the card of the main branch, or a form
    if has_adapter(repo_id, **where):  # the card there is about that one
        return
    pictures = folder / name / PICTURES
    if pictures.is_dir() and not (folder / PICTURES).exists():  # else an adapter has that name
        pictures.rename(folder / PICTURES)
    card_for_push(folder, repo_id, subfolder=name, at_top=True, tags=tags, **where)
