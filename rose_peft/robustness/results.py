"""The result file `*.result.json`: what one evaluation of one model writes, and the report reads.

A JSON object with these keys:

| key | meaning |
|---|---|
| `schema_version` | `SCHEMA_VERSION` of the kit that wrote it |
| `method`, `task`, `seed` | what was trained, on what, with which training seed |
| `rows` | a table: objects with `measure`, `part`, `rate`, `value`, `n`, `low`, `high` |
| `versions` | package -> version; in a clone also the last commit that touched ours, `+` where files differ from it |
| `config` | everything else one needs to repeat the run |
| `images` | title -> path of a picture, relative to the result file |

`measure` is one of `MEASURES`; `part` says of what (a kind of noise, an attack, a robust set), `rate` how much of it.
Accuracies and shares are fractions; what was not finite is null.
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .errors import ResultFileError, first_line
from .estimate import Estimate

SCHEMA_VERSION = 2
"""Version of the layout of result files; those of another one are refused."""
SUFFIX = ".result.json"

_PACKAGES = (
    "rose-peft",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "textattack",
    "nltk",
    "numpy",
    "scipy",
)


@dataclass(frozen=True)
class Measure:
    """How a measure is read.

    Args:
        title: What it is called in tables; `{part}` stands for the part.
        is_share: Whether it is a fraction, shown in per cent.
        place: Table of the report: "main", "details", "sources", "cost", or "" for none of its own.
        same_examples: Whether it is over all examples, so that two runs can be compared over equally many only.
    """

    title: str
    is_share: bool = True
    place: str = "main"
    same_examples: bool = False


MEASURES: dict[str, Measure] = {
    "clean_accuracy": Measure("clean accuracy", same_examples=True),
    "robust_accuracy": Measure("{part} accuracy", same_examples=True),
    "source_accuracy": Measure("{part}", place="sources"),
    "noise_accuracy": Measure("noise {part} accuracy", place="", same_examples=True),
    "noise_mean_accuracy": Measure("noise mean accuracy"),
    "accuracy_under_attack": Measure("accuracy under {part}"),
    "attack_clean_accuracy": Measure("{part} clean accuracy", place=""),
    "attack_errors": Measure("{part} errors", is_share=False, place=""),
    "attack_success_rate": Measure("{part} success rate", place="details"),
    "attack_words_changed": Measure("{part} words changed", place="details"),
    "attack_queries": Measure("{part} queries", is_share=False, place="details"),
    "loss": Measure("loss", is_share=False, place="details"),
    "worst_loss_increase": Measure("worst loss increase", is_share=False),
    "hessian_trace": Measure("Hessian trace", is_share=False),
    "flipped_share": Measure("predictions flipped by {part}"),
    "divergence": Measure("divergence under {part}", is_share=False, place="details"),
    "step_time": Measure("time of a step, x {part}", is_share=False, place="cost"),
    "step_seconds": Measure("{part}, seconds per step", is_share=False, place=""),
    "relative_time": Measure("{part}, time of a step x plain", is_share=False, place=""),
    "peak_memory": Measure("{part}, peak memory in MB", is_share=False, place=""),
    "mask_agreement": Measure("{part}, agreement with the expected mask", place=""),
    "mask_agreement_difference": Measure("{part}, agreement less that of a published draw", place=""),
}
"""What a row of a result may measure, by name: the column of its table and how it is written."""


@dataclass(frozen=True)
class Row:
    """One measured number of a run.

    Args:
        measure: One of `MEASURES`.
        estimate: The number with its interval.
        part: What it is of: a kind of noise, an attack, a robust set.
        rate: How much of it, where it comes in amounts.
    """

    measure: str
    estimate: Estimate
    part: str = ""
    rate: float | None = None

    def __post_init__(self) -> None:
        if self.measure not in MEASURES:
            raise ResultFileError(f"measure={self.measure!r} is unknown; known are {', '.join(MEASURES)}.")

    @property
    def title(self) -> str:
        """What the number is, in words."""
        return MEASURES[self.measure].title.format(part=self.part) + (
            f" at {self.rate:g}" if self.rate is not None else ""
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the row as it stands in a file."""
        return {"measure": self.measure, "part": self.part, "rate": self.rate, **asdict(self.estimate)}

    @classmethod
    def from_dict(cls, entry: dict[str, Any]) -> Row:
        """Read a row of a file."""
        estimate = Estimate(entry["value"], entry["n"], entry["low"], entry["high"])
        return cls(entry["measure"], estimate, entry["part"], entry["rate"])


