"""Classes by their names."""

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any

from shapadapter.errors import ClassNotFoundError, FieldError
from shapadapter.schema import fault


def check_names(names: Any, field: str) -> None:
    """Refuse names that are no texts, or none that can be written as UTF-8.

    Raises:
        FieldError: naming the field and the first of them.
    """
    if trouble := fault(names, list[str], field):
        raise FieldError(f"{trouble}.")


def find_class(labels: Sequence[str], name_or_id: str | int) -> int:
    """Find a class by its name, or check its index.

    Args:
        labels: The K class names.
        name_or_id: A class name, exactly as in `labels`, or a class index.

    Returns:
        The class index, in 0..K-1.

    Raises:
        ClassNotFoundError: If there is no such class, or several classes share the name.
    """
    if not isinstance(name_or_id, str):
        if 0 <= name_or_id < len(labels):
            return int(name_or_id)
        raise ClassNotFoundError(f"There is no class {name_or_id}: the classes are 0..{len(labels) - 1}.")
    found = [index for index, label in enumerate(labels) if label == name_or_id]
    if len(found) == 1:
        return found[0]
    if found:
        raise ClassNotFoundError(f"Several classes are called {name_or_id!r}: pass one of the ids {found}.")
    close = _close(labels, name_or_id)
    hint = f"Did you mean {' or '.join(map(repr, close))}?" if close else f"The classes are {some(labels)}."
    raise ClassNotFoundError(f"There is no class {name_or_id!r}. {hint}")


def _close(labels: Sequence[str], name: str) -> list[str]:
    """Up to three labels that may be meant: those with the name as a word of theirs, then those spelled much alike."""
    word = re.compile(rf"(?<!\w){re.escape(name)}(?!\w)", re.IGNORECASE)
    worded = [label for label in labels if name and word.search(label)]
    return list(dict.fromkeys([*worded, *difflib.get_close_matches(name, labels, n=3)]))[:3]


def some(values: Iterable[object]) -> str:
    """The first ten in words, and how many there are in all."""
    texts = [str(value) for value in values]
    return ", ".join(texts[:10]) + (f", ... ({len(texts)} in all)" if len(texts) > 10 else "")
