"""Load an adapter from its folder, with the base model it names and the image processor of either."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from peft import AutoPeftModel, PeftConfig, PeftModel
from transformers import AutoImageProcessor

from shapadapter.errors import ShapleyError


def load_checkpoint(folder: Path) -> tuple[Any, Any]:
    """The wrapped model of an adapter folder, on the GPU if there is one, and its image processor.

    Raises:
        ShapleyError: there is no adapter in the folder, or its base model is neither in a folder nor on the Hub.
    """
    if not (folder / "adapter_config.json").is_file():
        raise ShapleyError(f"{folder} holds no adapter: expected adapter_config.json and adapter_model.safetensors.")
    config: Any = PeftConfig.from_pretrained(str(folder))
    base = find_base(folder, str(config.base_model_name_or_path))
    try:
        model = _loaded(folder, config, base)
        own = (folder / "preprocessor_config.json").is_file()
        processor = AutoImageProcessor.from_pretrained(folder if own else base)
    except OSError as error:
        if Path(base).is_dir():
            raise
        raise ShapleyError(f"{_missing(folder, base)} On the Hub: {str(error).splitlines()[0]}") from error
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), processor


def _loaded(folder: Path, config: Any, base: str) -> Any:
    # A new classifier is saved with the adapter; the base model must have room for its classes.
    new_head = getattr(config, "prediction", "vote") == "classifier" and config.modules_to_save
    room = {"num_labels": config.num_classes, "ignore_mismatched_sizes": True} if new_head else {}
    name = (config.auto_mapping or {}).get("base_model_class", "")
    if base != config.base_model_name_or_path and hasattr(transformers, name):
        # PEFT's own loader would look under the name that was saved.
        return PeftModel.from_pretrained(getattr(transformers, name).from_pretrained(base, **room), str(folder))
    return AutoPeftModel.from_pretrained(folder, **room)


def find_base(folder: Path, name: str) -> str:
    """The folder of the base model, whose path was saved as it was seen from wherever the training ran, or its name on the Hub.

    Looked for here, from the adapter's folder and those above it, and beside the adapter.

    Raises:
        ShapleyError: the name is a path, and leads nowhere.
    """
    folder, path = folder.resolve(), Path(name)
    is_path = path.is_absolute() or name.startswith((".", "~")) or len(path.parts) > 2
    places = [path, *(above / path for above in (folder, *folder.parents))]
    # What may be a Hub id is not taken for a folder that happens to be called alike.
    places += [folder.parent / path.name] if is_path else []
    found = next((place for place in places if (place / "config.json").is_file()), None)
    if found is not None:
        return name if found == path else str(found)
    if is_path:
        raise ShapleyError(_missing(folder, name))
    return name


def _missing(folder: Path, name: str) -> str:
    return (
        f"The base model {name} of the adapter {folder} is not there. Put its folder beside the adapter, as "
        f"{folder.resolve().parent / Path(name).name}, or write its place as base_model_name_or_path in "
        "adapter_config.json."
    )
