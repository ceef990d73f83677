"""The result file: what one evaluation of one model writes, and the report reads.

A JSON object with these keys:

| key | meaning |
|---|---|
| `schema_version` | `SCHEMA_VERSION` of the kit that wrote it |
| `method`, `task`, `seed` | what was trained, on what, with which training seed |
| `figures` | name -> `{"value": number or null, "n": count?, "low": number?, "high": number?}` |
| `cost` | name -> number, such as seconds per step |
| `versions` | package -> version |
| `config` | everything else one needs to repeat the run |
| `images` | title -> path of a picture, relative to the result file |

Accuracies and shares are fractions. A figure's name is a path: `clean/accuracy`, `adv_glue/accuracy`,
`adv_glue/source/<source>/accuracy`, `noise/<kind>@<rate>/accuracy`, `attack/<recipe>/accuracy_under_attack`, ...
"""

from __future__ import annotations

import errno
import json
import math
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .errors import ResultFileError
from .intervals import Interval, bootstrap_mean, wilson

SCHEMA_VERSION = 1

# What the `results.json` of a run of examples/train.py holds, which begins like a result but has no figures.
_TRAINING_RUN = {"best", "history", "timing"}
# In bytes; results are far below it.
_LARGE = 1 << 20

_PACKAGES = ("rose-peft", "torch", "transformers", "peft", "datasets", "textattack", "nltk", "numpy")


@dataclass(frozen=True)
class Figure:
    """One measured number; `value` is None where there was nothing to measure or it was not finite."""

    value: float | None
    n: int | None = None
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, interval: Interval, n: int) -> Figure:
        """Make a figure from an estimate over `n` observations."""
        return cls(interval.value, n, interval.low, interval.high)

    def __str__(self) -> str:
        if self.value is None:
            return "undefined"
        text = f"{self.value:.4g}"
        if self.low is not None and self.high is not None:
            text += f" [{self.low:.4g}, {self.high:.4g}]"
        return text + (f" (n={self.n})" if self.n is not None else "")


def share_figure(outcomes: Sequence[bool]) -> Figure:
    """Make a figure of the share of true outcomes with its 95 % Wilson interval; undefined if there are none."""
    n = len(outcomes)
    return Figure.of(wilson(sum(map(bool, outcomes)), n), n) if n else Figure(None, 0)


def mean_figure(values: Sequence[float]) -> Figure:
    """Make a figure of a mean with its 95 % bootstrap interval; undefined if there are no values."""
    return Figure.of(bootstrap_mean(values), len(values)) if len(values) else Figure(None, 0)


def installed_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a result depends on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


