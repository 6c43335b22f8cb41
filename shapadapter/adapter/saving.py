"""What is saved beside the weights: the record of an adapter, its pictures, and its card, which the hub room writes."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from functools import cache, wraps
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft.peft_model
import torch
import transformers.modeling_utils
from peft import PeftModel
from peft.utils import CONFIG_NAME
from torch import Tensor, nn
from transformers.utils.hub import PushToHubMixin

from shapadapter.core.documents import read_json
from shapadapter.core.errors import CheckpointError, ImageError
from shapadapter.core.files import atomic_file, break_links, write_together
from shapadapter.core.remote import PICTURES

if TYPE_CHECKING:
    from shapadapter.adapter.layer import ShapleyLayer

_TYPE = "SHAPLEY"

# -- those who write cards and upload ---------------------------------------------------------------------------------


_publishers: dict[str, str] = {}


def register_publisher(**modules: str) -> None:
    """Say in which modules the functions are that write cards and upload; this room and training may not import them."""
    _publishers.update(modules)


class _Publisher:
    """The registered functions, each of whose modules is imported when it is first needed."""

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module(_publishers[name]), name)


def publisher() -> Any:
    """`write_card`, `prepare_upload`, `copy_files` and `upload` of `shapadapter.hub`."""
    return _Publisher()


# -- the record -------------------------------------------------------------------------------------------------------

_OF_WEIGHTS = ("evaluation", "metrics", "pictures")
"""Parts of a record that speak of certain weights only."""

OWN_PICTURE = re.compile(r"explanation-[0-9]{1,4}\.png")
"""Names of the pictures that we write; none of them can lead out of their folder."""


def describe(model: nn.Module, layer: ShapleyLayer, config: Any, saved: dict[str, Tensor]) -> None:
    """Put into a configuration what its card needs to know of the model and the tensors it is saved with."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    config.weights = weights_digest(saved)
    config.model_tags = [str(tag) for tag in getattr(base, "model_tags", None) or []]
    kind = "matching" if layer.anatomy.kind == "matching" else "classifier"
    players = _players(base, layer)
    record = {"kind": kind, **({} if players is None else {"players": players}), **(config.record or {})}
    if getattr(base, "quantization_method", None) is not None:
        record["quantised"] = str(getattr(base.quantization_method, "value", base.quantization_method))
    config.record = record


def _players(base: Any, layer: ShapleyLayer) -> list[int] | None:
    """(rows, cols) on images of the base model's own size; None where it names none."""
    size = getattr(base.config, "image_size", None)
    sides = [size, size] if isinstance(size, int) else list(size) if isinstance(size, list | tuple) else []
    if layer.active is None or len(sides) != 2 or not all(isinstance(side, int) for side in sides):
        return None
    try:
        return list(layer.tiling(torch.empty(1, layer.anatomy.channels, *sides, device="meta")).players)
    except (ImageError, RuntimeError):  # it takes images of another shape
        return None


def weights_digest(tensors: Mapping[str, Tensor]) -> str | None:
    """Identifies the trained numbers of an adapter, whatever their names and precision; None if they are not at hand."""
    own = [tensor for name, tensor in tensors.items() if "lora_" in name]
    if not own or any(tensor.is_meta or hasattr(tensor, "device_mesh") for tensor in own):
        return None
    parts = sorted(hashlib.sha256(t.detach().float().cpu().contiguous().numpy().tobytes()).digest() for t in own)
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def record_for(record: Any, weights: str | None, folder: Path) -> dict[str, Any] | None:
    """The record to save into a folder with weights of this digest.

    Results of other weights are left out. What was added to the folder since the same weights were saved there, such as an
    evaluation, stays.
    """
    found = dict(record) if isinstance(record, Mapping) else {}
    if weights is None:
        return found or None
    if found.get("weights") not in (None, weights):
        changed = any(name in found for name in (*_OF_WEIGHTS, "training"))
        found = {name: value for name, value in found.items() if name not in _OF_WEIGHTS}
        found |= {"changed": True} if changed else {}
    before = read_config(folder).get("record")
    if isinstance(before, Mapping) and before.get("weights") == weights:
        found = {**before, **found}
    return {**found, "weights": weights}


def read_config(folder: Path) -> dict[str, Any]:
    """The content of a folder's `adapter_config.json`; empty where there is none that can be read."""
    try:
        found: dict[str, Any] = read_json(folder / CONFIG_NAME)
    except CheckpointError:
        return {}
    return found


def write_record(folder: Path, record: Mapping[str, Any] | None) -> None:
    """Put a record into the `adapter_config.json` of a folder, where there is one."""
    if config := read_config(folder):
        content = json.dumps({**config, "record": record}, indent=2, sort_keys=True)
        write_together({folder / CONFIG_NAME: content.encode()})


