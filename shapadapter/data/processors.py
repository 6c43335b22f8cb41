"""Image processors, from a folder or a repository."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoImageProcessor

from shapadapter.core.errors import ShapleyError


def load_processor(place: str | Path, maker: Any = AutoImageProcessor, **options: Any) -> Any:
    """What a class of transformers makes of the processor in a folder or a repository.

    Raises:
        ShapleyError: it needs torchvision, as those of DINOv3 and PP-LCNet do, and that is not installed.
        OSError, ValueError: whatever else transformers raises.
    """
    try:
        return maker.from_pretrained(place, **options)
    except (ImportError, ValueError) as error:
        if "torchvision" in str(error).lower() and find_spec("torchvision") is None:
            raise ShapleyError(
                f"The image processor in {place} needs torchvision, which is not installed: pip install torchvision, in "
                f"the release that goes with torch {torch.__version__}."
            ) from error
        raise
