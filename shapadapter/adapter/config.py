"""The adapter's configuration: what `adapter_config.json` holds."""
# ruff: noqa: RUF009 - `_option` makes a field

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache, wraps
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal, TypedDict, get_type_hints

import torch
from peft import LoraConfig
from peft.config import PeftConfigMixin
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, PeftType
from torch import nn

from shapadapter.adapter.head import new_leaves
from shapadapter.adapter.saving import prepare_libraries, record_for, save_card
from shapadapter.adapter.weights import Fingerprint, check_weights
from shapadapter.core.documents import Between, FileName, checked, fault, read_json, shown
from shapadapter.core.errors import CheckpointError, FieldError
from shapadapter.core.files import break_links, refuse_links, write_together
from shapadapter.core.phrases import one_line
from shapadapter.core.remote import CARD, PROCESSOR_FILES

Count = Annotated[int, Between(1, 2**24)]


class AutoMapping(TypedDict):
    """Where PEFT finds the class of the base model."""

    base_model_class: str
    parent_library: str


class _Ours(TypedDict):
    peft_type: Literal["SHAPLEY"]


# What PEFT's own type hints leave open, or say too narrowly.
_PEFT_FIELDS: dict[str, Any] = {
    "auto_mapping": AutoMapping | None,
    "base_model_name_or_path": Annotated[str, FileName, Between(0, 4096)] | None,
    "r": Count,
    "lora_alpha": float,
    "lora_dropout": Annotated[float, Between(0, 1)],
    "init_lora_weights": bool | str | None,
    "layers_to_transform": list[Annotated[int, Between(0)]] | Annotated[int, Between(0)] | None,
    "rank_pattern": dict[str, Count],
    "alpha_pattern": dict[str, float],
    "qalora_group_size": Count,
}

WRITTEN = (CARD, CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, *PROCESSOR_FILES)
"""Names of files that are written when an adapter and its processor are saved."""

