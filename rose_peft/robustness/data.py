"""Labelled texts, and where the kit finds them: the hub, or local files with the same columns."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .errors import DataError, UnknownTaskError, first_line

PathLike = str | os.PathLike[str]

#: Columns in which AdvGLUE's annotated files say what made an example: the attack, else its level (word, sentence,
#: human).
SOURCE_COLUMNS = ("method", "data_construction")

# What programs write where there is no value. Texts may read like that too, so there only nothing is missing.
_MISSING = ("", "NA", "N/A", "<NA>", "NaN", "nan", "NULL", "null", "None")


@dataclass(frozen=True)
class Task:
    """Layout of one GLUE task, the same on the hub and in local files.

    Args:
        name: Name by which the kit knows the task.
        text_columns: One column for single sentences, two for pairs.
        label_names: Name of each label, in the order of the label numbers.
        glue_config: Configuration of the hub data set `nyu-mll/glue`.
        validation_split: Its labelled evaluation split.
        adv_config: Configuration of the hub data set `AI-Secure/adv_glue`, or None without counterpart.
    """

    name: str
    text_columns: tuple[str, ...]
    label_names: tuple[str, ...]
    glue_config: str
    validation_split: str = "validation"
    adv_config: str | None = None


_ENTAILMENT = ("entailment", "neutral", "contradiction")
_PARAPHRASE = ("not_equivalent", "equivalent")
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("sst2", ("sentence",), ("negative", "positive"), "sst2", adv_config="adv_sst2"),
        Task("qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), "qqp", adv_config="adv_qqp"),
        Task("mnli", ("premise", "hypothesis"), _ENTAILMENT, "mnli", "validation_matched", "adv_mnli"),
        Task(
            "mnli-mm", ("premise", "hypothesis"), _ENTAILMENT, "mnli", "validation_mismatched", "adv_mnli_mismatched"
        ),
        Task("qnli", ("question", "sentence"), ("entailment", "not_entailment"), "qnli", adv_config="adv_qnli"),
        Task("rte", ("sentence1", "sentence2"), ("entailment", "not_entailment"), "rte", adv_config="adv_rte"),
        Task("cola", ("sentence",), ("unacceptable", "acceptable"), "cola"),
        Task("mrpc", ("sentence1", "sentence2"), _PARAPHRASE, "mrpc"),
        Task("wnli", ("sentence1", "sentence2"), ("not_entailment", "entailment"), "wnli"),
    )
}
"""The GLUE tasks that the kit knows, by name."""


def get_task(name: str) -> Task:
    """Look a task up by name.

    Raises:
        UnknownTaskError: If there is none of this name.
    """
    if name not in TASKS:
        raise UnknownTaskError(
            f"task={name!r} is unknown; the kit knows {', '.join(TASKS)}. "
            "For other data name the file and its text columns instead."
        )
    return TASKS[name]


@dataclass(frozen=True)
class Examples:
    """Labelled texts, checked to be usable.

    Args:
        texts: One tuple per example with one text per column.
        labels: Label number of each example, from 0.
        columns: Names of the text columns, one or two.
        label_names: Name of each label number, where known.
        sources: What each example was made by (an attack's name), where the data say so.
        indices: Position of each example in the data set it came from.
        name: What to call the data in messages.

    Raises:
        DataError: If there is no example, one has no label, or the parts do not fit together.
    """

    texts: tuple[tuple[str, ...], ...]
    labels: tuple[int, ...]
    columns: tuple[str, ...] = ("text",)
    label_names: tuple[str, ...] | None = None
    sources: tuple[str, ...] | None = None
    indices: tuple[int, ...] = ()
    name: str = "data"

    def __post_init__(self) -> None:
        if not self.texts:
            raise DataError(f"{self.name}: holds no examples; check the path, the split and any filter.")
        if not 1 <= len(self.columns) <= 2:
            raise DataError(f"{self.name}: text columns {self.columns}; name one column, or two for sentence pairs.")
        if not self.indices:
            object.__setattr__(self, "indices", tuple(range(len(self.texts))))
        for part in ("labels", "sources", "indices"):
            values = getattr(self, part)
            if values is not None and len(values) != len(self.texts):
                raise DataError(f"{self.name}: {len(values)} {part} for {len(self.texts)} texts; they must match.")
        for position, text in enumerate(self.texts):
            if len(text) != len(self.columns) or not all(isinstance(part, str) for part in text):
                raise DataError(f"{self.name}: example {position} is {text!r}, not texts for {self.columns}.")
        unlabelled = [row for row, label in enumerate(self.labels) if label < 0]
        if unlabelled:
            raise DataError(
                f"{self.name}: {len(unlabelled)} of {len(self.labels)} examples have no label (blank, or a negative "
                f"number), the first in row {unlabelled[0]}; use a labelled split, such as validation, or "
                "leave them out."
            )
        if self.label_names is not None and max(self.labels) >= len(self.label_names):
            raise DataError(f"{self.name}: label {max(self.labels)} has no name among {self.label_names}.")

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, positions: Sequence[int]) -> Examples:
        """Return the examples at these positions, in this order."""

        def pick(values: Sequence[Any]) -> tuple[Any, ...]:
            return tuple(values[position] for position in positions)

        sources = None if self.sources is None else pick(self.sources)
        return replace(
            self, texts=pick(self.texts), labels=pick(self.labels), indices=pick(self.indices), sources=sources
        )

    def sample(self, size: int | None, seed: int = 0) -> Examples:
        """Return a random sample without replacement; the same seed and data give the same sample.

        Args:
            size: Number of examples; None or more than there are takes all of them.
            seed: Seed of the choice.

        Raises:
            DataError: If the size is not positive.
        """
        if size is None or size >= len(self):
            return self
        if size < 1:
            raise DataError(f"num_examples={size}: must be positive; leave it out to take all {len(self)}.")
        return self.select(sorted(random.Random(seed).sample(range(len(self)), size)))

    def fingerprint(self) -> str:
        """Return a short digest of texts, labels and positions."""
        return digest([self.texts, self.labels, self.columns, self.indices])


def digest(content: Any) -> str:
    """Return a short digest of texts and numbers."""
    return hashlib.sha256(json.dumps(content, ensure_ascii=True).encode()).hexdigest()[:16]


def examples_from_columns(
    table: Mapping[str, Sequence[Any]],
    text_columns: Sequence[str],
    label_column: str = "label",
    label_names: Sequence[str] | None = None,
    name: str = "data",
) -> Examples:
    """Build examples from a table given column by column (a `datasets.Dataset` or a `pandas.DataFrame` is one).

    Args:
        table: Column name -> values.
        text_columns: Names of one or two text columns.
        label_column: Name of the column with label numbers, or with label names.
        label_names: Name of each label number. Needed where the labels are names; None for those that a
            `datasets.Dataset` carries itself.
        name: What to call the data in messages.

    Raises:
        DataError: If a column is missing, or the examples cannot be used (see `Examples`).
    """
    present = list(getattr(table, "column_names", None) or table)
    for column in (*text_columns, label_column):
        if column not in present:
            what = "has no labels" if column == label_column else "lacks a text column"
            raise DataError(f"{name}: {what}: no column {column!r} among {present}; name the right one.")
    raw_labels = list(table[label_column])
    carried = getattr(getattr(table, "features", {}).get(label_column), "names", None)
    given = carried if label_names is None else label_names
    names = None if given is None else tuple(given)
    by_name = label_names is not None and _numbers_are_names(raw_labels, names or (), name, label_column)
    labels = [_label_number(label, names, by_name, name, label_column) for label in raw_labels]
    source_columns = [table[column] for column in SOURCE_COLUMNS if column in present]
    return Examples(
        texts=tuple(zip(*(table[column] for column in text_columns), strict=True)),
        labels=tuple(labels),
        columns=tuple(text_columns),
        label_names=names,
        sources=tuple(map(_source, zip(*source_columns, strict=True))) if source_columns else None,
        name=name,
    )


def _source(named: tuple[Any, ...]) -> str:
    """Take the most specific name that is there; tables mark a missing one by None, NaN or nothing."""
    return next((str(name) for name in named if not _is_missing(name) and name != ""), "unnamed")


def _is_missing(value: Any) -> bool:
    """Whether a value is one of those by which tables mark a missing one."""
    import pandas

    return value is None or (pandas.api.types.is_scalar(value) and bool(pandas.isna(value)))


def _is_number(value: Any) -> bool:
    import pandas

    return bool(pandas.api.types.is_number(value) or pandas.api.types.is_bool(value))


def _numbers_are_names(labels: Sequence[Any], names: tuple[str, ...], name: str, column: str) -> bool:
    """Whether labels that a file has as numbers, or as true and false, are meant as names, such as 1 to 5 stars.

    Raises:
        DataError: If they may be either, and would be different labels.
    """
    numbers = [label for label in labels if _is_number(label) and not _is_missing(label) and label % 1 == 0]
    written = {str(label) if str(label) in ("True", "False") else str(int(label)) for label in numbers}
    if not written or not written <= set(names):
        return False
    if "True" in written or "False" in written:
        return True
    differ = sorted(text for text in written if names.index(text) != int(text))
    if differ and all(0 <= int(text) < len(names) for text in written):
        raise DataError(
            f"{name}: {column}={differ[0]} may be the name {differ[0]!r} or the number of {names[int(differ[0])]!r} "
            f"among the label names {list(names)}; write names in the file that are no numbers."
        )
    return bool(differ)


def _label_number(label: Any, names: tuple[str, ...] | None, by_name: bool, name: str, column: str) -> int:
    if _is_missing(label):
        return -1
    if by_name and names is not None and _is_number(label):
        return names.index(str(label) if str(label) in ("True", "False") else str(int(label)))
    if isinstance(label, str):
        if names is not None and label in names:
            return names.index(label)
        if re.fullmatch(r"-?\d+", label):  # JSON often has numbers in quotes
            return int(label)
        known = "no label names are given" if names is None else f"the label names are {list(names)}"
        raise DataError(f"{name}: {column}={label!r} is text and {known}; give label_names that contain it.")
    if not _is_number(label):
        raise DataError(f"{name}: {column}={label!r} is neither a number nor a name; each example has one label here.")
    if label % 1 != 0:
        raise DataError(f"{name}: {column}={label!r} is no class; scores (regression) cannot be evaluated here.")
    return int(label)


def read_table(path: PathLike, text_columns: Sequence[str], key: str | None = None, **labels: Any) -> Any:
    """Read one file as a `pandas.DataFrame`; see `load_file`.

    Args:
        path: The file.
        text_columns: Columns whose values stay as they are written.
        key: Which list to take from a JSON object of lists.
        labels: `label_column` and `label_names`, where they are known.

    Raises:
        DataError: If the file is missing, unreadable, or not laid out like this.
    """
    import pandas

    path = Path(path)
    as_text = dict.fromkeys(text_columns, str)
    delimited = _delimited_options(path, text_columns, **labels)
    readers = {
        ".parquet": pandas.read_parquet,
        ".csv": lambda file: pandas.read_csv(file, dtype=as_text, **delimited),
        ".tsv": lambda file: pandas.read_csv(file, dtype=as_text, **delimited),
        ".jsonl": lambda file: pandas.read_json(file, lines=True, dtype=False),
        ".json": lambda file: _read_json(file, key),
    }
    if path.suffix not in readers:
        raise DataError(f"{path}: files end in {', '.join(readers)} here, not in {path.suffix!r}.")
    if not path.is_file():
        raise DataError(f"{path}: no such file; check the folder and the split.")
    try:
        return readers[path.suffix](path)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: is not in UTF-8 ({error.reason} at byte {error.start}); convert it first."
        ) from error
    except (ValueError, OSError, KeyError) as error:
        raise DataError(f"{path}: cannot be read as {path.suffix[1:]} ({first_line(error)}).") from error


def load_file(
    path: PathLike,
    text_columns: Sequence[str],
    label_column: str = "label",
    label_names: Sequence[str] | None = None,
    key: str | None = None,
) -> Examples:
    """Load examples from one Parquet, CSV, TSV, JSON or JSON-lines file; texts stay as they are written.

    Args:
        path: The file; its ending decides the format. CSV may put fields in quotes; in TSV, as GLUE publishes it, a
            quote is a character like any other. JSON is a list of records, or an object of such lists by `key` (the
            layout in which AdvGLUE is published).
        text_columns: Names of one or two text columns.
        label_column: Name of the label column.
        label_names: Name of each label number, where known; None for those that a Parquet file of `datasets` holds.
        key: Which list to take from a JSON object of lists.

    Raises:
        DataError: If the file is missing, unreadable, or not laid out like this.
    """
    table = read_table(path, text_columns, key, label_column=label_column, label_names=label_names)
    if Path(path).suffix == ".parquet" and label_names is None:
        table = with_features(table, path)
    return examples_from_columns(table, text_columns, label_column, label_names, name=str(path))


def with_features(table: Any, path: PathLike) -> Any:
    """Return the table of a Parquet file as a `datasets.Dataset`, with the names of labels that the file holds.

    Args:
        table: As `read_table` read it.
        path: The file.
    """
    import datasets
    from pyarrow.parquet import read_schema

    features = datasets.Features.from_arrow_schema(read_schema(path))
    return datasets.Dataset.from_pandas(table, features=features, preserve_index=False)


def _delimited_options(
    path: PathLike,
    text_columns: Sequence[str],
    label_column: str = "label",
    label_names: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Say how pandas must read a CSV or TSV file, so that texts such as `NA` are texts and quotes in TSV are quotes.

    Args:
        path: The file, for its ending.
        text_columns: Names of the text columns.
        label_column: Name of the label column.
        label_names: Name of each label number, where known; one such as `None` is a label then.

    Returns:
        Options of `pandas.read_csv`.
    """
    missing: dict[str, Sequence[str]] = dict.fromkeys(SOURCE_COLUMNS, _MISSING)
    missing[label_column] = [mark for mark in _MISSING if mark not in (label_names or ())]
    missing |= dict.fromkeys(text_columns, ("",))
    options: dict[str, Any] = {"keep_default_na": False, "na_values": missing}
    if Path(path).suffix == ".tsv":
        options |= {"sep": "\t", "quoting": csv.QUOTE_NONE}
    return options


def _read_json(path: Path, key: str | None) -> Any:
    import pandas

    content = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(content, dict):
        if key not in content:
            raise KeyError(f"no list {key!r} among {sorted(content)}")
        content = content[key]
    return pandas.DataFrame.from_records(content)


def read_hub(repository: str, config: str | None, split: str) -> Any:
    """Read one split of a data set on the Hugging Face hub as a `datasets.Dataset`.

    Raises:
        DataError: If it cannot be fetched.
    """
    import datasets

    try:
        return datasets.load_dataset(repository, config, split=split)
    except Exception as error:  # the hub's client raises many kinds, and each means the same to the user
        raise DataError(
            f"{repository}/{config}: not available from the hub ({first_line(error)}); "
            "give the folder of local files instead."
        ) from error


def load_hub(
    repository: str,
    config: str | None,
    split: str,
    text_columns: Sequence[str],
    label_column: str = "label",
    label_names: Sequence[str] | None = None,
) -> Examples:
    """Load examples from a data set on the Hugging Face hub.

    Args:
        repository: Name of the data set, such as `nyu-mll/glue`.
        config: Its configuration, such as `sst2`.
        split: Its split.
        text_columns: Names of one or two text columns.
        label_column: Name of the label column.
        label_names: Name of each label number, where known.

    Raises:
        DataError: If the data set cannot be fetched, or is not laid out like this.
    """
    table = read_hub(repository, config, split)
    return examples_from_columns(table, text_columns, label_column, label_names, name=f"{repository}/{config}/{split}")


def load_glue(task: str, data_dir: PathLike | None = None, split: str | None = None) -> Examples:
    """Load a GLUE task, by default its labelled evaluation split.

    Args:
        task: Name of the task.
        data_dir: Folder with `glue/<config>/<split>.parquet` (or another ending that `load_file` reads), named as on
            the hub: `glue/mnli/validation_mismatched.parquet` for mnli-mm. None for the hub.
        split: Another split.

    Raises:
        UnknownTaskError: If there is no such task.
        DataError: If the data cannot be used.
    """
    layout = get_task(task)
    split = split or layout.validation_split
    if data_dir is None:
        return load_hub("nyu-mll/glue", layout.glue_config, split, layout.text_columns, label_names=layout.label_names)
    path = find_split(Path(data_dir) / "glue" / layout.glue_config, split)
    return load_file(path, layout.text_columns, label_names=layout.label_names)


def load_adv_glue(task: str, data_dir: PathLike | None = None) -> Examples:
    """Load the labelled (development) part of AdvGLUE (Wang et al. 2021, https://arxiv.org/abs/2111.02840).

    Args:
        task: Name of the task.
        data_dir: Folder of local files, see `adv_glue_file`; None for the hub.

    Raises:
        UnknownTaskError: If the task is unknown or AdvGLUE has no counterpart of it.
        DataError: If the data cannot be used.
    """
    layout = get_task(task)
    if layout.adv_config is None:
        covered = [known.name for known in TASKS.values() if known.adv_config]
        raise UnknownTaskError(f"task={task!r} has no AdvGLUE counterpart; AdvGLUE covers {', '.join(covered)}.")
    if data_dir is None:
        return load_hub(
            "AI-Secure/adv_glue", layout.adv_config, "validation", layout.text_columns, label_names=layout.label_names
        )
    path, key = adv_glue_file(layout, data_dir)
    return load_file(path, layout.text_columns, label_names=layout.label_names, key=key)


def adv_glue_file(task: Task, data_dir: PathLike) -> tuple[Path, str | None]:
    """Find a task of AdvGLUE in a folder of local files.

    Args:
        task: A task with a counterpart in AdvGLUE.
        data_dir: Folder with any of `adv_glue/dev_ann.json`, which AdvGLUE publishes and which names the attack behind
            each example; `adv_glue/adv_<task>/validation.parquet` (or another ending that `load_file` reads), as on
            the hub; and `adv_glue/dev.json`, also from AdvGLUE. They hold the same examples, the first says the most.

    Returns:
        The file, and the key of the task's list in a file of several tasks.

    Raises:
        DataError: If none of them is there.
    """
    folder = Path(data_dir) / "adv_glue"
    if (folder / "dev_ann.json").is_file():
        return folder / "dev_ann.json", task.name
    own = folder / str(task.adv_config)
    if (folder / "dev.json").is_file() and not own.is_dir():
        return folder / "dev.json", task.name
    return find_split(own, "validation", "dev"), None


def find_split(folder: Path, *stems: str) -> Path:
    """Find a split among local files.

    Args:
        folder: Folder of the files.
        stems: Names that the split goes by, without the ending.

    Raises:
        DataError: If none of them is there with an ending that `load_file` reads.
    """
    names = [f"{stem}{ending}" for stem in stems for ending in (".parquet", ".jsonl", ".json", ".csv", ".tsv")]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise DataError(f"{folder}: holds none of {', '.join(names)}; check the data folder, or leave it out for the hub.")
