"""The PEFT adapter: configuration, layer (token and head), tuner, registration.

Importing it makes the method `SHAPLEY` known to PEFT.
"""

from shapadapter.adapter.registration import check_versions, register

check_versions()  # first: what follows imports names that other versions may not have

from shapadapter.adapter.config import ShapleyConfig  # noqa: E402
from shapadapter.adapter.layer import CHILD, ShapleyLayer  # noqa: E402
from shapadapter.adapter.model import ShapleyModel  # noqa: E402

__all__ = ["CHILD", "ShapleyConfig", "ShapleyLayer", "ShapleyModel", "register"]

register()
