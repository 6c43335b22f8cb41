"""The PEFT adapter: configuration, layer (token and head), tuner, registration.

Importing it makes the method `SHAPLEY` known to PEFT.
"""

from .config import ShapleyConfig
from .layer import ShapleyLayer
from .model import ShapleyModel
from .registration import register

__all__ = ["ShapleyConfig", "ShapleyLayer", "ShapleyModel", "register"]

register()
