"""What a checkpoint, or a base model before it is wrapped, offers; the self-test is run again for it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any, get_args

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft import get_peft_model, get_peft_model_state_dict
from peft.utils import CONFIG_NAME
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES,
)

from shapadapter import __version__
from shapadapter.adapter import ShapleyConfig
from shapadapter.backbone import Removal, choose_removal, configured_size
from shapadapter.core.errors import ImageError, ShapleyError, UnsupportedModelError
from shapadapter.core.phrases import reason
from shapadapter.core.remote import HUB_ERRORS, hub_trouble, is_path
from shapadapter.data.images import prepare_images
from shapadapter.explanation.game import active_layer
from shapadapter.explanation.passes import base_of
from shapadapter.hub.load import called, comes_with_code, load, locate

SHOWN_CLASSES = 10


@dataclass(frozen=True)
class Inspection:
    """What was found."""

    name: str  # the folder, or the name on the Hub
    adapter: bool  # whether it is an adapter; else a base model, and what wrapping it with the defaults would give
    supported: bool = False  # whether the self-test passed
    trouble: str | None = None  # why not
    family: str | None = None  # transformers' name of the architecture, e.g. "vit"
    model_class: str | None = None  # the class of the base model
    kind: str | None = None  # "classifier", "headless" or "matching"
    # (height, width) of the images that the processor makes, or the model is configured for.
    image: tuple[int, ...] | None = None
    players: tuple[int, int] | None = None  # (rows, cols) on such an image
    mechanism: str | None = None  # how the token works: "sequence", "readout" or "latents"
    features: str | None = None  # the module whose output is explained
    removal: str | None = None  # how absent players are taken out
    removals: dict[str, str] = field(default_factory=dict)  # for each way of it "works", or why it does not
    prediction: str | None = None  # where the logits come from
    tune: str | None = None  # what is trained beside token and head
    lora_targets: tuple[str, ...] = ()  # the modules that LoRA adapts
    parameters: int | None = None  # of the base model
    adapter_parameters: int | None = None  # of the adapter, all that is saved
    adapter_bytes: int | None = None  # their size
    classes: int | None = None  # how many; None for a model that matches images with texts
    class_names: tuple[str, ...] = ()  # the first of them
    base: str | None = None  # the base model's name or folder
    base_revision: str | None = None  # its commit, if that was recorded
    # Of shapadapter, PEFT, transformers and torch here, and of shapadapter when the adapter was written.
    versions: dict[str, str | None] = field(default_factory=dict)
    record: dict[str, Any] | None = None  # what the adapter knows of its training

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as json takes them."""
        return asdict(self)


def inspect(
    name: str | Path,
    *,
    subfolder: str | None = None,
    base: str | Path | None = None,
    revision: str | None = None,
    device: str | None = None,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
) -> Inspection:
    """Load an adapter, or a base model to see what wrapping it would give, and say what it offers.

    Args:
        name: a folder, or a name on the Hub.
        subfolder: where in it the adapter is, as in `load`.
        base: the adapter's base model, as in `load`.
        revision: of the repository.
        device: as in `load`.
        token: for private repositories.
        trust_remote_code: whether a base with code of its own may run it here.

    Raises:
        ShapleyError: there is nothing of that name, or it cannot be loaded.
    """
    options: dict[str, Any] = {"revision": revision, "token": token, "trust_remote_code": trust_remote_code}
    if subfolder is not None or _is_adapter(str(name), revision, token):
        model, processor = load(name, subfolder=subfolder, base=base, device=device, **options)
        return _found(Inspection(called(name, subfolder), True), model, processor)
    start = Inspection(str(name), False, base=str(name), versions=_versions(None))
    try:
        model, processor = _base_model(str(name), options)
        start = replace(start, family=model.config.model_type, model_class=type(model).__name__)
        return _found(start, get_peft_model(model, ShapleyConfig()), processor)
    except UnsupportedModelError as error:
        return replace(start, trouble=str(error))


def _is_adapter(name: str, revision: str | None, token: str | bool | None) -> bool:
    if Path(name).is_dir():
        return (Path(name) / CONFIG_NAME).is_file()
    if is_path(name):
        raise ShapleyError(f"There is no folder {name}.")
    try:
        return bool(hf_hub_download(name, CONFIG_NAME, revision=revision, token=token))
    except EntryNotFoundError:  # also without a network, where it was never asked for
        return False
    except HUB_ERRORS as error:
        raise ShapleyError(f"There is no folder {name} here. {hub_trouble(error, name, revision) or error}") from error


