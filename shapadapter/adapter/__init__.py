"""The PEFT adapter: configuration, layer (token and head), tuner, registration.

Importing it makes the method `SHAPLEY` known to PEFT.
"""

from .config import ShapleyConfig
from .layer import ShapleyLayer
from .model import CHILD, ShapleyModel
from .registration import register

__all__ = ["CHILD", "ShapleyConfig", "ShapleyLayer", "ShapleyModel", "register"]

register()
