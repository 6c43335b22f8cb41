"""Classes by their names."""

import difflib
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from shapadapter.core.documents import fault
from shapadapter.core.errors import ClassNotFoundError, FieldError, ShapleyError


def check_names(names: Any, field: str) -> None:
    """Refuse names that are no texts, or none that can be written as UTF-8.

    Raises:
        FieldError: naming the field and the first of them.
    """
    if trouble := fault(names, list[str], field):
        raise FieldError(f"{trouble}.")


def class_names(id2label: Mapping[Any, Any] | None, classes: int) -> tuple[str, ...]:
    """The names of a model's K classes, in their order.

    Args:
        id2label: as a model's config has it, by index or, as json has it, by the index in letters; None without names.
        classes: K.

    Raises:
        ShapleyError: it names other indices than 0..K-1.
    """
    if not id2label:
        return tuple(f"LABEL_{index}" for index in range(classes))
    try:
        names = {int(index): str(name) for index, name in id2label.items()}
    except (TypeError, ValueError):
        names = {}
    if len(names) != len(id2label) or set(names) != set(range(classes)):
        raise ShapleyError(
            f"Expected id2label to name the {classes} classes of the model by the indices 0 to {classes - 1}, got those of "
            f"{some(map(repr, id2label))}. Set id2label=dict(enumerate(names)) and label2id={{name: index for index, name "
            "in enumerate(names)}, in the order of the model's outputs."
        )
    return tuple(names[index] for index in range(classes))


def find_classes(labels: Sequence[str], wanted: Any) -> list[int]:
    """The indices of a class or several, by names or indices; arrays and numbers of NumPy and torch do as well.

    Raises:
        ClassNotFoundError: as `find_class`.
    """
    wanted = wanted.tolist() if hasattr(wanted, "tolist") else wanted
    several = wanted if hasattr(wanted, "__iter__") and not isinstance(wanted, str) else [wanted]
    return [find_class(labels, one) for one in several]


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
        try:
            index = operator.index(name_or_id)
        except TypeError:
            index = -1
        if 0 <= index < len(labels):
            return index
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
