"""Make `PeftType.SHAPLEY` a real PEFT method."""

from __future__ import annotations

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType, register_peft_method

from shapadapter.core.installation import check_overrides

NAME = "SHAPLEY"


def register() -> None:
    """Register the method with PEFT; a second call changes nothing.

    PEFT accepts members of its enum only, and transformers asks them for `.value`, so the member has to be real.
    """
    _extend_enum()
    from shapadapter.adapter.config import ShapleyConfig, check_files_when_read
    from shapadapter.adapter.layer import ShapleyLayer
    from shapadapter.adapter.model import ShapleyModel

    check_files_when_read()
    if NAME not in PEFT_TYPE_TO_CONFIG_MAPPING:
        check_overrides(ShapleyModel, ShapleyLayer)
        # The prefix is LoRA's: transformers inserts the adapter's name only after this one prefix when it loads keys.
        register_peft_method(name=NAME.lower(), config_cls=ShapleyConfig, model_cls=ShapleyModel, prefix="lora_")


def _extend_enum() -> None:
    if NAME in PeftType.__members__:
        return
    member = str.__new__(PeftType, NAME)
    member._name_ = member._value_ = NAME
    member.__objclass__ = PeftType  # type: ignore[attr-defined]
    member._sort_order_ = len(PeftType._member_names_)  # type: ignore[attr-defined]
    # From Python 3.12 on, members are found as attributes of the class and no longer through its metaclass.
    type.__setattr__(PeftType, NAME, member)
    PeftType._member_names_.append(NAME)
    PeftType._member_map_[NAME] = member
    PeftType._value2member_map_[NAME] = member