MEGATRON = "megatron.core"
"""What PEFT writes as megatron_core of every adapter."""


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class ShapleyConfig(LoraConfig):
    """LoRA plus a Shapley token and a projection head: everything a `LoraConfig` takes, and the fields below.

    `target_modules` may stay empty: the query and value projections are then adapted, in convolutional models the
    convolutions. The fields after `head_width` are written when a model is wrapped and checked when the adapter is
    loaded; leave them alone.
    """

    prediction: Literal["vote", "classifier"] = _option(
        "vote",
        "Where the logits come from. 'vote': they are the sum of the attributions, through the projection head. "
        "'classifier': the base model's own head predicts and the attributions are projected on its logits; a new head is "
        "trained (see train_classifier).",
    )
    train_classifier: bool | None = _option(
        None,
        "Whether the base model's own classifier is trained and saved with the adapter, where it predicts. By default only "
        "if it is new, because the base was loaded with other classes or without a classifier; a pretrained one stays as "
        "it is.",
    )
    tune: Literal["lora", "frozen", "full"] = _option(
        "lora",
        "What is trained beside token and head: 'lora' (low-rank updates), 'frozen' (nothing), 'full' (the whole backbone, "
        "saved with the adapter).",
    )
    removal: Literal["auto", "drop", "mask", "pixels"] = _option(
        "auto",
        "How absent players are taken out: 'drop' their tokens, 'mask' their attention keys, replace their 'pixels', or "
        "'auto': drop where that equals masking, else mask, and pixels where there are no tokens.",
    )
    grid: tuple[Count, Count] | None = _option(
        None, "(rows, cols) of the players; by default the patches, or the cells of the final feature map."
    )
    fill: Literal["mean", "blur", "learned"] = _option(
        "mean",
        "What removal='pixels' shows in place of absent players: the 'mean' color of the training images, a 'blur' of the "
        "present pixels around (that color where there are none), or a 'learned' color, which learns from "
        "coalition_task_weight or coalition_gradients.",
    )
    fill_color: list[float] | None = _option(
        None,
        "The mean color, one number for each channel as the image processor scales them; measured on the training images "
        "by ShapleyTrainer if not given, 0 without a trainer.",
    )
    shapley_token: bool = _option(
        True, "Whether a learned read-only token conditions how attributions are shared among players."
    )
    head_width: Count = _option(256, "Width of the head's token-conditioned branch.")
    cell_offset: tuple[float, float] | None = _option(
        None,
        "(down, right) by which the model's cells look beside their place, in cells; measured when a model is wrapped with "
        "a grid of its own.",
    )
    mechanism: Literal["sequence", "readout", "latents"] | None = _option(
        None,
        "How the token works in the base model, written when a model is wrapped: it stands in a 'sequence' of patch tokens, "
        "does a 'readout' of the final feature map, or of 'latents' without a place.",
    )
    problem_type: Literal["regression", "single_label_classification", "multi_label_classification"] | None = _option(
        None, "The base model's problem_type, written when a model is wrapped."
    )
    num_classes: Count | None = _option(None, "K, written when a model is wrapped.")
    id2label: dict[Annotated[int, Between(0)], str] | None = _option(None, "Class names, written likewise.")
    base_fingerprint: Fingerprint | None = _option(
        None, "Numbers by which another base model is recognised, written likewise."
    )
    shapadapter_version: str | None = _option(None, "The version that wrote the adapter.")
    record: dict[str, Any] | None = _option(
        None,
        "What is known of data, training and results, for the model card; written by ShapleyTrainer and update_card.",
    )

    def __new__(cls, *args: Any, **kwargs: Any) -> ShapleyConfig:
        """Refuse fields of a file that are not known here; PEFT would drop them, and load another adapter than was saved.

        PEFT always hands the content of a file over as keywords, with `peft_type` among them.
        """
        if "peft_type" in kwargs and (unknown := sorted(set(kwargs) - {one.name for one in fields(cls)})):
            versions = [one_line(kwargs.get(name), 20) for name in ("shapadapter_version", "peft_version")]
            raise CheckpointError(
                f"adapter_config.json holds {', '.join(shown(name) for name in unknown[:5])}, which ShapleyConfig does not "
                f"know with PEFT {metadata.version('peft')}. It was written by shapadapter {versions[0]} and PEFT "
                f"{versions[1]}: if they are newer, pip install --upgrade shapadapter peft; else delete it from the file."
            )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if isinstance(self.id2label, Mapping):
            # json turns the keys into strings.
            self.id2label = {_as_index(index): label for index, label in self.id2label.items()}
        self.check()
        super().__post_init__()
        prepare_libraries()
        # For the card, and not part of the file: new pictures while they are saved, the folder with those that there are,
        # and what is known of the model when it is saved.
        self.pictures: Mapping[str, bytes] = {}
        self.source: Path | None = None
        self.model_tags: list[str] = []
        self.weights: str | None = None
        self.written_card: tuple[Path, str] | None = None
        # Of the weight file that it was read with: names and shapes.
        self.saved: dict[str, tuple[int, ...]] | None = None
        # LoraConfig sets its own type there.
        self.peft_type = PeftType.SHAPLEY  # type: ignore[attr-defined]
        for name in ("grid", "cell_offset"):
            # json knows no tuples.
            if isinstance(getattr(self, name), list):
                setattr(self, name, tuple(getattr(self, name)))

    def check(self) -> None:
        """Refuse what a field cannot hold.

        Raises:
            FieldError: naming the field, what was expected, and what came.
            CheckpointError: a field would have PEFT import code.
        """
        for name, kind in _kinds().items():
            if trouble := fault(getattr(self, name), kind, name):
                raise FieldError(f"{trouble}.")
        if self.grid is not None and self.grid[0] * self.grid[1] < 2:
            raise FieldError(
                f"grid must be (rows, cols), two whole numbers, of at least two players; got {self.grid!r}."
            )
        if self.task_type is not None:
            raise FieldError(
                f"Leave task_type empty, got {shown(self.task_type)}: PEFT's task types are for language models, and with "
                "one set AutoPeftModel could not load the adapter."
            )
        if self.train_classifier and self.prediction == "vote":
            raise FieldError(
                "train_classifier=True needs prediction='classifier': with 'vote' the adapter's own head predicts, which is "
                "always trained."
            )
        if self.megatron_config is not None or self.megatron_core not in (None, MEGATRON):
            raise CheckpointError(
                f"megatron_config and megatron_core must be left as they are, null and {MEGATRON!r}, in code and in "
                "adapter_config.json: with others, PEFT imports the module that they name."
            )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """Load the configuration; for a local folder, the weights beside it are checked for damage as well.

        Raises:
            CheckpointError: it is damaged or incomplete, or a file in the folder is a link out of it.
        """
        refuse_links(Path(pretrained_model_name_or_path), subfolder or "")
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        folder = Path(pretrained_model_name_or_path) / (subfolder or "")
        if (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
            config.saved = check_weights(folder / SAFETENSORS_WEIGHTS_NAME, config)
            config.source = folder
        return config

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json`, and the model card with its pictures.

        Raises:
            FieldError: a field holds what could not be loaded again.
        """
        self.check()
        break_links(Path(save_directory), WRITTEN)
        folder = Path(save_directory)
        self.record = record_for(self.record, self.weights, folder)
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory() as place:
            super().save_pretrained(place, **kwargs)
            write_together({folder / CONFIG_NAME: (Path(place) / CONFIG_NAME).read_bytes()})
        save_card(self, folder)

    def leaves(self, width: int, classes: int, channels: int = 3) -> dict[str, nn.Module | nn.Parameter]:
        """New parameters of an adapter, by leaf, for features of `width` numbers."""
        return new_leaves(
            width,
            classes,
            self.head_width,
            # The base model's own head has no need of a null parameter: it is asked for v(empty).
            null=self.prediction == "vote",
            token=self.shapley_token,
            mechanism=self.mechanism or "sequence",
            fill=(self.fill_color or [0.0] * channels) if self.fill == "learned" else None,
        )

    def shapes(self, width: int, classes: int) -> dict[str, tuple[int, ...]]:
        """The shapes of an adapter's tensors of token and head, by their names as saved."""
        with torch.device("meta"):
            leaves = self.leaves(width, classes)
        found: dict[str, tuple[int, ...]] = {}
        for leaf, value in leaves.items():
            parts = {"": value} if isinstance(value, nn.Parameter) else value.state_dict(prefix=".")
            found |= {f"lora_shapley_{leaf}{name}": tuple(part.shape) for name, part in parts.items()}
        return found


def _as_index(key: Any) -> Any:
    """The key of a class as a number, where it is one."""
    return int(key) if isinstance(key, str) and len(key) < 10 and key.isascii() and key.isdigit() else key


@cache
def _kinds() -> dict[str, Any]:
    """What each field of a `ShapleyConfig` may hold."""
    hints = get_type_hints(ShapleyConfig, include_extras=True) | _PEFT_FIELDS
    return {own.name: hints[own.name] for own in fields(ShapleyConfig)}


def check_files_when_read() -> None:
    """Have PEFT read `adapter_config.json` through our reader on every road; a second call changes nothing.

    PEFT reads the file before it knows whose adapter it is, and AutoPeftModel and transformers build the configuration
    without asking its class. What can be read and is no adapter of ours is left to PEFT.
    """
    theirs: Any = PeftConfigMixin.from_json_file.__func__  # type: ignore[attr-defined]
    if hasattr(theirs, "_of_shapadapter"):
        return

    @wraps(theirs)
    def from_json_file(cls: type, path_json_file: str, **kwargs: Any) -> Any:
        """The content of the file, after a look at it and at the weights beside it."""
        path = Path(path_json_file)
        check_files(path, read_json(path))
        return theirs(cls, path_json_file, **kwargs)

    from_json_file._of_shapadapter = True  # type: ignore[attr-defined]
    PeftConfigMixin.from_json_file = classmethod(from_json_file)  # type: ignore[assignment,method-assign,arg-type]


def check_files(path: Path, content: Mapping[str, Any]) -> None:
    """Refuse a configuration of ours with values that cannot be, and weights beside it that do not fit it."""
    if content.get("peft_type") != PeftType.SHAPLEY.value:  # type: ignore[attr-defined]
        if "shapadapter_version" in content:
            checked(content, _Ours, path)
        return
    known = {own.name for own in fields(ShapleyConfig)} - {"peft_type", "runtime_config"}
    try:
        config = ShapleyConfig(**{name: value for name, value in content.items() if name in known})
    except (ValueError, TypeError, LookupError, AttributeError, ImportError, RuntimeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    weights = path.parent / SAFETENSORS_WEIGHTS_NAME
    if weights.exists():
        check_weights(weights, config)
