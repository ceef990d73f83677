"""Options that the subcommands share: which model, which data, where to run; and what ends in one line."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data import Examples, get_task, load_file, load_glue, read_table
from ..errors import DataError, RobustnessError
from ..loading import load_classifier, model_name, model_seed
from ..predict import Predictor, Text
from ..robust_sets import load_robust_files


@dataclass
class DataArguments:
    """Which examples to evaluate on."""

    task: str | None = field(
        default=None,
        metadata={"help": "GLUE task: sst2, qqp, mnli, mnli-mm, qnli, rte, cola, mrpc or wnli. Its evaluation split."},
    )
    data_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder with glue/TASK/validation.parquet (mnli: validation_matched.parquet, as on the hub) and "
            "adv_glue/adv_TASK/validation.parquet, or AdvGLUE's own adv_glue/dev_ann.json or dev.json. "
            "Default: the hub data sets nyu-mll/glue and AI-Secure/adv_glue."
        },
    )
    split: str | None = field(
        default=None, metadata={"help": "With task: another split than the evaluation split, such as train."}
    )
    data_file: str | None = field(
        default=None, metadata={"help": "Instead of a task: a .parquet, .csv, .tsv, .json or .jsonl file."}
    )
    text_columns: list[str] = field(
        default_factory=list, metadata={"help": "With data_file: its text column, or both columns of pairs."}
    )
    label_column: str = field(default="label", metadata={"help": "With data_file: the column of the labels."})
    label_names: list[str] = field(
        default_factory=list, metadata={"help": "With data_file: the labels' names, in the order of their numbers."}
    )

    def load(self) -> Examples:
        """Load the examples.

        Raises:
            RobustnessError: If options contradict each other or the data cannot be used.
        """
        self._check()
        if self.task is not None:
            return load_glue(self.task, self.data_dir, self.split)
        assert self.data_file is not None
        return load_file(self.data_file, self.text_columns, self.label_column, self.label_names or None)

    def load_texts(self) -> list[Text]:
        """Load the texts alone, whether they have labels or not.

        Raises:
            RobustnessError: If options contradict each other or the data cannot be used.
        """
        self._check()
        if self.data_file is None:
            return list(self.load().texts)
        table = read_table(self.data_file, self.text_columns)
        missing = [column for column in self.text_columns if column not in table]
        if missing:
            raise DataError(f"{self.data_file}: no column {missing[0]!r} among {list(table)}; name the right one.")
        texts: list[Text] = list(table[self.text_columns].itertuples(index=False, name=None))
        for position, text in enumerate(texts):
            if not all(isinstance(part, str) for part in text):
                raise DataError(f"{self.data_file}: example {position} is {text!r}, not texts.")
        return texts

    def _check(self) -> None:
        if (self.task is None) == (self.data_file is None):
            raise DataError(f"task={self.task!r} and data_file={self.data_file!r}: pass exactly one of them.")
        if self.task is not None and (self.text_columns or self.label_names):
            raise DataError("text_columns and label_names describe a data_file; a task knows its own.")
        if self.data_file is not None and (self.split is not None or self.data_dir is not None):
            raise DataError("split and data_dir belong to a task; a data_file is read whole.")
        if self.data_file is not None and not self.text_columns:
            raise DataError(f"data_file={self.data_file!r} needs --text_columns.")

    def load_robust(self, entries: Sequence[str]) -> dict[str, Examples]:
        """Load robust sets that are laid out as these examples.

        Raises:
            RobustnessError: If one cannot be used.
        """
        columns, names = self.text_columns, self.label_names or None
        if self.task is not None:
            columns, names = list(get_task(self.task).text_columns), list(get_task(self.task).label_names)
        return load_robust_files(entries, columns, self.label_column, names, self.data_dir)

    def classes(self, examples: Examples) -> int:
        """Return the number of classes a model for these examples has."""
        return len(examples.label_names or ()) or max(examples.labels) + 1

    def names(self) -> list[str]:
        """Return the names of the labels, where options or task say them."""
        return list(get_task(self.task).label_names) if self.task is not None else self.label_names


@dataclass
class RunArguments:
    """How to run the model."""

    tokenizer: str | None = field(default=None, metadata={"help": "Tokenizer, if not the model's own."})
    device: str = field(
        default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "Device, such as cpu or cuda."}
    )
    dtype: str = field(default="float32", metadata={"help": "Precision of the weights: float32, bfloat16 or float16."})
    bf16: bool = field(default=False, metadata={"help": "Run under bfloat16 autocast, whatever the weights are."})
    batch_size: int = field(default=64, metadata={"help": "Texts per forward pass."})
    max_length: int | None = field(
        default=None, metadata={"help": "Longest input in tokens. Default: what model and tokenizer allow."}
    )

    def check(self, output_dir: str | os.PathLike[str], seed: int) -> None:
        """Check before anything long runs that the output folder can be written and the seed is one.

        Raises:
            RobustnessError: Naming the option.
        """
        if not 0 <= seed < 2**32:
            raise RobustnessError(f"seed={seed}: must lie between 0 and 2**32 - 1.")
        try:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=output_dir):
                pass
        except OSError as error:
            raise RobustnessError(
                f"output_dir={os.fspath(output_dir)!r}: cannot be written ({error.strerror}); choose another folder."
            ) from error

    def load(self, name_or_path: str, classes: int) -> tuple[nn.Module, Any]:
        """Load a model and its tokenizer.

        Raises:
            ModelError: If that fails.
        """
        return load_classifier(name_or_path, classes, tokenizer=self.tokenizer, device=self.device, dtype=self.dtype)

    def options(self) -> dict[str, Any]:
        """Return the options of `Predictor`."""
        return {"batch_size": self.batch_size, "max_length": self.max_length, "bf16": self.bf16}

    def written(self, model: nn.Module, tokenizer: Any) -> dict[str, Any]:
        """Return what a result file says of how the model was run.

        Args:
            model: As `load` gave it.
            tokenizer: Likewise.
        """
        longest = Predictor(model, tokenizer, **self.options()).max_length
        return {**self.options(), "max_length": longest, "dtype": self.dtype, "tokenizer": self.tokenizer}


@dataclass
class LabelArguments:
    """What to write into result files."""

    method: str | None = field(
        default=None,
        metadata={
            "help": "Name of the model's training method. Default: the folder of the model or run; above seedN."
        },
    )
    training_seed: int | None = field(
        default=None,
        metadata={"help": "Seed that the model was trained with. Default: N of a folder seedN, else 0."},
    )

    def of(self, model: str) -> tuple[str, int]:
        """Method and seed of a model.

        Args:
            model: Its folder or hub name.
        """
        seed = self.training_seed if self.training_seed is not None else model_seed(model)
        return self.method or model_name(model), seed or 0


def parse(types: tuple[Any, ...], command: str, description: str | None, argv: list[str]) -> tuple[Any, ...]:
    """Read the options of a subcommand; an unknown one ends the program with exit code 2 after one line."""
    from .parser import Parser

    return Parser(types, prog=f"python -m rose_peft.robustness {command}", description=description).read(argv)


def named(entries: Sequence[str]) -> dict[str, str]:
    """Split `name=path` entries; an entry without `=` is called by its run, or its path's last part.

    Raises:
        RobustnessError: If two have the same name.
    """
    found: dict[str, str] = {}
    for entry in entries:
        name, separator, path = entry.partition("=")
        if not separator:
            name, path = model_name(entry), entry
        if name in found:
            raise RobustnessError(f"models: two are called {name!r}; name them apart, as in {name}-1={path}.")
        found[name] = path
    return found


def fail(error: Exception) -> int:
    """Print an error as one line and return the exit code for it."""
    print(f"error: {error}", file=sys.stderr)
    return 2
