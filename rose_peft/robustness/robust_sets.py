"""Named robust test sets beside the clean one: AdvGLUE, revised texts, other domains, whatever there is a file of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from .data import Examples, PathLike, load_file
from .errors import DataError
from .estimate import share
from .predict import Predictor
from .results import Row


def named_paths(entries: Sequence[str]) -> dict[str, str]:
    """Split `name=path` entries.

    Raises:
        DataError: If one is not of this form, or two have the same name.
    """
    found: dict[str, str] = {}
    for entry in entries:
        name, separator, path = entry.partition("=")
        if not (name and separator and path):
            raise DataError(f"robust_files={entry!r}: write name=path, as in revised=revised.parquet.")
        if name in found:
            raise DataError(f"robust_files: two are called {name!r}; give each a name of its own.")
        found[name] = path
    return found


def find_file(path: str, data_dir: PathLike | None) -> Path:
    """Return a path as it is written if it exists, else taken from the data folder."""
    return Path(path) if data_dir is None or Path(path).exists() else Path(data_dir) / path


def load_robust_files(
    entries: Sequence[str],
    text_columns: Sequence[str],
    label_column: str = "label",
    label_names: Sequence[str] | None = None,
    data_dir: PathLike | None = None,
) -> dict[str, Examples]:
    """Load robust sets that are laid out as the clean one.

    Args:
        entries: `name=path` of each; a path that does not exist is looked for in `data_dir`.
        text_columns: Names of one or two text columns.
        label_column: Name of the label column.
        label_names: Name of each label number, where known.
        data_dir: Folder of the data.

    Raises:
        DataError: If an entry, a file or its layout cannot be used.
    """
    return {
        name: load_file(find_file(path, data_dir), text_columns, label_column, label_names)
        for name, path in named_paths(entries).items()
    }


def evaluate_robust_sets(model: nn.Module, tokenizer: Any, sets: Mapping[str, Examples], **options: Any) -> list[Row]:
    """Measure the accuracy of a classifier on each robust set.

    Args:
        model: Any classifier or `PeftModel` of one.
        tokenizer: Its tokenizer.
        sets: Name -> examples.
        options: Passed to `Predictor`: batch_size, max_length, bf16.

    Returns:
        One row of `robust_accuracy` per set, with its 95 % Wilson interval.

    Raises:
        LabelMismatchError: If the model's classes are not the labels of a set.
    """
    return [
        Row(
            "robust_accuracy",
            share(Predictor.for_examples(model, tokenizer, examples, **options).correct(examples)),
            name,
        )
        for name, examples in sets.items()
    ]
