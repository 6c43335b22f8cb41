"""What DeepSpeed's ZeRO-3 and accelerate's offload ask of a layer.

Weights are split among the processes, or lie on the CPU or a disk, and are all there for a module's call only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class BareParameters(nn.ParameterDict):
    """Parameters of several adapters that no module computes with."""

    def read(self, name: str) -> Tensor:
        """The parameter of adapter `name`, by a call where something waits for calls."""
        if not (self._forward_pre_hooks or hasattr(self, "_hf_hook")):
            return self[name]
        called: Any = nn.Module.__call__  # ParameterDict's own refuses
        return called(self, name)

    def forward(self, name: str) -> Tensor:
        """A copy, for the parameter itself is empty again when the call returns."""
        return self[name].clone()


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """The weights of a model, whole in every process while the context lasts; changes to them are not kept.

    transformers splits them while it loads a model after `TrainingArguments` of ZeRO-3 were made.
    """
    split = [parameter for parameter in model.parameters() if hasattr(parameter, "ds_id")]
    if not split:
        yield
        return
    import deepspeed  # which is there, as it split them

    with deepspeed.zero.GatheredParameters(split):
        yield