# -- pictures of the card ---------------------------------------------------------------------------------------------


def picture_files(record: Any) -> list[str]:
    """Names of the pictures that a record lists."""
    pictures = record.get("pictures") if isinstance(record, Mapping) else None
    listed = [one.get("file") for one in pictures if isinstance(one, Mapping)] if isinstance(pictures, list) else []
    return [name for name in listed if isinstance(name, str) and OWN_PICTURE.fullmatch(name)]


def read_pictures(folder: Path, record: Any) -> dict[str, bytes]:
    """The pictures that a record lists and that are in an adapter's folder, by name."""
    paths = [folder / PICTURES / name for name in picture_files(record)]
    return {path.name: path.read_bytes() for path in paths if path.is_file() and not path.parent.is_symlink()}


def write_pictures(folder: Path, pictures: Mapping[str, bytes], record: Any) -> None:
    """Write those pictures into an adapter's folder that its record lists, and delete those of ours that it does not."""
    place, listed = folder / PICTURES, picture_files(record)
    if place.is_symlink():
        raise CheckpointError(
            f"{place} is a link to another folder: pictures are written into the adapter's own only."
        )
    if new := {place / name: data for name, data in pictures.items() if name in listed}:
        place.mkdir(exist_ok=True)
        write_together(new)
    for path in place.glob("explanation-*.png"):
        if OWN_PICTURE.fullmatch(path.name) and path.name not in listed:
            path.unlink(missing_ok=True)


def save_card(config: Any, folder: Path) -> None:
    """Write the card of a configuration that was just saved, with new pictures or those of the folder it came from."""
    source, new = config.source, config.pictures
    if not new and source is not None and source.resolve() != folder.resolve():
        new = read_pictures(source, config.record)
    write_pictures(folder, new, config.record)
    text = publisher().write_card(folder, config.to_dict(), tags=config.model_tags)
    config.written_card = None if text is None else (folder.resolve(), text)


# -- what PEFT and transformers leave no other way for ----------------------------------------------------------------


@cache
def prepare_libraries() -> None:
    """Have PEFT and transformers save and upload Shapley adapters our way; called when the first one is configured.

    Neither offers a hook where it writes weights, before PEFT rewrites a card, or between the card of the repository,
    which transformers puts in the place of the saved one, and the upload.
    """
    for module in (peft.peft_model, transformers.modeling_utils):
        replace_function(module, "safe_save_file", _save_weights)
    replace_function(PeftModel, "create_or_update_model_card", _leave_card)
    replace_function(PushToHubMixin, "_upload_modified_files", _upload)


def replace_function(owner: Any, name: str, ours: Callable[..., Any]) -> None:
    """Put `ours(theirs, ...)` in the place of a function or method; a second call changes nothing."""
    theirs = getattr(owner, name, None)
    # Not all of these names are public: a release without them costs a card at a push, and not the whole package.
    if theirs is None or hasattr(theirs, "_of_shapadapter"):
        return

    @wraps(theirs)
    def replaced(*args: Any, **kwargs: Any) -> Any:
        """The replaced function, whose first argument is what it replaces."""
        return ours(theirs, *args, **kwargs)

    replaced._of_shapadapter = True  # type: ignore[attr-defined]
    setattr(owner, name, replaced)


def _save_weights(theirs: Callable[..., None], tensors: Any, filename: Any, *args: Any, **kwargs: Any) -> None:
    """Weights that cannot be written to their end leave the file before them as it was."""
    if not any("lora_shapley" in name for name in tensors):
        theirs(tensors, filename, *args, **kwargs)
        return
    with atomic_file(Path(filename)) as temporary:
        theirs(tensors, temporary, *args, **kwargs)


def _is_ours(config: Any) -> bool:
    return getattr(config.peft_type, "value", config.peft_type) == _TYPE


def _leave_card(theirs: Callable[..., None], model: Any, output_dir: str) -> None:
    """PEFT's card only where the folder's own adapter is not ours: it replaces tags and adds to the text of the user's."""
    if any(_is_ours(config) for config in model.peft_config.values()):
        break_links(Path(output_dir), model.peft_config)
    default = model.peft_config.get("default")  # the one that is saved into this folder; others have folders in it
    if default is None or not _is_ours(default):
        theirs(model, output_dir)


def _upload(theirs: Callable[..., Any], model: Any, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
    configs = getattr(model, "peft_config", None)
    if isinstance(configs, Mapping) and any(_is_ours(config) for config in configs.values()):
        publisher().prepare_upload(
            model, Path(working_dir), repo_id, revision=kwargs.get("revision"), token=kwargs.get("token")
        )
    return theirs(model, working_dir, repo_id, *args, **kwargs)
