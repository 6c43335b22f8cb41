"""shapadapter: fine-tuned vision models that predict and explain themselves in one forward pass.

Importing the package registers the PEFT method `SHAPLEY` and the pipeline "image-attribution", and does nothing else. Do
it before an adapter is loaded.
"""

from __future__ import annotations

import importlib
import threading
from typing import TYPE_CHECKING, Any

from .importing import follow

__version__ = "0.1.0.dev0"

# They register the PEFT method and the pipeline. PEFT and transformers take seconds: `--help` need not wait for them.
follow({"peft": f"{__name__}.adapter", "transformers.pipelines": f"{__name__}.tasks"})

if TYPE_CHECKING:
    from .adapter import ShapleyConfig, ShapleyModel
    from .attributing import attribute
    from .augmenting import Augmented
    from .backbone import register_family
    from .errors import (
        CheckpointError,
        ClassNotFoundError,
        ExportError,
        ImageError,
        ShapleyCollapseWarning,
        ShapleyError,
        UnsupportedModelError,
    )
    from .evaluation import Evaluation, Evaluator, evaluate, map_agreement
    from .explaining import explain
    from .explanation import Explanation
    from .export import ExportReport, export_onnx, export_program
    from .game import PatchGame
    from .loading import load
    from .outputs import MatchingOutput, ShapleyOutput
    from .retrieval import retrieval_after_deletion
    from .training import ShapleyTrainer, ShapleyTrainingArguments, image_folder, last_whole_checkpoint

# transformers' modules are not to be imported by two threads at a time.
_IMPORTING = threading.RLock()

# Loaded when they are first used: a trainer brings accelerate and data sets, which loading an adapter does not need.
_LAZY = {
    "Augmented": "augmenting",
    "CheckpointError": "errors",
    "ClassNotFoundError": "errors",
    "Evaluation": "evaluation",
    "Evaluator": "evaluation",
    "Explanation": "explanation",
    "ExportError": "errors",
    "ExportReport": "export",
    "ImageError": "errors",
    "MatchingOutput": "outputs",
    "PatchGame": "game",
    "ShapleyCollapseWarning": "errors",
    "ShapleyConfig": "adapter",
    "ShapleyError": "errors",
    "ShapleyModel": "adapter",
    "ShapleyOutput": "outputs",
    "ShapleyTrainer": "training",
    "ShapleyTrainingArguments": "training",
    "UnsupportedModelError": "errors",
    "attribute": "attributing",
    "evaluate": "evaluation",
    "explain": "explaining",
    "export_onnx": "export",
    "export_program": "export",
    "image_folder": "training",
    "last_whole_checkpoint": "training",
    "load": "loading",
    "map_agreement": "evaluation",
    "register": "adapter",
    "register_family": "backbone",
    "retrieval_after_deletion": "retrieval",
}

__all__ = [
    "Augmented",
    "CheckpointError",
    "ClassNotFoundError",
    "Evaluation",
    "Evaluator",
    "Explanation",
    "ExportError",
    "ExportReport",
    "ImageError",
    "MatchingOutput",
    "PatchGame",
    "ShapleyCollapseWarning",
    "ShapleyConfig",
    "ShapleyError",
    "ShapleyModel",
    "ShapleyOutput",
    "ShapleyTrainer",
    "ShapleyTrainingArguments",
    "UnsupportedModelError",
    "__version__",
    "attribute",
    "evaluate",
    "explain",
    "export_onnx",
    "export_program",
    "image_folder",
    "last_whole_checkpoint",
    "load",
    "map_agreement",
    "register_family",
    "retrieval_after_deletion",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with _IMPORTING:
        value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value
