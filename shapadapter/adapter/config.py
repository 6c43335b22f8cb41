"""The adapter's configuration: what `adapter_config.json` holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from peft import LoraConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, PeftType
from safetensors import SafetensorError, safe_open

from shapadapter.atomic import write_together
from shapadapter.card import read_pictures, settled, write_card
from shapadapter.errors import CheckpointError


@dataclass
class ShapleyConfig(LoraConfig):
    """LoRA plus a Shapley token and a projection head: everything a `LoraConfig` takes, and the fields below.

    `target_modules` may stay empty: the query and value projections are then adapted, in convolutional models the
    convolutions. The fields after `head_width` are written when a model is wrapped and checked when the adapter is
    loaded; leave them alone.
    """

    prediction: Literal["vote", "classifier"] = field(
        default="vote",
        metadata={
            "help": "Where the logits come from. 'vote': they are the sum of the attributions, through the projection "
            "head. 'classifier': the base model's own head predicts and the attributions are projected on its logits; "
            "with a new head, add modules_to_save=['classifier']."
        },
    )
    tune: Literal["lora", "frozen", "full"] = field(
        default="lora",
        metadata={
            "help": "What is trained beside token and head: 'lora' (low-rank updates), 'frozen' (nothing), 'full' "
            "(the whole backbone, saved with the adapter)."
        },
    )
    removal: Literal["auto", "drop", "mask", "pixels"] = field(
        default="auto",
        metadata={
            "help": "How absent players are taken out: 'drop' their tokens, 'mask' their attention keys, replace their "
            "'pixels', or 'auto': drop where that equals masking, else mask, and pixels where there are no tokens."
        },
    )
    grid: tuple[int, int] | None = field(
        default=None,
        metadata={
            "help": "(rows, cols) of the players; by default the patches, or the cells of the final feature map."
        },
    )
    fill: Literal["mean", "blur", "learned"] = field(
        default="mean",
        metadata={
            "help": "What removal='pixels' shows in place of absent players: the 'mean' colour of the training images, "
            "a 'blur' of the present pixels around (that colour where there are none), or a 'learned' colour, which "
            "learns from coalition_task_weight or coalition_gradients."
        },
    )
    fill_color: list[float] | None = field(
        default=None,
        metadata={
            "help": "The mean colour, one number for each channel as the image processor scales them; measured on the "
            "training images by ShapleyTrainer if not given, 0 without a trainer."
        },
    )
    shapley_token: bool = field(
        default=True,
        metadata={"help": "Whether a learned read-only token conditions how attributions are shared among players."},
    )
    head_width: int = field(default=256, metadata={"help": "Width of the head's token-conditioned branch."})
    cell_offset: tuple[float, float] | None = field(
        default=None,
        metadata={
            "help": "(down, right) by which the model's cells look beside their place, in cells; measured when a model "
            "is wrapped with a grid of its own."
        },
    )
    mechanism: Literal["sequence", "readout", "latents"] | None = field(
        default=None,
        metadata={
            "help": "How the token works in the base model, written when a model is wrapped: it travels through a "
            "'sequence' of patch tokens, does a 'readout' of the final feature map, or of 'latents' without a place."
        },
    )
    problem_type: str | None = field(
        default=None, metadata={"help": "The base model's problem_type, written when a model is wrapped."}
    )
    num_classes: int | None = field(default=None, metadata={"help": "K, written when a model is wrapped."})
    id2label: dict[int, str] | None = field(default=None, metadata={"help": "Class names, written likewise."})
    base_fingerprint: dict[str, Any] | None = field(
        default=None, metadata={"help": "Numbers by which another base model is recognised, written likewise."}
    )
    shapadapter_version: str | None = field(default=None, metadata={"help": "The version that wrote the adapter."})
    record: dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "What is known of data, training and results, for the model card; written by ShapleyTrainer and "
            "update_card."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        # For the card, and not part of the file: pictures by name, and what the model says of itself when it is saved.
        self.pictures: dict[str, bytes] = {}
        self.model_tags: list[str] = []
        self.weights: str | None = None
        self.written_card: tuple[Path, str] | None = None
        # LoraConfig sets its own type there.
        self.peft_type = PeftType.SHAPLEY  # type: ignore[attr-defined]
        for name, allowed in (
            ("prediction", ("vote", "classifier")),
            ("tune", ("lora", "frozen", "full")),
            ("removal", ("auto", "drop", "mask", "pixels")),
            ("fill", ("mean", "blur", "learned")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {list(allowed)}, got {getattr(self, name)!r}.")
        if self.task_type is not None:
            raise ValueError(
                f"Leave task_type empty, got {self.task_type!r}: PEFT's task types are for language models, and with "
                "one set AutoPeftModel could not load the adapter."
            )
        for name in ("grid", "cell_offset"):
            # json knows no tuples.
            if isinstance(getattr(self, name), list):
                setattr(self, name, tuple(getattr(self, name)))
        if self.grid is not None and not _is_grid(self.grid):
            raise ValueError(
                f"grid must be (rows, cols), two whole numbers, of at least two players; got {self.grid!r}."
            )
        if self.id2label is not None:
            # json turns the keys into strings.
            self.id2label = {int(index): label for index, label in self.id2label.items()}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """Load the configuration; for a local folder, the weights beside it are checked for damage as well.

        Raises:
            CheckpointError: it is damaged or incomplete.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        path = Path(pretrained_model_name_or_path) / (subfolder or "") / SAFETENSORS_WEIGHTS_NAME
        if path.is_file():
            check_weights(path, config.tensors())
            config.pictures = read_pictures(path.parent, config.to_dict())
        return config

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json`, and the model card with its pictures."""
        self.record = settled(self.record, self.weights, Path(save_directory))
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory() as place:
            super().save_pretrained(place, **kwargs)
            write_together({folder / CONFIG_NAME: (Path(place) / CONFIG_NAME).read_bytes()})
        self.write_card(save_directory)

    def write_card(self, folder: str | Path) -> None:
        """Write, or renew, the model card in the adapter's folder; see `shapadapter.card`."""
        text = write_card(Path(folder), self.to_dict(), pictures=self.pictures, tags=self.model_tags)
        self.written_card = None if text is None else (Path(folder).resolve(), text)

    def tensors(self) -> list[str]:
        """Names, as saved, of the tensors of token and head that an adapter of this configuration has."""
        names = ["norm.weight", "norm.bias", "vote.weight", "patch.weight", "patch.bias", "share.weight"]
        names += ["null"] if self.prediction == "vote" else []
        if self.shapley_token:
            names += ["token", "token_norm.weight", "token_norm.bias", "gate.weight", "gate.bias"]
        if self.shapley_token and self.mechanism in ("readout", "latents"):
            names += ["key.weight", "key.bias", "value.weight", "value.bias"]
        if self.mechanism == "latents":
            names += ["place.weight", "place.bias", "place_key.weight"]
        if self.fill == "learned":
            names += ["fill"]
        return [f"lora_shapley_{name}" for name in names]


def _is_grid(grid: Any) -> bool:
    whole = isinstance(grid, tuple) and len(grid) == 2 and all(type(count) is int and count > 0 for count in grid)
    return whole and grid[0] * grid[1] > 1


def check_weights(path: Path, expected: list[str]) -> None:
    """Refuse a safetensors file that is damaged, or lacks part of token and head, which would stay random.

    Raises:
        CheckpointError: the file is not what its header announces, or a part is missing.
    """
    try:
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is damaged ({error}): the copy or download was cut off, or it was changed. Fetch the file again."
        ) from error
    missing = [name for name in expected if not any(key.endswith(f".{name}") for key in keys)]
    if missing:
        raise CheckpointError(
            f"{path} lacks {len(missing)} of {len(expected)} tensors of token and head, e.g. {missing[0]}. It was not "
            "written by shapadapter, or not with the configuration beside it."
        )
