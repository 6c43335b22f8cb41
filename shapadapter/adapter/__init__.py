"""The PEFT adapter: configuration, layer (token and head), tuner, registration.

Importing it makes the method `SHAPLEY` known to PEFT.
"""

from shapadapter.installing import check_versions

check_versions()  # first: what follows imports names that other versions may not have

from .config import ShapleyConfig  # noqa: E402
from .layer import CHILD, ShapleyLayer  # noqa: E402
from .model import ShapleyModel  # noqa: E402
from .registration import register  # noqa: E402

__all__ = ["CHILD", "ShapleyConfig", "ShapleyLayer", "ShapleyModel", "register"]

register()
