"""Load an adapter from a folder or from the Hub, with the base model it names and the processor of either."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import HfApi
from peft import PeftModel
from transformers import AutoImageProcessor, AutoModelForImageClassification, AutoProcessor, PreTrainedModel

from shapadapter.core.errors import CheckpointError, ShapleyError
from shapadapter.core.files import refuse_link
from shapadapter.core.phrases import argument, reason
from shapadapter.core.remote import HUB_ERRORS, find_base, hub_trouble, is_path
from shapadapter.data.processors import load_processor
from shapadapter.explanation.game import active_layer
from shapadapter.hub.locate import AdapterFiles, locate


def load(
    checkpoint: str | Path,
    *,
    subfolder: str | None = None,
    base: str | Path | None = None,
    revision: str | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """Load an adapter on its base model, and the processor that goes with them.

    Weights are read from safetensors only. From the Hub come the adapter's two files, the processor's, and the base model.

    Args:
        checkpoint: the folder of an adapter, or its name on the Hub.
        subfolder: where in it the adapter is, if not at the top: PEFT saves one of another name than "default" in a folder
            of that name.
        base: the base model's folder or name on the Hub, where that is not what the adapter says. Its weights must be the
            same.
        revision: branch, tag or commit of the adapter's repository; that of the base is written in the adapter.
        device: e.g. `"cpu"` or `"cuda:1"`; None for the GPU if there is one.
        dtype: of the base's weights, e.g. `torch.bfloat16` or `"bfloat16"`; None as they were saved. The adapter's own
            stay as they are.
        token: for private repositories; None for that of `hf auth login`.
        trust_remote_code: whether a base with code of its own on the Hub may run it here.

    Returns:
        The wrapped model, in eval mode, and its image processor; for a model that matches images with texts, the
        processor of both.

    Raises:
        ShapleyError: there is no such adapter or base model, it may not be seen, or its weights are no safetensors.
        CheckpointError: a file is damaged or a link out of its folder, or the base is not the one of the adapter.
    """
    place, kind = _device(device), _dtype(dtype)
    files = locate(str(checkpoint), subfolder, revision, token)
    config = files.config()
    root, recorded = _root(files, config, base)
    commit = _pinned(files.name, root, recorded, token)
    options: dict[str, Any] = {"revision": commit, "token": token, "trust_remote_code": trust_remote_code}
    base_model = _base_model(files.name, root, config, {**options, "dtype": kind})
    try:
        model = PeftModel.from_pretrained(base_model, str(files.folder)).eval()
    except ShapleyError:
        raise
    except Exception as error:  # whatever PEFT makes of values that are of the right kind and mean nothing to it
        raise CheckpointError(
            f"The adapter {files.name} does not fit its base model {root}: {reason(error)}"
        ) from error
    own = files.processor()
    # Code that comes with an adapter never runs: what is trusted is the base.
    options = options if own is None else {"trust_remote_code": False}
    return model.to(place), _processor(model, str(own or root), options, own is not None)


def _root(files: AdapterFiles, config: Any, base: str | Path | None) -> tuple[str, str | None]:
    """Where the base model is, and its revision if it is the one the adapter recorded."""
    if base is not None:
        if is_path(str(base)) and not (Path(base) / "config.json").is_file():
            raise ShapleyError(f"{argument('base', str(base))} holds no model: expected config.json in it.")
        return str(base), None
    recorded = config.base_model_name_or_path
    if not recorded:
        raise ShapleyError(
            f"The adapter {files.name} does not name its base model. Say where it is: {argument('base')}"
        )
    if not files.fetched:
        try:
            return find_base(files.folder, str(recorded)), config.revision
        except ShapleyError as error:
            raise ShapleyError(f"{error} Or say where it is: {argument('base')}") from error
    if is_path(str(recorded)):
        raise ShapleyError(
            f"The adapter {files.name} names as its base model {recorded}, a local folder on its author's machine. If "
            f"you have that model, say where: {argument('base')} Its author can push both: push(folder, repo_id, base_repo_id=...) "
            "of shapadapter.hub."
        )
    return str(recorded), config.revision


def _pinned(name: str, root: str, revision: str | None, token: str | bool | None) -> str | None:
    """The commit of the base model, so that all its files are of the same one; None for a folder, without links out of it."""
    folder = Path(root)
    if folder.is_dir():
        for path in folder.iterdir():
            # Weights are nobody's secret if the adapter was made for them.
            if path.suffix != ".safetensors" and not path.is_dir():
                refuse_link(path, folder)
        return None
    try:
        return HfApi().resolve_revision(root, revision=revision, token=token).resolved
    except HUB_ERRORS as error:
        raise ShapleyError(_why_no_base(name, root, revision, error)) from error


def _base_model(name: str, root: str, config: Any, options: dict[str, Any]) -> Any:
    """The base model, without the adapter."""
    # A new classifier is saved with the adapter; the base model must have room for its classes.
    new_head = config.prediction == "classifier" and config.modules_to_save
    room = {"num_labels": config.num_classes, "ignore_mismatched_sizes": True} if new_head else {}
    maker = getattr(transformers, (config.auto_mapping or {}).get("base_model_class", ""), None)
    if not (isinstance(maker, type) and issubclass(maker, PreTrainedModel)):
        maker = AutoModelForImageClassification
    try:
        return maker.from_pretrained(root, use_safetensors=True, **room, **options)
    except Exception as error:  # of a damaged file transformers says what its parsers say, of many kinds
        raise ShapleyError(_why_no_base(name, root, options["revision"], error)) from error


def _why_no_base(name: str, root: str, revision: str | None, error: BaseException) -> str:
    trouble = None if Path(root).is_dir() else hub_trouble(error, root, revision)
    if trouble is not None:
        remedy = (
            f"If its weights are unchanged elsewhere, {argument('base', root, of='load')} takes its newest revision."
            if "has no revision" in trouble
            else f"Put its folder beside the adapter, or say where it is: {argument('base')}"
        )
        return f"The base model {root} of the adapter {name} is not there. {trouble} {remedy}"
    if "safetensors" in str(error):
        return (
            f"The base model {root} has no safetensors file, and pickles are not read. Convert it once, if you trust it: "
            f"AutoModelForImageClassification.from_pretrained({root!r}).save_pretrained('base'), its processor likewise; "
            f"then {argument('base', 'base', of='load')}."
        )
    if "trust_remote_code" in str(error):
        return comes_with_code(root)
    return f"The base model {root} of the adapter {name} cannot be loaded: {reason(error)}"


def comes_with_code(base: str) -> str:
    """What to say where transformers refuses to run the code of a base model."""
    return (
        f"The base model {base} comes with code of its own, which would run here. Read it, and if you trust it, "
        f"{argument('trust_remote_code', True, of='load')}."
    )


def _processor(model: Any, place: str, options: dict[str, Any], adapters_own: bool) -> Any:
    """The processor in a folder or a repository, the adapter's or the base model's."""
    maker: Any = AutoProcessor if active_layer(model).anatomy.kind == "matching" else AutoImageProcessor
    try:
        return load_processor(place, maker, **options)
    except ShapleyError:
        raise
    except Exception as error:  # as above
        hub_trouble(error, place)  # for the credentials in it
        if "trust_remote_code" not in str(error):
            raise ShapleyError(
                f"There is no image processor with the adapter or in {place}: {reason(error)} Save one with the "
                "adapter: processor.save_pretrained(folder)."
            ) from error
        if not adapters_own:
            raise ShapleyError(comes_with_code(place)) from error
        raise ShapleyError(
            f"The image processor in {place} comes with code of its own, which is not run. Save one of transformers' with "
            "the adapter: processor.save_pretrained(folder)."
        ) from error


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ShapleyError(f"There is no device {str(device)!r} here: {reason(error)}") from error


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | str:
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ShapleyError(f"dtype must be a torch.dtype or its name, such as 'bfloat16', got {dtype!r}.")
    return found if isinstance(found, torch.dtype) else "auto"