@dataclass
class Result:
    """The content of one result file; see the module's page for the meaning of the fields."""

    method: str
    task: str
    seed: int
    figures: dict[str, Figure] = field(default_factory=dict)
    cost: dict[str, float] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    images: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=installed_versions)
    schema_version: int = SCHEMA_VERSION

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the result to `path`; a reader, or a killed writer, never leaves or sees half a file."""
        # The version comes first, so that it can be read from a truncated file too.
        write_json(path, {"schema_version": self.schema_version, **asdict(self)})


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write JSON to `path` in one atomic step, making the folder if need be; numbers JSON cannot hold become null."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(_finite(content), file, indent=1, ensure_ascii=False, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def load_result(path: str | os.PathLike[str]) -> Result:
    """Read one result file.

    Args:
        path: A file that `Result.save` wrote.

    Returns:
        The result.

    Raises:
        ResultFileError: If the file cannot be read, is truncated or no result, has another schema version, or holds
            a value of the wrong kind.
    """
    content = _read_json(Path(path))
    if not isinstance(content, dict) or "schema_version" not in content:
        raise ResultFileError(f"{path}: has no schema_version, so it is no result file; leave it out.")
    if _is_training_run(content):
        raise ResultFileError(f"{path}: is about a run of training and holds no figures of the kit; leave it out.")
    if content["schema_version"] != SCHEMA_VERSION:
        raise ResultFileError(
            f"{path}: schema_version={content['schema_version']}, this version of the kit reads {SCHEMA_VERSION}; "
            "run that evaluation again, or report with the version that wrote it."
        )
    wanted = {"method": str, "task": str, "seed": int, "figures": dict}
    for key, kind in wanted.items():
        if not isinstance(content.get(key), kind) or isinstance(content.get(key), bool):
            raise ResultFileError(
                f"{path}: {key}={content.get(key)!r} is no {kind.__name__}; run that evaluation again."
            )
    for key in ("method", "task"):
        if any("\ud800" <= letter <= "\udfff" for letter in content[key]):  # half a letter, which no picture can show
            raise ResultFileError(f"{path}: {key}={content[key]!a} is no valid text; run that evaluation again.")
    figures = {name: _read_figure(path, name, entry) for name, entry in content.pop("figures").items()}
    unknown = set(content) - set(Result.__dataclass_fields__)
    if unknown:
        raise ResultFileError(f"{path}: unknown keys {sorted(unknown)}; keep additions under config.")
    for key in ("cost", "config", "images", "versions"):
        if not isinstance(content.setdefault(key, {}), dict):
            raise ResultFileError(f"{path}: {key}={content[key]!r} is no object; run that evaluation again.")
    for name, number in content["cost"].items():
        if not _is_number_or_null(number):
            raise ResultFileError(f"{path}: cost {name!r} is {number!r}, no finite number; run that evaluation again.")
    for key in ("images", "versions"):
        for name, text in content[key].items():
            if not isinstance(text, str):
                raise ResultFileError(f"{path}: {key} {name!r} is {text!r}, no text; run that evaluation again.")
    return Result(figures=figures, **content)


def may_be_result(path: str | os.PathLike[str]) -> bool:
    """Tell whether a file is a result, or so broken that it may have been one.

    Valid JSON of another kind, such as a model's configuration, is neither.

    Args:
        path: Any file; folders, pipes and devices are no results.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            return False
        if path.stat().st_size > _LARGE and _begins_and_ends_as_foreign(path):
            return False
        content = _read_json(path)
    except (OSError, ResultFileError):
        return True  # `load_result` says what is wrong with it
    return isinstance(content, dict) and "schema_version" in content and not _is_training_run(content)


def _begins_and_ends_as_foreign(path: Path) -> bool:
    """Spare large files, such as a tokenizer's, from being parsed."""
    with open(path, "rb") as file:
        start = file.read(100)
        file.seek(-100, os.SEEK_END)
        end = file.read()
    return b'"schema_version"' not in start and end.rstrip().endswith((b"}", b"]"))


def _is_training_run(content: dict[str, Any]) -> bool:
    return "figures" not in content and content.keys() >= _TRAINING_RUN


def _read_json(path: Path) -> Any:
    try:
        if path.exists() and not path.is_file():  # to open a pipe would be to wait for its writer
            raise OSError(errno.EINVAL, "no regular file")
        return json.loads(path.read_bytes())
    except OSError as error:
        raise ResultFileError(f"{path}: cannot be read ({error.strerror}); check the path.") from None
    except UnicodeDecodeError:
        raise ResultFileError(f"{path}: is not text; pass the JSON files that the kit wrote.") from None
    except json.JSONDecodeError as error:
        raise ResultFileError(
            f"{path}: truncated or not JSON (line {error.lineno}: {error.msg}); run that evaluation again."
        ) from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, and deep nesting
        raise ResultFileError(f"{path}: JSON beyond what can be read ({error}); run that evaluation again.") from None


def _is_number_or_null(value: Any) -> bool:
    """Tell finite numbers, and null, which stands for what was not finite, from all else."""
    if value is None:
        return True
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _read_figure(path: str | os.PathLike[str], name: str, entry: Any) -> Figure:
    if not isinstance(entry, dict) or "value" not in entry or set(entry) - {"value", "n", "low", "high"}:
        raise ResultFileError(f"{path}: figure {name!r} is {entry!r}, not value, n, low and high; run it again.")
    for key, number in entry.items():
        if not _is_number_or_null(number):
            raise ResultFileError(
                f"{path}: figure {name!r} has {key}={number!r}, which is no finite number; run that evaluation again."
            )
    return Figure(**entry)


def _finite(content: Any) -> Any:
    """Replace numbers that JSON cannot hold by null."""
    if isinstance(content, dict):
        return {str(key): _finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return None
    return content
