"""Sample pictures for a model card: files by name, and what the card says of each."""

from __future__ import annotations

import io
from collections.abc import Sequence

from shapadapter.explanation import Explanation

from .strip import describe, draw_strip


def sample_pictures(
    explanation: Explanation, max_classes: int, labels: Sequence[int] | None = None
) -> tuple[dict[str, bytes], list[dict[str, str]]]:
    """Draw every image of an explanation.

    Args:
        explanation: of the images to be shown.
        max_classes: maps beside each image.
        labels: the class of each image, None if unknown.

    Returns:
        Contents of png files by name, and for the card's record `file` and `alt` of each.
    """
    files, listed = {}, []
    for index in range(len(explanation)):
        name = f"explanation-{index + 1}.png"
        known = labels is not None and 0 <= labels[index] < len(explanation.labels)
        caption = f"labelled {explanation.labels[labels[index]]}" if labels is not None and known else ""
        options = {"max_classes": max_classes, "caption": caption}
        file = io.BytesIO()
        draw_strip(explanation, index, **options).save(file, format="png", optimize=True)  # type: ignore[arg-type]
        files[name] = file.getvalue()
        listed.append({"file": name, "alt": describe(explanation, index, **options)})  # type: ignore[arg-type]
    return files, listed
