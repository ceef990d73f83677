"""Whether the classes of a model are the labels of the data, and in which order."""

from __future__ import annotations

import re
from typing import Any

from .data import Examples
from .errors import LabelMismatchError


def label_order(config: Any, examples: Examples) -> list[int]:
    """Find the model's class for each label number of the data.

    Where both name their classes the names decide, whatever their order; where the model has only the generic names
    (`LABEL_0`, ...) or the data none, class numbers are taken as label numbers.

    Args:
        config: The model's configuration, with `num_labels` and `id2label`.
        examples: The data.

    Returns:
        For each label number, the index of the model's class.

    Raises:
        LabelMismatchError: If the two sets differ.
    """
    count = int(getattr(config, "num_labels", 0) or 0)
    if count < 2:
        raise LabelMismatchError(f"num_labels={count}: the model is no classifier; load it with its classes.")
    names = examples.label_names
    if names is not None and count != len(names):
        raise LabelMismatchError(
            f"num_labels={count}: the model has {count} classes, {examples.name} has {len(names)} labels "
            f"{list(names)}; evaluate a model trained on this task."
        )
    if max(examples.labels) >= count:
        raise LabelMismatchError(
            f"label {max(examples.labels)} of {examples.name} lies outside the model's {count} classes; "
            "evaluate a model trained on this task."
        )
    classes = _class_names(config, count)
    if names is None or classes is None:
        return list(range(count))
    wanted = [_normalise(name) for name in names]
    if set(wanted) != set(classes):
        raise LabelMismatchError(
            f"id2label={dict(enumerate(classes))}: the labels of {examples.name} are {list(names)}; if only the names "
            "differ, set model.config.id2label to the data's names in the order of the model's classes."
        )
    return [classes.index(name) for name in wanted]


def _class_names(config: Any, count: int) -> list[str] | None:
    """Return the model's own class names, or None if it has only generic ones."""
    id2label = getattr(config, "id2label", None) or {}
    named = {int(index): _normalise(str(label)) for index, label in id2label.items()}
    if set(named) != set(range(count)) or all(re.fullmatch(r"(label_)?\d+", name) for name in named.values()):
        return None
    return [named[index] for index in range(count)]


def _normalise(name: str) -> str:
    return re.sub(r"[\s\-]+", "_", name.strip().lower())
