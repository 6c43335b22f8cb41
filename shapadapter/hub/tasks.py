"""The task "image-attribution" of `transformers.pipeline`: known by name as soon as the package is imported."""

from __future__ import annotations

import json
import os
import tempfile
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from transformers import pipelines
from transformers.pipelines import PIPELINE_REGISTRY

from shapadapter.core.documents import read_json
from shapadapter.core.errors import CheckpointError, ShapleyError
from shapadapter.core.remote import find_base

TASK = "image-attribution"

# What `pipeline()` hands to every model class, and what has no meaning for an adapter: its base has a config of its own.
_IGNORED = ("config", "local_files_only", "code_revision", "_from_pipeline")


class LoadedCheckpoint(NamedTuple):
    """A wrapped model and the processor it was trained with: transformers itself would take the base model's."""

    model: Any
    processor: Any


class CheckpointLoader:
    """What `pipeline()` calls with the name of a model, as it would call `AutoModelForImageClassification`."""

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        dtype: Any = None,
        trust_remote_code: bool | None = None,
        **options: Any,
    ) -> LoadedCheckpoint:
        """Load an adapter by its folder or name, with its base and processor, on the CPU; see `shapadapter.load`."""
        unknown = sorted(set(options) - set(_IGNORED))
        if unknown:
            raise ShapleyError(
                f"pipeline({TASK!r}) cannot load an adapter by its name with {', '.join(unknown)}. Load the model as you "
                "like and pass it: pipeline(task, model=model, image_processor=processor)."
            )
        from shapadapter.hub.load import load

        wanted = None if dtype == "auto" else dtype
        # A folder has no revisions; that of a repository is of the adapter's, whatever transformers resolved it for.
        commit = None if revision is None else getattr(revision, "initial", str(revision))
        trust = bool(trust_remote_code)
        try:
            return LoadedCheckpoint(
                *load(name, revision=commit, token=token, device="cpu", dtype=wanted, trust_remote_code=trust)
            )
        except (OSError, ValueError, TypeError, RuntimeError) as error:
            # Of these, a CheckpointError among them, pipeline() would make a long list of all it tried.
            said = str(error) if isinstance(error, ShapleyError) else f"{name} cannot be loaded: {error}"
            raise ShapleyError(said) from error


def register_task() -> None:
    """Let `pipeline("image-attribution", model=...)` find its class, which is imported when it is used, and the base model."""
    # Not by `register_pipeline`, which takes a class, and lets `save_pretrained` copy its code into the checkpoint.
    PIPELINE_REGISTRY.supported_tasks[TASK] = {
        "impl": "shapadapter.hub.pipeline.ImageAttributionPipeline",
        "pt": (CheckpointLoader,),
        "type": "image",
    }
    module: Any = pipelines
    if not isinstance(module.find_adapter_config_file, partial):
        module.find_adapter_config_file = partial(_find_adapter_config_file, module.find_adapter_config_file)


def _find_adapter_config_file(theirs: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
    """What `pipeline()` opens to read an adapter's base model, with the base's folder as it is found from here.

    `pipeline()` offers no other way: before it asks any class of the task, it loads the base's configuration from the path
    that was saved, and a relative one is relative to where the training ran.
    """
    found, folder = theirs(model, *args, **kwargs), Path(str(model))
    about: dict[str, Any] = {}
    if found is not None:
        with suppress(CheckpointError):
            about = read_json(folder / "adapter_config.json")
    name = about.get("base_model_name_or_path")
    if about.get("peft_type") != "SHAPLEY" or not isinstance(name, str) or (folder / "config.json").is_file():
        return found
    if (base := find_base(folder, name)) == name:
        return found
    with tempfile.TemporaryFile("w+", encoding="utf-8") as file:
        json.dump({**about, "base_model_name_or_path": base}, file)
        file.seek(0)
        return os.dup(file.fileno())  # which it opens and closes as it would a file by its name


register_task()
