"""The rows of many result files as one table, one line per method, task, seed and number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..results import MEASURES, Result

if TYPE_CHECKING:
    from pandas import DataFrame

_KEY = ["task", "method", "seed", "measure", "part", "rate"]


@dataclass(frozen=True)
class Run:
    """A result and the file it came from."""

    path: Path
    result: Result


class Column(NamedTuple):
    """A number that runs are compared by; its `rate` is 0 where it comes in no amounts."""

    measure: str
    part: str
    rate: float

    @property
    def is_share(self) -> bool:
        """Whether it reads best in per cent."""
        return MEASURES[self.measure].is_share

    @property
    def scale(self) -> float:
        """What to multiply values with to show them."""
        return 100.0 if self.is_share else 1.0

    def title(self, unit: str = "%") -> str:
        """What it is called above a column of a table."""
        name = MEASURES[self.measure].title.format(part=self.part)
        return name + (f" at {self.rate:g}" if self.rate else "") + (f" ({unit})" if self.is_share and unit else "")

    def number(self, value: float, sign: str = "") -> str:
        """Format a value: one decimal for per cent, at least three digits for the rest."""
        value *= self.scale
        if self.is_share:
            return f"{value:{sign}.1f}"
        return f"{value:{sign}.0f}" if abs(value) >= 100 else f"{value:{sign}.3g}"


def gather(runs: Sequence[Run], problems: list[str]) -> DataFrame:
    """Join the rows of all files; of several about the same number the first is kept, and others are named.

    Args:
        runs: The results, several per method, task and seed allowed.
        problems: Gets one line for each number that two files give differently.

    Returns:
        A table with the columns task, method, seed, measure, part, rate (0 for none), value, n, low, high, path.
    """
    from pandas import DataFrame

    rows = [
        {"task": run.result.task, "method": run.result.method, "seed": run.result.seed, **row.as_dict()}
        | {"path": str(run.path).encode(errors="backslashreplace").decode()}
        for run in runs
        for row in run.result.rows
    ]
    frame = DataFrame(rows, columns=[*_KEY, "value", "n", "low", "high", "path"])
    numbers = ["rate", "value", "n", "low", "high"]
    frame = frame.astype(dict.fromkeys(numbers, float)).fillna({"rate": 0.0})
    # Every attack repeats the clean accuracy of its own sample; the one over most examples is the best one.
    clean = frame["measure"] == "clean_accuracy"
    first = frame.assign(order=-frame["n"].where(clean, 0).fillna(0)).sort_values("order", kind="stable")
    kept = first.drop_duplicates(_KEY).sort_index().drop(columns="order")
    both = frame.merge(kept, on=_KEY, suffixes=("", "_kept"))
    # Clean accuracies over fewer examples than the one kept are of samples, and need not agree.
    sample = (both["measure"] == "clean_accuracy") & (both["n"] != both["n_kept"])
    other = (both["value"] != both["value_kept"]) & both[["value", "value_kept"]].notna().any(axis=1)
    differs = both[other & ~sample]
    for row in differs.itertuples():
        column = Column(str(row.measure), str(row.part), float(str(row.rate)))
        problems.append(
            f"{row.path}: {column.title('')} of {row.method}, {row.task}, seed {row.seed} is {row.value} here and "
            f"{row.value_kept} in another file; the other one is shown."
        )
    return kept.reset_index(drop=True)


def columns(frame: DataFrame, place: str) -> list[Column]:
    """Return the numbers that belong into one kind of table, in the order of `MEASURES`."""
    found = frame[["measure", "part", "rate"]].drop_duplicates().itertuples(index=False)
    ours = [Column(*row) for row in found if MEASURES[row.measure].place == place]
    order = list(MEASURES)
    return sorted(ours, key=lambda column: order.index(column.measure))


def select(frame: DataFrame, column: Column) -> DataFrame:
    """Return the lines about one number."""
    same = (frame["measure"] == column.measure) & (frame["part"] == column.part) & (frame["rate"] == column.rate)
    return frame[same]


def by_seed(frame: DataFrame, column: Column) -> DataFrame:
    """Return a number of one task as a table of seeds by methods; NaN where a run lacks it."""
    return select(frame, column).pivot(index="seed", columns="method", values="value")


def seeds_of(frame: DataFrame) -> dict[str, int]:
    """Count the seeds of each method; a cost alone is no run."""
    measured = frame[frame["measure"].map(lambda measure: MEASURES[measure].place != "cost")]
    return measured.groupby("method", sort=False)["seed"].nunique().to_dict()