def _base_model(name: str, options: dict[str, Any]) -> tuple[Any, Any]:
    """A base model, as a classifier if there is one of its architecture, and its image processor if there is one."""
    try:
        config = AutoConfig.from_pretrained(name, **options)
        listed = MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES.values()
        names = {one for names in listed for one in ([names] if isinstance(names, str) else names)}
        matching = bool(set(config.architectures or ()) & names)
        classifier = config.model_type in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES and not matching
        # A class in the model's own code, which transformers does not list.
        own = AutoModelForImageClassification.__name__ in (getattr(config, "auto_map", None) or {})
        maker: Any = AutoModelForImageClassification if classifier or own else AutoModel
        model = maker.from_pretrained(name, use_safetensors=True, **options)
    except ImportError as error:
        raise UnsupportedModelError(str(error)) from error
    except Exception as error:  # of a damaged file transformers says what its parsers say, of many kinds
        if "trust_remote_code" in str(error):
            raise ShapleyError(comes_with_code(name)) from error
        trouble = None if Path(name).is_dir() else hub_trouble(error, name, options["revision"])
        if trouble is None:
            below = locate(name, None, options["revision"], options["token"]).elsewhere()
            trouble = f"{reason(error)}{below}"
        raise ShapleyError(f"{name} cannot be loaded. {trouble}") from error
    try:
        return model, AutoImageProcessor.from_pretrained(name, **options)
    except Exception:  # as above; one that needs torchvision, too
        return model, None


def _found(start: Inspection, model: Any, processor: Any) -> Inspection:
    """What a wrapped model offers, after its self-test."""
    base, layer = base_of(model), active_layer(model)
    config, anatomy = model.peft_config[layer.active], layer.anatomy
    saved = get_peft_model_state_dict(model, adapter_name=str(layer.active))
    removals: dict[str, str] = {}
    layer.detach(base)  # the self-test is of the model without the adapter's hooks, as when it was wrapped
    try:
        for removal in get_args(Removal):
            try:
                choose_removal(base, anatomy, removal, config.grid, config.shapley_token)
                removals[removal] = "works"
            except UnsupportedModelError as error:
                removals[removal] = str(error)
    finally:
        layer.attach(base)
    image, players = _players(base, processor)
    matching = anatomy.kind == "matching"
    names = [] if matching else list((config.id2label or base.config.id2label).values())
    how = {"vote": "vote: the sum of the attributions", "classifier": "classifier: the base model's own head"}
    works = removals.get(config.removal) == "works"
    size = sum(value.numel() for value in saved.values())
    return replace(
        start,
        supported=works,
        trouble=None if works else removals.get(config.removal),
        family=base.config.model_type,
        model_class=type(base).__name__,
        kind=anatomy.kind,
        image=image,
        players=players,
        mechanism=anatomy.mechanism,
        features=anatomy.source,
        removal=config.removal,
        removals=removals,
        prediction="similarity of image and text" if matching else how[config.prediction],
        tune=config.tune,
        lora_targets=tuple(sorted(config.target_modules)) if config.tune == "lora" else (),
        parameters=sum(parameter.numel() for parameter in base.parameters()) - size,
        adapter_parameters=size,
        adapter_bytes=sum(value.nbytes for value in saved.values()),
        classes=None if matching else layer.classes,
        class_names=tuple(map(str, names[:SHOWN_CLASSES])),
        base=config.base_model_name_or_path or start.base,
        base_revision=config.revision,
        versions=_versions(config.shapadapter_version if start.adapter else None),
        record=config.record,
    )


def _players(model: Any, processor: Any) -> tuple[tuple[int, ...] | None, tuple[int, int] | None]:
    """(height, width) of a prepared image, and (rows, cols) of the players on it; None where that cannot be said."""
    layer = active_layer(model)
    height, width = configured_size(model) or layer.anatomy.sample
    try:
        if processor is not None:
            inputs = prepare_images([Image.new("RGB", (width, height))], processor)
        else:
            inputs = {"pixel_values": torch.zeros(1, layer.anatomy.channels, height, width, device="cpu")}
        tiling = layer.tiling(**inputs, **layer.anatomy.options)
        return (tiling.seen, tiling.players)
    except ImageError:
        return None, None


def _versions(written_by: str | None) -> dict[str, str | None]:
    here = {name: metadata.version(name) for name in ("peft", "transformers")}
    return {"shapadapter": __version__, "written_by": written_by, **here, "torch": torch.__version__}
