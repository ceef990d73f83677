"""Loading labelled text from the hub, from files, or from the demo's generator, and checking it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arguments import InputError, TrainArguments
from datasets import ClassLabel, Dataset, load_dataset
from demo_data import demo_splits

# Text columns per GLUE task, and the name of its validation split.
TASKS: dict[str, tuple[str, str | None]] = {
    "sst2": ("sentence", None),
    "cola": ("sentence", None),
    "mrpc": ("sentence1", "sentence2"),
    "qqp": ("question1", "question2"),
    "mnli": ("premise", "hypothesis"),
    "qnli": ("question", "sentence"),
    "rte": ("sentence1", "sentence2"),
    "wnli": ("sentence1", "sentence2"),
}
WITH_ADV_GLUE = ("sst2", "qqp", "mnli", "qnli", "rte")
FORMATS = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json"}


@dataclass(frozen=True)
class TextData:
    """Checked splits with integer labels in the column `label`.

    Args:
        train: Training split.
        validation: Validation split.
        robust: Adversarial or robust test, if there is one.
        robust_name: What it is called in tables.
        columns: Text column, and the second one or None.
        labels: Names of the labels, in order.
    """

    train: Dataset
    validation: Dataset
    robust: Dataset | None
    robust_name: str
    columns: tuple[str, str | None]
    labels: list[str]


def load_text(args: TrainArguments) -> TextData:
    """Load and check the data that the options name.

    Raises:
        InputError: If files, columns or labels are missing or wrong.
    """
    robust: Dataset | None = None
    if args.is_demo:
        splits = demo_splits()
        train, validation, robust = splits["train"], splits["validation"], splits["robust"]
        columns: tuple[str, str | None] = ("sentence", None)
    else:
        columns = _columns(args)
        if args.train_file is not None and args.validation_file is not None:
            train, validation = _read(args.train_file, "train_file"), _read(args.validation_file, "validation_file")
        else:
            train, validation, robust = _glue(args)
    for name, split in (("training", train), ("validation", validation), ("robust", robust)):
        if split is not None:
            _check_columns(name, split, columns, args.label_column)
    names = _label_names(train, args.label_column)
    if args.max_train_samples is not None and args.max_train_samples < len(train):
        train = train.shuffle(seed=0).select(range(args.max_train_samples))
    return TextData(
        train=_with_labels("training", train, args.label_column, names),
        validation=_with_labels("validation", validation, args.label_column, names),
        robust=_with_labels("robust", robust, args.label_column, names) if robust is not None else None,
        robust_name="robust" if args.is_demo else "AdvGLUE",
        columns=columns,
        labels=names,
    )


def _columns(args: TrainArguments) -> tuple[str, str | None]:
    if args.text_column is not None:
        return args.text_column, args.text_pair_column
    if args.task is None:
        raise InputError("text_column is missing: files without --task need --text_column.")
    if args.task not in TASKS:
        raise InputError(
            f"task={args.task!r} is unknown; choose one of {', '.join(TASKS)}, or pass --train_file, "
            "--validation_file and --text_column."
        )
    return TASKS[args.task]


def _read(path: str, option: str) -> Dataset:
    file = Path(path)
    if file.suffix not in FORMATS:
        raise InputError(f"{option}={path!r} has an unknown ending; use one of {', '.join(FORMATS)}.")
    if not file.is_file():
        raise InputError(f"{option}={path!r} does not exist; check the path.")
    try:
        return load_dataset(FORMATS[file.suffix], data_files={"data": str(file)}, split="data")
    except Exception as error:  # each reader has its own errors, none of which names the option
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise InputError(f"{option}={path!r} cannot be read ({reason}); check that it is whole.") from error


def _glue(args: TrainArguments) -> tuple[Dataset, Dataset, Dataset | None]:
    assert args.task is not None
    if args.data_dir is not None:
        root = Path(args.data_dir)
        train = _read(str(root / "glue" / args.task / "train.parquet"), "data_dir")
        validation = _read(str(root / "glue" / args.task / "validation.parquet"), "data_dir")
        adversarial = root / "adv_glue" / f"adv_{args.task}" / "validation.parquet"
        return train, validation, _read(str(adversarial), "data_dir") if adversarial.is_file() else None
    split = "validation_matched" if args.task == "mnli" else "validation"
    train = _hub("nyu-mll/glue", args.task, "train")
    validation = _hub("nyu-mll/glue", args.task, split)
    robust = _hub("AI-Secure/adv_glue", f"adv_{args.task}", "validation") if args.task in WITH_ADV_GLUE else None
    return train, validation, robust


def _hub(path: str, name: str, split: str) -> Dataset:
    try:
        return load_dataset(path, name, split=split)
    except Exception as error:  # the hub client raises many kinds
        reason = str(error).strip().splitlines()[0][:120]
        raise InputError(
            f"task={name!r}: {path} cannot be loaded from the hub ({reason}); pass --data_dir, or --train_file and "
            "--validation_file."
        ) from error


def _check_columns(split: str, data: Dataset, columns: tuple[str, str | None], label_column: str) -> None:
    for option, column in (
        ("text_column", columns[0]),
        ("text_pair_column", columns[1]),
        ("label_column", label_column),
    ):
        if column is not None and column not in data.column_names:
            raise InputError(
                f"{option}={column!r} is not a column of the {split} data, which has {', '.join(data.column_names)}."
            )
    if len(data) == 0:
        raise InputError(f"the {split} data is empty; pass a file with at least one row.")


def _label_names(train: Dataset, column: str) -> list[str]:
    feature = train.features[column]
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    values = set(train[column])
    if all(isinstance(value, str) for value in values):
        return sorted(values)
    if not all(isinstance(value, int) for value in values) or min(values) < 0:
        odd = next(value for value in values if not isinstance(value, int) or value < 0)
        raise InputError(f"label_column={column!r} holds {odd!r} in the training data; labels are integers from 0.")
    return [str(value) for value in range(max(values) + 1)]


def _with_labels(split: str, data: Dataset, column: str, names: list[str]) -> Dataset:
    values: list[Any] = data[column][:]
    numbers = [names.index(value) if value in names else value for value in values]
    for row, number in enumerate(numbers):
        if not isinstance(number, int) or not 0 <= number < len(names):
            raise InputError(
                f"label_column={column!r} holds {number!r} in row {row} of the {split} data, but the training labels "
                f"are {', '.join(names)}; correct it or leave the row out."
            )
    if len(names) < 2:
        raise InputError(f"label_column={column!r} has a single label ({names[0]}); nothing can be learnt from it.")
    return data.remove_columns([column]).add_column("label", numbers)
