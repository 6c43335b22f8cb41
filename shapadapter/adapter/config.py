"""The adapter's configuration: what `adapter_config.json` holds."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME, PeftType

from ..errors import CheckpointError


@dataclass
class ShapleyConfig(LoraConfig):
    """LoRA plus a Shapley token and a projection head: everything a `LoraConfig` takes, and the fields below.

    `target_modules` may stay empty: the query and value projections are then adapted. The last four fields are written
    when a model is wrapped and checked when the adapter is loaded; leave them alone.
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
            "help": "What is trained beside token and head: 'lora' (low-rank updates), 'frozen' (nothing), 'full' (the "
            "whole backbone, saved with the adapter)."
        },
    )
    removal: Literal["auto", "drop", "mask"] = field(
        default="auto",
        metadata={
            "help": "How absent players are taken out: 'drop' their tokens, 'mask' their attention keys, or 'auto': "
            "drop where that equals masking."
        },
    )
    shapley_token: bool = field(
        default=True,
        metadata={"help": "Whether a learned read-only token conditions how attributions are shared among players."},
    )
    head_width: int = field(default=64, metadata={"help": "Width of the head's token-conditioned branch."})
    num_classes: int | None = field(default=None, metadata={"help": "K, written when a model is wrapped."})
    id2label: dict[int, str] | None = field(default=None, metadata={"help": "Class names, written likewise."})
    base_fingerprint: list[float] | None = field(
        default=None, metadata={"help": "Norms of the base model's blocks, by which another base is recognised."}
    )
    shapadapter_version: str | None = field(default=None, metadata={"help": "The version that wrote the adapter."})

    def __post_init__(self) -> None:
        super().__post_init__()
        # LoraConfig sets its own type there.
        self.peft_type = PeftType.SHAPLEY  # type: ignore[attr-defined]
        for name, allowed in (
            ("prediction", ("vote", "classifier")),
            ("tune", ("lora", "frozen", "full")),
            ("removal", ("auto", "drop", "mask")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {list(allowed)}, got {getattr(self, name)!r}.")
        if self.task_type is not None:
            raise ValueError(
                f"Leave task_type empty, got {self.task_type!r}: PEFT's task types are for language models, and with "
                "one set AutoPeftModel could not load the adapter."
            )
        if self.id2label is not None:
            # json turns the keys into strings.
            self.id2label = {int(index): label for index, label in self.id2label.items()}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """Load the configuration; for a local folder, the weights beside it are checked for damage as well.

        Raises:
            CheckpointError: the weight file is cut off.
        """
        check_weights(Path(pretrained_model_name_or_path) / (subfolder or "") / SAFETENSORS_WEIGHTS_NAME)
        return super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)


def check_weights(path: Path) -> None:
    """Refuse a safetensors file that is shorter or longer than its own header says; a missing file passes.

    Raises:
        CheckpointError: the file is damaged.
    """
    if not path.is_file():
        return
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        header = struct.unpack("<Q", start)[0] if len(start) == 8 else None
        ends = [] if header is None or 8 + header > size else _data_ends(file.read(header))
    if header is None or 8 + header > size or not ends or 8 + header + max(ends) != size:
        raise CheckpointError(
            f"{path} is damaged: it has {size} bytes, which is not what its header announces. The copy or download "
            "was cut off; fetch the file again."
        )


def _data_ends(header: bytes) -> list[int]:
    import json

    try:
        entries = json.loads(header)
        return [int(entry["data_offsets"][1]) for name, entry in entries.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError):
        return []