def find(rows: Sequence[Row], measure: str, part: str = "", rate: float | None = None) -> Estimate | None:
    """Return the number of this measure, part and rate; None where there is none."""
    key = (measure, part, rate)
    return next((row.estimate for row in rows if (row.measure, row.part, row.rate) == key), None)


def installed_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a result depends on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    commit = source_commit(Path(__file__).parents[1])
    return {**found, "rose-peft commit": commit} if commit else found


@lru_cache
def source_commit(folder: Path) -> str:
    """Name the last commit that touched a folder, with a `+` where its files differ from it; "" outside of a clone.

    Args:
        folder: Any folder; one that git does not track, as in a virtual environment inside a clone, has no commit.
    """

    def git(*command: str) -> str:
        return subprocess.run(["git", "-C", folder, *command], capture_output=True, text=True, check=True).stdout

    try:
        commit = git("log", "-1", "--format=%h", "--", ".").strip()
        return commit + "+" * bool(commit and git("status", "--porcelain", "--", ".").strip())
    except (OSError, subprocess.CalledProcessError):
        return ""


@dataclass
class Result:
    """The content of one result file; see the module's page for the meaning of the fields."""

    method: str
    task: str
    seed: int
    rows: list[Row] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    images: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=installed_versions)

    def get(self, measure: str, part: str = "", rate: float | None = None) -> Estimate | None:
        """Return the number of this measure, part and rate; None where there is none."""
        return find(self.rows, measure, part, rate)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the result; a reader, or a killed writer, never leaves or sees half a file.

        Args:
            path: The file; its name ends in `SUFFIX`, by which the report finds it.

        Raises:
            ResultFileError: If the name does not end so, or the file cannot be written.
        """
        if not Path(path).name.endswith(SUFFIX):
            raise ResultFileError(f"path={os.fspath(path)!r} must end in {SUFFIX}, by which the report finds results.")
        content = {name: getattr(self, name) for name in ("method", "task", "seed", "config", "images", "versions")}
        rows = [row.as_dict() for row in self.rows]
        write_json(path, {"schema_version": SCHEMA_VERSION, **content, "rows": rows})


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write JSON in one atomic step, making the folder if need be; numbers JSON cannot hold become null.

    Raises:
        ResultFileError: If the file cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(_finite(content), file, indent=1, ensure_ascii=False, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if os.name == "posix":  # the name in the folder is on the disk too
            descriptor = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise ResultFileError(f"{path}: cannot be written ({error.strerror}); choose another folder.") from error
        raise


def load_result(path: str | os.PathLike[str]) -> Result:
    """Read one result file.

    Raises:
        ResultFileError: If the file cannot be read, is truncated or no result, or has another schema version.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        found = content.pop("schema_version")
        if found == SCHEMA_VERSION:
            return Result(**{**content, "rows": [Row.from_dict(entry) for entry in content["rows"]]})
    except OSError as error:
        raise ResultFileError(f"{path}: cannot be read ({error.strerror}); check the path.") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ResultFileError(
            f"{path}: is truncated or no result file ({first_line(error)}); run that evaluation again."
        ) from None
    raise ResultFileError(
        f"{path}: schema_version={found}, this version of the kit reads {SCHEMA_VERSION}; run that evaluation again, "
        "or report with the version that wrote it."
    )


def _finite(content: Any) -> Any:
    """Replace numbers that JSON cannot hold by null."""
    if isinstance(content, dict):
        return {str(key): _finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return None
    return content
