"""One figure of robustness per method, over all test sets of all tasks together, and the same of each task alone.

Many test sets invite to pick the one that a method wins. Here each counts the same: the difference to the baseline of
the same seed, in units of how much accuracy on that set varies from seed to seed anyway, then the mean over the sets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..estimate import bootstrap_mean, paired_difference
from ..results import MEASURES

if TYPE_CHECKING:
    from pandas import DataFrame, Series

#: What is a test set: named ones, AdvGLUE among them, noise (the mean over it counts as one), and each attack.
TEST_SETS = ("robust_accuracy", "noise_mean_accuracy", "accuracy_under_attack")
_SET = ["task", "measure", "part", "rate"]
#: In place of a task's name, what is pooled over all of them.
ALL_TASKS = "all"
# Degrees of freedom without which the spread over seeds is not known to a factor of three.
_FREEDOM = 3
# Far below the spread between any two accuracies that differ, and far above rounding.
_NO_SPREAD = 1e-9


def pooled_robustness(frame: DataFrame, methods: Sequence[str], baseline: str) -> tuple[DataFrame, list[str]]:
    """Pool what the methods gain over the baseline on all test sets.

    The unit of a set is the standard deviation over seeds within methods, pooled over all methods, so that it is the
    same for each of them and no gain of one goes into it. A method is compared over those seeds for which it and the
    baseline have each set that both have at all; the seed is what is resampled, since the sets of one run go together.

    Args:
        frame: Lines of all tasks.
        methods: The methods, in the order wanted.
        baseline: What they are compared with.

    Returns:
        One line per method with the mean (value), the number of seeds (n) and of test sets (sets), the 95 % interval
        of Student's t (low, high) and the bootstrap's (bootstrap_low, bootstrap_high); and the names of the sets that
        are left out because all seeds of a method agree on them.
    """
    from pandas import DataFrame

    sets = frame[frame["measure"].isin(TEST_SETS)].dropna(subset="value")
    if sets.empty:
        return DataFrame(), []
    table = sets.pivot(index=["method", "seed"], columns=_SET, values="value")
    units = table.apply(_spread_within_methods)
    flat = units.index[units <= _NO_SPREAD]
    left_out = [f"{task} {MEASURES[measure].title.format(part=part)}" for task, measure, part, _ in flat]
    unknown = units.index[units.isna()]  # too few seeds to tell the spread
    table = (table / units).drop(columns=[*flat, *unknown])
    known = set(table.index.get_level_values("method"))
    rows = []
    for method in (name for name in methods if name != baseline and {name, baseline} <= known):
        ours, theirs = (table.loc[name].dropna(axis="columns", how="all") for name in (method, baseline))
        gains = (ours - theirs).loc[:, ours.columns.intersection(theirs.columns)].dropna()
        if gains.empty:
            continue
        pooled = gains.mean(axis="columns").tolist()
        found, other = paired_difference(pooled, [0.0] * len(pooled)), bootstrap_mean(pooled)
        interval = {"low": found.low, "high": found.high}
        interval |= {"bootstrap_low": other.low, "bootstrap_high": other.high}
        rows.append({"method": method, "value": found.value, "n": found.n, "sets": gains.shape[1], **interval})
    return DataFrame(rows), left_out


def pooled_by_task(frame: DataFrame, methods: Sequence[str], baseline: str) -> tuple[DataFrame, list[str]]:
    """Pool over all tasks, and where there are several over each: one may have seeds that another still lacks.

    Args:
        frame: Lines of all tasks.
        methods: The methods, in the order wanted.
        baseline: What they are compared with.

    Returns:
        What `pooled_robustness` finds, method by method, with the task in front; and the sets that are left out.
    """
    from pandas import concat

    pooled, left_out = pooled_robustness(frame, methods, baseline)
    parts = [pooled.assign(task=ALL_TASKS)]
    tasks = list(dict.fromkeys(frame["task"]))
    for task in tasks if len(tasks) > 1 else []:
        parts.append(pooled_robustness(frame[frame["task"] == task], methods, baseline)[0].assign(task=task))
    found = [part for part in parts if len(part)]
    if not found:
        return pooled, left_out
    table = concat(found, ignore_index=True)
    return table.sort_values("method", key=lambda names: names.map(list(methods).index), kind="stable"), left_out


def _spread_within_methods(values: Series) -> float:
    """Root of the squared deviations from each method's mean over their degrees of freedom; NaN with too few."""
    groups = values.dropna().groupby(level="method")
    squares = ((values - groups.transform("mean")) ** 2).sum()
    freedom = int((groups.count() - 1).sum())
    return float((squares / freedom) ** 0.5) if freedom >= _FREEDOM else float("nan")
