"""shapadapter: fine-tuned vision models that predict and explain themselves in one forward pass.

Importing the package registers the PEFT method `SHAPLEY` and the pipeline "image-attribution", and does nothing else. Do
it before an adapter is loaded.
"""

from __future__ import annotations

import importlib
import threading
from typing import TYPE_CHECKING, Any

from shapadapter.core.installation import find_moved, follow

__version__ = "0.1.0.dev0"

# They register the PEFT method, the pipeline, and what writes cards. PEFT and transformers take seconds: `--help` need not wait for them.
follow(
    {
        "peft": f"{__name__}.adapter",
        "transformers.pipelines": f"{__name__}.hub.tasks",
        f"{__name__}.adapter": f"{__name__}.hub.card",
    }
)

# Modules that the documentation of 0.1 named, by their names of that time.
find_moved(
    {
        f"{__name__}.{old}": f"{__name__}.{new}"
        for old, new in {
            "collator": "data.collator",
            "errors": "core.errors",
            "explaining": "explanation.api",
            "game": "explanation.game",
            "grid": "core.grid",
            "images": "data.images",
            "inspecting": "hub.inspection",
            "loading": "hub.load",
            "objective": "core.shapley",
            "outputs": "adapter.answer",
            "refinement": "core.estimates",
            "retrieval": "evaluation.retrieval",
            "shapley": "core.shapley",
            "texts": "data.collator",
            "training.finetune": "training.script",
        }.items()
    }
)

if TYPE_CHECKING:
    from shapadapter.adapter import ShapleyConfig, ShapleyModel
    from shapadapter.adapter.answer import MatchingOutput, ShapleyOutput
    from shapadapter.backbone import register_family
    from shapadapter.core.errors import (
        CheckpointError,
        ClassNotFoundError,
        ExportError,
        ImageError,
        ShapleyCollapseWarning,
        ShapleyError,
        UnsupportedModelError,
    )
    from shapadapter.data.augmentation import Augmented
    from shapadapter.evaluation import Evaluation, Evaluator, evaluate, map_agreement
    from shapadapter.evaluation.retrieval import retrieval_after_deletion
    from shapadapter.explanation.api import explain
    from shapadapter.explanation.explanation import Explanation
    from shapadapter.explanation.game import PatchGame
    from shapadapter.explanation.methods import attribute
    from shapadapter.export import ExportReport, export_onnx, export_program
    from shapadapter.hub.load import load
    from shapadapter.training import ShapleyTrainer, ShapleyTrainingArguments, image_folder, last_complete_checkpoint

# transformers' modules are not to be imported by two threads at a time.
_IMPORTING = threading.RLock()

# Loaded when they are first used: a trainer brings accelerate and data sets, which loading an adapter does not need.
_LAZY = {
    "Augmented": "data.augmentation",
    "CheckpointError": "core.errors",
    "ClassNotFoundError": "core.errors",
    "Evaluation": "evaluation",
    "Evaluator": "evaluation",
    "Explanation": "explanation.explanation",
    "ExportError": "core.errors",
    "ExportReport": "export",
    "ImageError": "core.errors",
    "MatchingOutput": "adapter.answer",
    "PatchGame": "explanation.game",
    "ShapleyCollapseWarning": "core.errors",
    "ShapleyConfig": "adapter",
    "ShapleyError": "core.errors",
    "ShapleyModel": "adapter",
    "ShapleyOutput": "adapter.answer",
    "ShapleyTrainer": "training",
    "ShapleyTrainingArguments": "training",
    "UnsupportedModelError": "core.errors",
    "attribute": "explanation.methods",
    "evaluate": "evaluation",
    "explain": "explanation.api",
    "export_onnx": "export",
    "export_program": "export",
    "image_folder": "data.folders",
    "last_complete_checkpoint": "training",
    "load": "hub.load",
    "map_agreement": "evaluation",
    "register": "adapter",
    "register_family": "backbone",
    "retrieval_after_deletion": "evaluation.retrieval",
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
    "last_complete_checkpoint",
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
