"""The adapter's layer: token and head, driven by hooks on the base model.

Everything lives on the base model, as a child named `shapley`, so that it also works where PEFT throws its tuner away
(`model.add_adapter`, `AutoModelForImageClassification.from_pretrained(adapter)`, `pipeline`).
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from typing_extensions import override

from shapadapter.backbone import Anatomy, Pass, Tiling, carrier_for, named_fields, tile
from shapadapter.errors import ShapleyError
from shapadapter.outputs import ShapleyOutput

from .answer import answer
from .call import ModelCall, without_token
from .coalitions import CoalitionGame, Rules, freeze_statistics
from .config import ShapleyConfig
from .head import ProjectionHead, new_leaves
from .zero import BareParameters

# A separate dict for each leaf: transformers inserts the adapter's name only at the end of such a key.
_PARAMETERS = ("null", "token", "fill")
_MODULES = ("norm", "vote", "patch", "share", "token_norm", "gate", "key", "value", "place", "place_key")


# What a pass needs to know lies on layer and carrier while it runs, so threads take turns.
_ONE_AT_A_TIME = threading.RLock()


def _placed(leaf: nn.Module | nn.Parameter, device: torch.device) -> nn.Module | nn.Parameter:
    if isinstance(leaf, nn.Parameter):
        return nn.Parameter(leaf.detach().to(device))
    # With low_cpu_mem_usage the weights come later, straight from the file.
    return leaf if any(parameter.is_meta for parameter in leaf.parameters()) else leaf.to(device)


class ShapleyLayer(nn.Module, BaseTunerLayer):
    """Token and head of all adapters of one model.

    Args:
        anatomy: where the base model keeps its parts.
    """

    adapter_layer_names = tuple(f"lora_shapley_{leaf}" for leaf in (*_PARAMETERS, *_MODULES))
    other_param_names = ("rules", "tunes")

    def __init__(self, anatomy: Anatomy) -> None:
        super().__init__()
        for leaf in _PARAMETERS:
            setattr(self, f"lora_shapley_{leaf}", BareParameters())
        for leaf in _MODULES:
            setattr(self, f"lora_shapley_{leaf}", nn.ModuleDict({}))
        self.anatomy = anatomy
        self.rules: dict[str, Rules] = {}
        self.tunes: dict[str, str] = {}
        self.carrier = carrier_for(anatomy, self.active_token)
        self._active_adapter: str | list[str] = []
        self._disable_adapters = False
        self.merged_adapters = []
        self._call: ModelCall | None = None
        self._caller: int | None = None
        self._handles: list[Any] = []

    # -- adapters --------------------------------------------------------------------------------------------------

    def add(self, name: str, config: ShapleyConfig, device: torch.device) -> None:
        """Give adapter `name` its parameters, in fp32 on `device`."""
        leaves = new_leaves(
            self.anatomy.width,
            config.num_classes or self.anatomy.classes,
            config.head_width,
            # The base model's own head has no need of a null parameter: it is asked for v(empty).
            null=config.prediction == "vote",
            token=config.shapley_token,
            mechanism=config.mechanism or self.anatomy.mechanism,
            fill=(config.fill_color or [0.0] * self.anatomy.channels) if config.fill == "learned" else None,
        )
        for leaf, value in leaves.items():
            getattr(self, f"lora_shapley_{leaf}")[name] = _placed(value, device)
        self.tunes[name] = config.tune
        self.read_rules(name, config)

    def read_rules(self, name: str, config: ShapleyConfig) -> None:
        """Take over what the config of adapter `name` says about its game."""
        self.rules[name] = Rules(
            prediction=config.prediction,
            classes=config.num_classes or self.anatomy.classes,
            removal=config.removal,
            blur=config.fill == "blur",
            fill_color=None if config.fill_color is None else tuple(config.fill_color),
            grid=config.grid,
            offset=config.cell_offset or (0.0, 0.0),
        )

    @property
    def active(self) -> str | None:
        """Name of the adapter in force, None if there is none or adapters are disabled."""
        names = [name for name in self.active_adapters if name in self.rules]
        return None if self.disable_adapters or not names else names[0]

    @property
    def classes(self) -> int:
        """K of the active adapter, which may have other classes than the base model; with texts P."""
        return self.anatomy.classes if self.active is None else self.rules[self.active].classes

    def active_token(self) -> Tensor | None:
        """The active adapter's token (1, 1, D), None without one."""
        return None if self.active is None else self._parameter("token", self.active)

    def head(self, name: str) -> ProjectionHead:
        """The head of adapter `name`."""
        leaves: dict[str, Any] = {leaf: getattr(self, f"lora_shapley_{leaf}") for leaf in _MODULES}
        # A ModuleDict has no `get`.
        own: dict[str, Any] = {leaf: modules[name] if name in modules else None for leaf, modules in leaves.items()}  # noqa: SIM401
        return ProjectionHead(**own)

    def _parameter(self, leaf: str, name: str) -> Tensor | None:
        parameters: Any = getattr(self, f"lora_shapley_{leaf}")
        return parameters.read(name) if name in parameters else None

    @property
    def travels(self) -> bool:
        """Whether the active adapter's token stands at index 0 inside the blocks."""
        return self.anatomy.mechanism == "sequence" and self.active_token() is not None

    def fill_colour(self) -> Tensor:
        """What the active adapter shows in place of absent pixels where they are not blurred, (C,), as processed."""
        assert self.active is not None
        learned = self._parameter("fill", self.active)
        colour = self.rules[self.active].fill_color or [0.0] * self.anatomy.channels
        return torch.tensor(colour) if learned is None else learned.detach()

    def tiling(self, pixel_values: Tensor, **options: Any) -> Tiling:
        """How the active adapter's players lie on images (B, C, H, W).

        Raises:
            ImageError: the images are not of a kind, or size, that the players can tile.
            ShapleyError: no adapter is active.
        """
        if self.active is None:
            raise ShapleyError("No Shapley adapter is active.")
        rules = self.rules[self.active]
        return tile(self.anatomy, rules.grid, rules.removal, rules.offset, pixel_values, **options)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activate one adapter; the logits can be the sum of one head's attributions only."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        if len(names) > 1:
            raise ShapleyError(f"One Shapley adapter can be active at a time, got {names}.")
        super().set_adapter(names, inference_mode)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Nothing to merge: token and head stay what they are."""

    def unmerge(self) -> None:
        """Nothing to take back."""

    @override
    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # There is no base layer; `add` has put the parameters where the blocks are.
        return None

    # -- hooks -----------------------------------------------------------------------------------------------------

    def attach(self, model: PreTrainedModel) -> None:
        """Hook the model's own forward and, through the carrier, its blocks."""
        self.carrier.attach(model)
        self._handles = [
            model.register_forward_pre_hook(self._before_model, with_kwargs=True),
            # Always called: after an error, too, nothing of the pass may be left.
            model.register_forward_hook(self._after_model, with_kwargs=True, always_call=True),
        ]

    def detach(self) -> None:
        """Take all hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.carrier.detach()

    def _before_model(
        self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self.active is None:
            return args, without_token(kwargs)
        call = ModelCall.of(model, args, kwargs, self.anatomy, self.tiling)
        freeze_statistics(model)
        if torch.compiler.is_compiling():
            self._caller = None  # a compiled graph takes no locks
        else:
            _ONE_AT_A_TIME.acquire()
            self._caller = threading.get_ident()
        self._call = call
        self.carrier.current = Pass(call.tiling.cells[0] * call.tiling.cells[1])
        texts = {} if call.texts is None else call.texts.for_base(call.pixel_values.device)
        return (), {**call.inputs(), **texts, **call.extras, **named_fields(model)}

    def _after_model(
        self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> ShapleyOutput | tuple[Any, ...] | None:
        if self._call is None or not (self._caller is None or self._caller == threading.get_ident()):
            return None  # no adapter is active, or the call was refused before it began
        try:
            return self._explained(model, output) if output is not None else None
        finally:
            self.carrier.current = self._call = None
            if self._caller is not None:
                _ONE_AT_A_TIME.release()

    def _explained(self, model: PreTrainedModel, output: Any) -> ShapleyOutput | tuple[Any, ...]:
        call, current, name = self._call, self.carrier.current, self.active
        if call is None or current is None or current.features is None or name is None:
            raise ShapleyError("The blocks of the model were not run as they were when it was wrapped; wrap it again.")
        self.carrier.current = None
        head = self.head(name)
        game = CoalitionGame(
            model=model,
            anatomy=self.anatomy,
            carrier=self.carrier,
            rules=self.rules[name],
            head=head,
            null=self._parameter("null", name),
            fill=self._parameter("fill", name),
            call=call,
        )
        token = current.token if head.key is None else self.active_token()
        evidence = head.read(current.features, token, call.tiling.cells)
        result = answer(game, evidence, output, travelled=current.token is not None)
        return result if call.return_dict else result.to_tuple()
