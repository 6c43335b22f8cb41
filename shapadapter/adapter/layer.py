"""The adapter's layer: token and head, and the forward of the model that holds them."""

from __future__ import annotations

import functools
from typing import Any

import torch
from peft.functional import set_adapter
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from typing_extensions import override

from shapadapter.adapter.answer import answer
from shapadapter.adapter.call import ModelCall, without_ours
from shapadapter.adapter.checks import MIXED, check_agreement, check_one
from shapadapter.adapter.coalitions import CoalitionGame, Rules, freeze_statistics
from shapadapter.adapter.config import ShapleyConfig
from shapadapter.adapter.head import ProjectionHead
from shapadapter.backbone import (
    Anatomy,
    FeatureHooks,
    ForwardCall,
    Tiling,
    base_forward,
    base_is_asked,
    replace_forward,
    restore_forward,
    tile,
)
from shapadapter.core.errors import ShapleyError

CHILD = "shapley"
"""The name of the adapter's layer among the children of the base model."""

# A separate dict for each leaf: transformers inserts the adapter's name only at the end of such a key.
_PARAMETERS = ("null", "token", "fill")
_MODULES = ("norm", "vote", "patch", "share", "token_norm", "gate", "key", "value", "place", "place_key")


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


class _NoLoraPairs:
    """Stands where LoRA layers tell their scaling, and refuses `create_lorafa_optimizer`, which asks for it.

    It takes all parameters whose names have "lora" in them two by two, as A and B.
    """

    def __init__(self, parts: list[Any]) -> None:
        self.parts = parts

    def __contains__(self, name: str) -> bool:
        for part in self.parts:  # it has frozen A before it asks
            for adapter, a in getattr(part, "lora_A", {}).items():
                a.requires_grad_(next(part.lora_B[adapter].parameters()).requires_grad)
        raise ShapleyError(
            "create_lorafa_optimizer cannot train a Shapley adapter: it would take token and head for pairs of LoRA "
            "matrices. Use torch.optim.AdamW, or create_loraplus_optimizer of peft.optimizers."
        )


