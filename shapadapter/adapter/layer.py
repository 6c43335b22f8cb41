"""The adapter's layer: token and head, driven by hooks on the base model.

Everything lives on the base model, as a child named `shapley`, so that it also works where PEFT throws its tuner away
(`model.add_adapter`, `AutoModelForImageClassification.from_pretrained(adapter)`, `pipeline`).
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from shapadapter.backbone import Anatomy, Pass, TokenCarrier
from shapadapter.errors import ShapleyError
from shapadapter.objective import project_on_efficiency
from shapadapter.outputs import ShapleyOutput

from .call import ModelCall, coalition_runs, without_token
from .config import ShapleyConfig
from .head import ProjectionHead, new_leaves

# A separate dict for each leaf: transformers inserts the adapter's name only at the end of such a key.
_PARAMETERS = ("null", "token")
_MODULES = ("norm", "vote", "patch", "share", "token_norm", "gate")


# What a pass needs to know lies on layer and carrier while it runs, so threads take turns.
_ONE_AT_A_TIME = threading.RLock()


@dataclass(frozen=True)
class Settings:
    """What an adapter's config says about its forward pass."""

    prediction: str
    removal: Any
    tune: str


def _placed(leaf: nn.Module | nn.Parameter, device: torch.device) -> nn.Module | nn.Parameter:
    if isinstance(leaf, nn.Parameter):
        return nn.Parameter(leaf.detach().to(device))
    # With low_cpu_mem_usage the weights come later, straight from the file.
    return leaf if any(parameter.is_meta for parameter in leaf.parameters()) else leaf.to(device)


class ShapleyLayer(nn.Module, BaseTunerLayer):
    """Token and head of all adapters of one model.

    Args:
        anatomy: where the base model keeps blocks and players.
    """

    adapter_layer_names = tuple(f"lora_shapley_{leaf}" for leaf in (*_PARAMETERS, *_MODULES))
    other_param_names = ("settings",)

    def __init__(self, anatomy: Anatomy) -> None:
        super().__init__()
        for leaf in _PARAMETERS:
            setattr(self, f"lora_shapley_{leaf}", nn.ParameterDict({}))
        for leaf in _MODULES:
            setattr(self, f"lora_shapley_{leaf}", nn.ModuleDict({}))
        self.anatomy = anatomy
        self.settings: dict[str, Settings] = {}
        self.carrier = TokenCarrier(anatomy, self.active_token)
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
            self.anatomy.classes,
            config.head_width,
            # The base model's own head has no need of a null parameter: it is asked for v(empty).
            null=config.prediction == "vote",
            token=config.shapley_token,
        )
        for leaf, value in leaves.items():
            getattr(self, f"lora_shapley_{leaf}")[name] = _placed(value, device)
        self.settings[name] = Settings(config.prediction, config.removal, config.tune)

    @property
    def active(self) -> str | None:
        """Name of the adapter in force, None if there is none or adapters are disabled."""
        names = [name for name in self.active_adapters if name in self.settings]
        return None if self.disable_adapters or not names else names[0]

    def active_token(self) -> Tensor | None:
        """The active adapter's token (1, 1, D), None without one."""
        name = self.active
        tokens: Any = self.lora_shapley_token
        return tokens[name] if name is not None and name in tokens else None

    def head(self, name: str) -> ProjectionHead:
        """The head of adapter `name`."""
        leaves: dict[str, Any] = {leaf: getattr(self, f"lora_shapley_{leaf}") for leaf in _MODULES}
        # A ModuleDict has no `get`.
        own: dict[str, Any] = {leaf: modules[name] if name in modules else None for leaf, modules in leaves.items()}  # noqa: SIM401
        return ProjectionHead(**own)

    def _null(self, name: str) -> Tensor:
        nulls: Any = self.lora_shapley_null
        return nulls[name]  # (K,)

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
        call = ModelCall.of(model, args, kwargs, self.anatomy)
        if torch.compiler.is_compiling():
            self._caller = None  # a compiled graph takes no locks
        else:
            _ONE_AT_A_TIME.acquire()
            self._caller = threading.get_ident()
        self._call = call
        self.carrier.current = Pass(call.players)
        return (), {"pixel_values": call.pixel_values, **call.options, **call.extras}

    def _after_model(
        self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> ShapleyOutput | tuple[Any, ...] | None:
        if self._call is None or self._caller not in (None, threading.get_ident()):
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
        contributions = self.head(name).contributions(current.features, current.token, call.players)  # (B, N, K)
        if self.settings[name].prediction == "vote":
            null = self._null(name).float().expand(contributions.shape[0], -1)  # (B, K)
            attributions = contributions
            logits = null + attributions.sum(dim=1)  # (B, K)
        else:
            logits = output.logits
            null = self._empty_value(model, call, name).expand(logits.shape[0], -1)  # (B, K)
            # Attributions describe the prediction and must not move it: no gradient through the logits here.
            attributions = project_on_efficiency(contributions, logits.detach().float(), null)
        result = ShapleyOutput(
            loss=None if call.labels is None else model.loss_function(call.labels, logits, model.config),
            logits=logits,
            attributions=attributions,
            null_values=null,
            coalition_values=self._coalition_values(model, call, name),
            hidden_states=call.base_states(output.hidden_states),
            attentions=output.attentions,
        )
        return result if call.return_dict else result.to_tuple()

    # -- the game ----------------------------------------------------------------------------------------------------

    def _value(self, model: PreTrainedModel, call: ModelCall, name: str, images: Tensor, present: Tensor) -> Tensor:
        """v(S) of `images` (R, C, H, W) with the players `present` (R, s): (R, K) fp32."""
        settings = self.settings[name]
        with self.carrier.passing(Pass(call.players, present, settings.removal)) as current:
            # `forward`, not a call: the hooks on the model would start a pass of their own.
            logits = model.forward(pixel_values=images, return_dict=True, **call.options).logits
        if settings.prediction == "classifier":
            return logits.float()
        assert current.features is not None
        # Detached: as part of a target, the null value stands on both sides of the Shapley loss.
        null = self._null(name).float().detach()  # (K,)
        return null + self.head(name).votes(current.features, call.players)

    def _empty_value(self, model: PreTrainedModel, call: ModelCall, name: str) -> Tensor:
        """v(empty), (1, K): no pixel enters, so one image stands for all."""
        nobody = torch.empty(1, 0, dtype=torch.long, device=call.pixel_values.device)
        with call.targets(model, gradient=False):
            return self._value(model, call, name, call.pixel_values[:1], nobody)

    def _coalition_values(self, model: PreTrainedModel, call: ModelCall, name: str) -> Tensor | None:
        """v(S) of every coalition, (B, M, K) fp32."""
        if call.coalitions is None:
            return None
        order, values = [], []
        with call.targets(model, gradient=call.coalition_grad):
            for rows, images, present in coalition_runs(call.coalitions):
                order.append(rows)
                values.append(self._value(model, call, name, call.pixel_values[images], present))
        if not values:
            return call.pixel_values.new_zeros(*call.coalitions.shape[:2], self.anatomy.classes, dtype=torch.float32)
        # (B * M, K), back from order of size to order of the coalitions
        flat = torch.cat(values).index_select(0, torch.cat(order).argsort())
        return flat.unflatten(0, call.coalitions.shape[:2])
