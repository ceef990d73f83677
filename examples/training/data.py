"""Loading labelled text from the hub, from files, or from the demo's generator, and checking it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset
from pandas import to_numeric

from rose_peft.robustness.adv_glue import ADV_GLUE
from rose_peft.robustness.data import TASKS, adv_glue_file, find_split, read_hub, read_table, with_features
from rose_peft.robustness.errors import DataError
from rose_peft.robustness.robust_sets import find_file, named_paths

from . import demo_data
from .arguments import InputError, TrainArguments


@dataclass(frozen=True)
class TextData:
    """Checked splits with the columns `text`, `text_pair` (for pairs) and `label` (an integer).

    Args:
        train: Training split.
        validation: Validation split.
        robust: Name -> adversarial or robust test set.
        labels: Names of the labels, in order.
    """

    train: Dataset
    validation: Dataset
    robust: dict[str, Dataset]
    labels: list[str]


def load_text(args: TrainArguments) -> TextData:
    """Load and check the data that the options name.

    Raises:
        InputError: If files, columns or labels are missing or wrong.
    """
    columns = _columns(args)
    splits = {name: split for name, split in _splits(args).items() if split is not None}
    for name, split in splits.items():
        _check_columns(name, split, columns, args.label_column)
    names = _label_names(splits["training"], args)
    for name, split in splits.items():
        feature = split.features[args.label_column]
        if isinstance(feature, ClassLabel) and list(feature.names) != names:
            raise InputError(
                f"label_column={args.label_column!r}: the labels of the {name} data are {', '.join(feature.names)}, "
                f"those of the training data {', '.join(names)}; pass files of the same labels."
            )
    checked = {name: _checked(name, split, columns, args.label_column, names) for name, split in splits.items()}
    unseen = set(checked["training"]["label"]) - set(checked["validation"]["label"])
    if unseen:  # robust sets may be of one class; by this split epochs and methods are chosen
        raise InputError(
            f"label_column={args.label_column!r}: the validation data has no example of {names[min(unseen)]!r}, which "
            "the training data has; pass files of the same labels."
        )
    if args.max_train_samples is not None and args.max_train_samples < len(checked["training"]):
        checked["training"] = checked["training"].shuffle(seed=0).select(range(args.max_train_samples))
    return TextData(
        train=checked["training"],
        validation=checked["validation"],
        robust={name: split for name, split in checked.items() if name not in ("training", "validation")},
        labels=names,
    )


def _columns(args: TrainArguments) -> tuple[str, str | None]:
    """Names of the text columns: the user's, else the task's."""
    if args.is_demo:
        return "sentence", None
    if args.task is not None and args.task not in TASKS and args.text_column is None:
        raise InputError(
            f"task={args.task!r} is unknown; choose one of {', '.join(TASKS)}, or pass --train_file, "
            "--validation_file and --text_column."
        )
    if args.text_column is not None:
        return args.text_column, args.text_pair_column
    if args.task is None:
        raise InputError("text_column is missing: files without --task need --text_column.")
    first, *rest = TASKS[args.task].text_columns
    return first, args.text_pair_column or next(iter(rest), None)


def _splits(args: TrainArguments) -> dict[str, Dataset | None]:
    if args.is_demo:
        splits = demo_data.demo_splits()
        return {"training" if name == "train" else name: split for name, split in splits.items()}
    if args.train_file is not None and args.validation_file is not None:
        train = _read(args, "train_file", find_file(args.train_file, args.data_dir))
        validation = _read(args, "validation_file", find_file(args.validation_file, args.data_dir))
    else:
        train, validation = _glue(args)
    splits = {"training": train, "validation": validation, ADV_GLUE: _adv_glue(args)}
    try:
        for name, path in named_paths(args.robust_files).items():
            if splits.get(name) is not None:
                raise InputError(f"robust_files={name!r} is taken; give the file another name.")
            splits[name] = _read(args, "robust_files", find_file(path, args.data_dir))
    except DataError as error:
        raise InputError(str(error)) from error
    return splits


def _glue(args: TrainArguments) -> tuple[Dataset, Dataset]:
    task = TASKS.get(str(args.task))
    validation = task.validation_split if task is not None else "validation"
    if args.data_dir is not None:
        folder = Path(args.data_dir) / "glue" / (task.glue_config if task is not None else str(args.task))
        try:
            files = find_split(folder, "train"), find_split(folder, validation)
        except DataError as error:
            raise InputError(f"data_dir={args.data_dir!r}: {error}") from error
        return _read(args, "data_dir", files[0]), _read(args, "data_dir", files[1])
    if task is None:
        raise InputError(
            f"task={args.task!r} is not on the hub; pass --data_dir, or --train_file and --validation_file."
        )
    hub = [_hub(args, "nyu-mll/glue", task.glue_config, split) for split in ("train", validation)]
    return hub[0], hub[1]


def _adv_glue(args: TrainArguments) -> Dataset | None:
    """AdvGLUE where the task has it: from `data_dir`, or from the hub for data from the hub."""
    task = TASKS.get(str(args.task))
    config = task.adv_config if task is not None else None
    if args.data_dir is not None:
        try:
            if task is not None and config is not None:
                file, key = adv_glue_file(task, args.data_dir)
            else:  # the user's own, in the same layout
                file, key = find_split(Path(args.data_dir) / "adv_glue" / f"adv_{args.task}", "validation"), None
        except DataError:
            return None
        return _read(args, "data_dir", file, key)
    if config is None or args.train_file is not None:
        return None
    return _hub(args, "AI-Secure/adv_glue", config, "validation")


def _read(args: TrainArguments, option: str, path: str | Path, key: str | None = None) -> Dataset:
    """Read one file; `key` names the list to take from a JSON object of lists."""
    try:
        table = read_table(path, [column for column in _columns(args) if column], key, label_column=args.label_column)
    except DataError as error:
        raise InputError(f"{option}={str(path)!r}: {error}") from error
    if Path(path).suffix in (".csv", ".tsv"):  # where all is text, a column of numbers is still none of texts
        for column in (name for name in _columns(args) if name in table and name != args.label_column):
            if len(table) and to_numeric(table[column], errors="coerce").notna().all():
                raise InputError(
                    f"text_column={column!r} holds {table[column][0]} in row 0 of {str(path)!r} and nothing but "
                    "numbers; pass the column of the texts."
                )
    if Path(path).suffix == ".parquet":
        return with_features(table, path)
    return Dataset.from_pandas(table, preserve_index=False)


def _hub(args: TrainArguments, path: str, name: str, split: str) -> Dataset:
    try:
        return read_hub(path, name, split)
    except DataError as error:
        raise InputError(
            f"task={args.task!r}: {error} That is --data_dir, or --train_file and --validation_file."
        ) from error


def _check_columns(split: str, data: Dataset, columns: tuple[str, str | None], label_column: str) -> None:
    if len(data) == 0:
        raise InputError(f"the {split} data is empty; pass a file with at least one row.")
    for option, column in (
        ("text_column", columns[0]),
        ("text_pair_column", columns[1]),
        ("label_column", label_column),
    ):
        if column is not None and column not in data.column_names:
            raise InputError(
                f"{option}={column!r} is not a column of the {split} data; pass one of {', '.join(data.column_names)}."
            )
    for row, label in enumerate(data[label_column]):
        if label is None or label != label or label == "":  # NaN is how tables mark a missing number
            raise InputError(
                f"label_column={label_column!r} is blank in row {row} of the {split} data; fill it in or leave the "
                "row out."
            )
    if label_column in columns:
        raise InputError(f"label_column={label_column!r} is a text column too; pass the column of the labels.")


def _label_names(train: Dataset, args: TrainArguments) -> list[str]:
    """Names of the labels in the order of their numbers: the data's own, else the task's, else the numbers."""
    column = args.label_column
    feature = train.features[column]
    values = set(train[column])
    if len(values) < 2:
        raise InputError(
            f"label_column={column!r} has a single label ({values.pop()!r}); nothing can be learnt from it."
        )
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    if all(isinstance(value, str) for value in values):
        return sorted(values)
    odd = [value for value in values if not isinstance(value, int) or value < 0]
    if odd:
        raise InputError(
            f"label_column={column!r} holds {odd[0]!r} in the training data; labels are integers from 0, or all names."
        )
    if args.task in TASKS:
        return list(TASKS[args.task].label_names)
    missing = next(value for value in range(len(values) + 1) if value not in values)
    if missing < len(values):
        raise InputError(
            f"label_column={column!r} holds {max(values)} but never {missing} in the training data; number the labels "
            "0, 1, ... without a gap, or use names."
        )
    return [str(value) for value in range(len(values))]


def _checked(
    split: str, data: Dataset, columns: tuple[str, str | None], label_column: str, names: list[str]
) -> Dataset:
    """Bring a split into the layout of `TextData`, after a look at every row."""
    content: dict[str, list[Any]] = {}
    for option, column in zip(("text", "text_pair"), columns, strict=True):
        if column is None:
            continue
        content[option] = list(data[column])
        for row, text in enumerate(content[option]):
            if not isinstance(text, str):
                raise InputError(
                    f"{option}_column={column!r} holds {text!r} in row {row} of the {split} data, which is no text; "
                    "correct it or leave the row out."
                )
    numbers = {name: number for number, name in enumerate(names)}
    labels = [numbers.get(value, value) if isinstance(value, str) else value for value in data[label_column]]
    for row, label in enumerate(labels):
        if not isinstance(label, int) or not 0 <= label < len(names):
            raise InputError(
                f"label_column={label_column!r} holds {label!r} in row {row} of the {split} data, but the labels are "
                f"{', '.join(names)}; correct it or leave the row out."
            )
    return Dataset.from_dict({**content, "label": [int(label) for label in labels]})
