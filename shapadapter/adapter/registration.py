"""What the adapter plugs into: its versions, the private methods it overrides, and `PeftType.SHAPLEY` as a PEFT method.

Other versions of PEFT may not have what is imported here, so that is imported when the versions are known.
"""

from __future__ import annotations

import re
import warnings
from importlib import metadata

NAME = "SHAPLEY"

LOWEST = {"peft": "0.21", "transformers": "5.23"}
"""What the adapter plugs into, and the lowest version of each that it works with."""

TESTED = {"peft": "0.21"}
"""The newest minor version that the tests have passed with; a later one is met by a warning."""


def check_versions() -> None:
    """Refuse versions that the adapter cannot work with, and warn of those with which parts of it do not, or may not."""
    here = {name: metadata.version(name) for name in LOWEST}
    for name, lowest in LOWEST.items():
        if _numbers(here[name]) < _numbers(lowest):
            raise ImportError(
                f'shapadapter needs {name} {lowest} or newer, got {here[name]}: pip install "{name}>={lowest}"'
            )
    from transformers.integrations import peft as integration

    wanted = str(getattr(integration, "MIN_PEFT_VERSION", "0"))
    if _numbers(here["peft"]) < _numbers(wanted):
        warnings.warn(
            f"transformers {here['transformers']} wants peft {wanted} or newer for model.add_adapter and everything built on "
            f'it, got {here["peft"]}: pip install "peft>={wanted}", or where there is no such release yet '
            f'pip install "transformers=={LOWEST["transformers"]}.*" (get_peft_model works with both).',
            stacklevel=2,
        )
    if _numbers(here["peft"])[:2] > _numbers(TESTED["peft"]):
        warnings.warn(
            f"shapadapter was tested with peft up to {TESTED['peft']}, got {here['peft']}. If something fails: "
            f'pip install "peft=={TESTED["peft"]}.*"',
            stacklevel=2,
        )


def check_overrides(*classes: type) -> None:
    """See that all private methods that classes of ours override are still there: one that was renamed is never called."""
    for line in (one.__mro__ for one in classes):
        theirs = [above for above in line if not above.__module__.startswith("shapadapter")]
        for name in {name for ours in set(line) - set(theirs) for name in vars(ours)}:
            marked = getattr(getattr(line[0], name, None), "__override__", False)
            if marked and not any(name in vars(above) for above in theirs):
                above = next(one for one in theirs if one.__module__.partition(".")[0] in LOWEST)
                library = above.__module__.partition(".")[0]
                raise ImportError(
                    f"{above.__name__} of {library} {metadata.version(library)} has no {name} any more, on which "
                    f'shapadapter relies: pip install "{library}=={LOWEST[library]}.*"'
                )


def _numbers(version: str) -> tuple[int, ...]:
    """0.21.2 or 0.22.0.dev0 as numbers that can be compared."""
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


def register() -> None:
    """Register the method with PEFT; a second call changes nothing.

    PEFT accepts members of its enum only, and transformers asks them for `.value`, so the member has to be real.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils import register_peft_method

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
    from peft.utils import PeftType

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