class ShapleyLayer(nn.Module, BaseTunerLayer):
    """Token and head of all adapters of one model."""

    adapter_layer_names = tuple(f"lora_shapley_{leaf}" for leaf in (*_PARAMETERS, *_MODULES))
    other_param_names = ("rules", "configs")

    def __init__(self, anatomy: Anatomy) -> None:
        super().__init__()
        for leaf in _PARAMETERS:
            setattr(self, f"lora_shapley_{leaf}", BareParameters())
        for leaf in _MODULES:
            setattr(self, f"lora_shapley_{leaf}", nn.ModuleDict({}))
        self.anatomy = anatomy
        self.rules: dict[str, Rules] = {}
        self.configs: dict[str, ShapleyConfig] = {}
        self.hooks = FeatureHooks(anatomy, self.active_token)
        self._active_adapter: str | list[str] = []
        self._disable_adapters = False
        self._forward: Any = None
        self._parts: list[Any] = []  # LoRA and copies of `modules_to_save`, which have to be of the head's adapter
        self._base_config: Any = None

    # -- adapters --------------------------------------------------------------------------------------------------

    def add(self, name: str, config: ShapleyConfig, device: torch.device) -> None:
        """Give adapter `name` its parameters, in fp32 on `device`."""
        with torch.device("cpu"):  # the same numbers whatever device is the default
            leaves = config.leaves(
                self.anatomy.width, config.num_classes or self.anatomy.classes, self.anatomy.channels
            )
        for leaf, value in leaves.items():
            if isinstance(value, nn.Parameter):
                value = nn.Parameter(value.detach().to(device))
            elif not any(parameter.is_meta for parameter in value.parameters()):
                value.to(device)
            # else, with low_cpu_mem_usage, the weights come later, straight from the file
            getattr(self, f"lora_shapley_{leaf}")[name] = value
        self.configs[name] = config
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
        return ProjectionHead(**{leaf: modules[name] for leaf, modules in leaves.items() if name in modules})

    def _parameter(self, leaf: str, name: str) -> Tensor | None:
        parameters: Any = getattr(self, f"lora_shapley_{leaf}")
        return parameters.read(name) if name in parameters else None

    @property
    def token_in_sequence(self) -> bool:
        """Whether the active adapter's token stands at index 0 inside the blocks."""
        return self.anatomy.mechanism == "sequence" and self.active_token() is not None

    def fill_color(self) -> Tensor:
        """What the active adapter shows in place of absent pixels where they are not blurred, (C,), as processed."""
        assert self.active is not None
        learned = self._parameter("fill", self.active)
        color = self.rules[self.active].fill_color or [0.0] * self.anatomy.channels
        return torch.tensor(color, device="cpu") if learned is None else learned.detach()

    def tiling(self, pixel_values: Tensor, **options: Any) -> Tiling:
        """How the active adapter's players lie on images (B, C, H, W)."""
        if self.active is None:
            raise ShapleyError("No Shapley adapter is active.")
        rules = self.rules[self.active]
        return tile(self.anatomy, rules.grid, rules.removal, rules.offset, pixel_values, **options)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activate one adapter, and give the base model's config its task and classes."""
        names, before = check_one(adapter_names), self.active_adapters
        super().set_adapter(names, inference_mode)
        if names == before or self.anatomy.kind == "matching":
            return
        base = self._base_config
        left, own = (self.configs.get("".join(adapters)) for adapters in (before, names))
        if left is not None and left.problem_type is None:
            left.problem_type = base.problem_type  # transformers decided it by the first labels
        if own is not None:
            base.problem_type = own.problem_type
        if own is not None and own.id2label:
            base.id2label = dict(own.id2label)
            base.label2id = {label: index for index, label in own.id2label.items()}

    def enable_adapters(self, enabled: bool) -> None:
        """Enable or disable all adapters; copies of `modules_to_save` as well, which transformers does not enable again."""
        super().enable_adapters(enabled)
        for part in self._parts:
            if isinstance(part, AuxiliaryTrainingWrapper):
                part.enable_adapters(enabled)

    @property
    def merged_adapters(self) -> list[str]:  # type: ignore[override]
        """Names of the adapters whose LoRA is folded into the base weights."""
        return next((part.merged_adapters for part in self._parts if part.merged_adapters), [])

    @property
    def scaling(self) -> _NoLoraPairs:
        """Refuses to be asked for the scaling of an adapter, which only LoRA has."""
        return _NoLoraPairs(self._parts)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Nothing to merge: token and head stay what they are."""

    def unmerge(self) -> None:
        """Nothing to take back."""

    @override
    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # There is no base layer; `add` has put the parameters where the blocks are.
        return None

    # -- one call --------------------------------------------------------------------------------------------------

    def attach(self, model: PreTrainedModel) -> None:
        """Take the place of the model's own forward and `set_adapter` and, through its hooks, see its blocks."""
        self.hooks.attach(model)
        self._base_config = model.config
        self._parts = [m for m in model.modules() if isinstance(m, LoraLayer | AuxiliaryTrainingWrapper)]
        if self._forward is None:
            self._forward = replace_forward(model, adapted_forward)
        model.set_adapter = functools.partial(_set_adapter, model)  # type: ignore[method-assign]

    def detach(self, model: PreTrainedModel) -> None:
        """Leave the model as it was before `attach`."""
        self.hooks.detach()
        vars(model).pop("set_adapter", None)
        if restore_forward(model, self._forward):
            self._forward = None

    def run(self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`model(*args, **kwargs)` by the active adapter: the base model's forward, and what the head makes of it.

        What a call needs to know is handed on, or lies with this thread while a pass runs: other threads may be in calls
        of their own, and whatever is raised, nothing of a call is left behind.
        """
        name = self.active
        if name is None:
            return base_forward(model)(*args, **without_ours(kwargs))
        if kwargs.get("adapter_names") is not None:
            raise ShapleyError(MIXED)
        if not torch.compiler.is_compiling():
            check_agreement(self._parts, name)
        call = ModelCall.of(model, args, kwargs, self.anatomy, self.tiling)
        freeze_statistics(model)
        texts = {} if call.texts is None else call.texts.for_base(call.pixel_values.device)
        head = self.head(name)
        game = CoalitionGame(
            model=model,
            anatomy=self.anatomy,
            hooks=self.hooks,
            rules=self.rules[name],
            head=head,
            null=self._parameter("null", name),
            fill=self._parameter("fill", name),
            call=call,
        )
        inputs, current, weights = call.inputs(), ForwardCall(call.tiling.cells[0] * call.tiling.cells[1]), None
        if call.presence is not None:
            inputs, current, weights = game.removed(inputs, call.presence)
            current.without_token = False  # which explains this very pass
        with self.hooks.during(current):
            output = base_forward(model)(**inputs, **texts, **call.extras, **self.anatomy.named_fields)
        if current.features is None:
            raise ShapleyError("The blocks of the model were not run as they were when it was wrapped; wrap it again.")
        token = current.token if head.key is None else self.active_token()
        evidence = head.read(current.features, token, call.tiling.cells)
        result = answer(game, evidence, output, current.token is not None, weights)
        return result if call.return_dict else result.to_tuple()


def adapted_forward(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """The forward of a model that holds a `ShapleyLayer`."""
    layer, asked = getattr(model, CHILD, None), base_is_asked()
    if layer is None or asked:
        return base_forward(model)(*args, **kwargs)
    return layer.run(model, args, kwargs)


def _set_adapter(model: PreTrainedModel, adapter_name: str | list[str]) -> None:
    """`model.set_adapter` of transformers, which would switch LoRA before this layer, or a copy of a module, refuses."""
    known: Any = model.peft_config if getattr(model, "_hf_peft_config_loaded", False) else {}
    if set(check_one(adapter_name)) <= set(known):
        set_adapter(model, adapter_name)
    else:
        type(model).set_adapter(model, adapter_name)  # which says that there is none
