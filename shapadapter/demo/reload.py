"""Load an adapter as another program would, and explain images with it: `python -m shapadapter.demo.reload ...`."""

from __future__ import annotations

import sys
from pathlib import Path

from peft import AutoPeftModel
from PIL import Image
from transformers import AutoImageProcessor

import shapadapter


def main(adapter: Path, pretrained: Path, images: Path, result: Path) -> None:
    """Explain the PNG files of a folder with a saved adapter and save the explanation."""
    model = AutoPeftModel.from_pretrained(adapter)
    processor = AutoImageProcessor.from_pretrained(pretrained)
    pictures = [Image.open(path) for path in sorted(images.glob("*.png"))]
    shapadapter.explain(model, pictures, processor).save(result)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
