"""The tables of the report: one row per method, as lines of Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..estimate import Estimate, bootstrap_paired_difference, paired_difference
from .equal_clean import Course, difference_at_equal_clean
from .frame import Column, by_seed, columns, seeds_of, select

if TYPE_CHECKING:
    from pandas import DataFrame

# Seeds from which on an interval over them is emphasised.
_FEW = 5


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _head(titles: Sequence[str]) -> list[str]:
    return [_row(["method", *titles]), _row(["---"] + ["---:"] * len(titles))]


def summary_table(
    frame: DataFrame, methods: Sequence[str], shown: Sequence[Column], titles: Sequence[str] = ()
) -> list[str]:
    """One row per method, one column per number: mean and standard deviation over seeds, or one run's interval."""
    counts = seeds_of(frame)
    tables = {column: by_seed(frame, column) for column in shown}
    lines = _head([*(titles or [column.title() for column in shown])])
    for method in methods:
        if method in counts:
            cells = [_cell(frame, tables[column], method, column, counts[method]) for column in shown]
            lines.append(_row([f"{method} ({counts[method]} seed{'s' * (counts[method] != 1)})", *cells]))
    return lines


def _cell(frame: DataFrame, table: DataFrame, method: str, column: Column, expected: int) -> str:
    if method not in table or table[method].isna().all():
        return "-"
    values = table[method].dropna()
    text = column.number(values.mean())
    if len(values) > 1:
        text += f" ± {column.number(values.std())}"
    if len(values) != expected:
        text += f" (n={len(values)})"
    if expected == 1:
        lines = select(frame, column)
        (low,), (high,) = (lines.loc[lines["method"] == method, name] for name in ("low", "high"))
        text += f" [{column.number(low)}, {column.number(high)}]" if low == low and high == high else ""
    return text


def source_table(frame: DataFrame, methods: Sequence[str]) -> list[str]:
    """One row per method, one column per attack that AdvGLUE's examples come from."""
    shown = sorted(columns(frame, "sources"))
    if not shown:
        return []
    table = summary_table(frame, methods, shown, [column.part for column in shown])
    return ["AdvGLUE accuracy (%) by the attack behind the examples:", "", *table, ""]


def pairs(frame: DataFrame, method: str, baseline: str, column: Column) -> DataFrame | None:
    """Return a number of a method and of the baseline over the seeds that both have; None without any."""
    table = by_seed(frame, column)
    if method == baseline or not {method, baseline} <= set(table.columns):
        return None
    both = table[[method, baseline]].dropna()
    return both if len(both) else None


def differences(frame: DataFrame, methods: Sequence[str], baseline: str) -> DataFrame:
    """Compare every method with the baseline on every number, over the seeds both have.

    Returns:
        One line per method and number, with the mean difference (value), the number of seeds (n), the 95 % interval of
        Student's t (low, high), and the bootstrap's (bootstrap_low, bootstrap_high).
    """
    from pandas import DataFrame

    rows: list[dict[str, Any]] = []
    for column in columns(frame, "main"):
        for method in methods:
            both = pairs(frame, method, baseline, column)
            if both is None:
                continue
            ours, theirs = both[method].tolist(), both[baseline].tolist()
            found, other = paired_difference(ours, theirs), bootstrap_paired_difference(ours, theirs)
            interval = {"value": found.value, "n": found.n, "low": found.low, "high": found.high}
            interval |= {"bootstrap_low": other.low, "bootstrap_high": other.high}
            rows.append({"method": method, "baseline": baseline, **column._asdict(), **interval})
    return DataFrame(rows)


def difference_table(frame: DataFrame, methods: Sequence[str], baseline: str) -> list[str]:
    """One row per method but the baseline, one column per number."""
    found = differences(frame, methods, baseline)
    if found.empty:
        return []
    shown = columns(frame, "main")
    cells = {
        (row.method, Column(row.measure, row.part, row.rate)): _difference(
            Estimate(row.value, row.n, *((row.low, row.high) if row.n > 1 else ())),
            Column(row.measure, row.part, row.rate),
        )
        for row in found.itertuples()
    }
    return [
        f"Difference to {baseline}, paired by seed, with its 95 % interval by Student's t and the number of seeds. "
        f"Bold where the interval excludes zero over at least {_FEW} seeds.",
        "",
        *_head([column.title("points") for column in shown]),
        *(
            _row([method, *(cells.get((method, column), "-") for column in shown)])
            for method in methods
            if any(key[0] == method for key in cells)
        ),
        "",
    ]


def _difference(estimate: Estimate, column: Column, emphasise: bool = True) -> str:
    assert estimate.value is not None
    text = column.number(estimate.value, "+")
    if estimate.low is not None and estimate.high is not None:
        text += f" [{column.number(estimate.low, '+')}, {column.number(estimate.high, '+')}]"
    bold = emphasise and (estimate.n or 0) >= _FEW and estimate.excludes_zero()
    return (f"**{text}**" if bold else text) + f" ({estimate.n})"


def pooled_table(pooled: DataFrame, left_out: Sequence[str], baseline: str) -> list[str]:
    """One row per method but the baseline and task, from what `pooled_by_task` found."""
    if pooled.empty:
        return []
    rows = []
    for row in pooled.itertuples():
        cells = [str(row.task), f"{row.value:+.2f}"]
        for low, high in ((row.low, row.high), (row.bootstrap_low, row.bootstrap_high)):
            cells.append(f"{low:+.2f} to {high:+.2f}" if row.n > 1 else "-")
        rows.append(_row([row.method, *cells, str(row.n), str(row.sets)]))
    return [
        "## All test sets together",
        "",
        f"How much more robust than {baseline}, as one figure per method: on each test set the difference with the "
        "same seed, in standard deviations over seeds within methods; the mean over all sets, each counting the same; "
        "then the mean over seeds with its 95 % intervals. A seed counts where a method and the baseline have every "
        "set, so over all tasks there may be fewer than over one.",
        "",
        *_head(["tasks", "pooled robustness", "by Student's t", "by the bootstrap", "seeds", "test sets"]),
        *rows,
        "",
        *([f"Not among them, as all seeds of a method agree there: {', '.join(left_out)}.", ""] if left_out else []),
    ]


def equal_clean_table(courses: Mapping[str, Mapping[str, Course]], baseline: str) -> list[str]:
    """One row per method but the baseline, one column per robust set.

    Args:
        courses: Robust set -> method -> its course.
        baseline: What they are compared with.
    """
    sets = [name for name, by_method in courses.items() if baseline in by_method and len(by_method) > 1]
    methods = dict.fromkeys(method for name in sets for method in courses[name] if method != baseline)
    if not sets:
        return []
    rows = []
    for method in methods:
        cells = []
        for name in sets:
            by_method = courses[name]
            estimate = difference_at_equal_clean(by_method.get(method, {}), by_method[baseline])
            cells.append("not comparable" if estimate is None else _difference(estimate, _ROBUST, emphasise=False))
        rows.append(_row([method, *cells]))
    return [
        f"Difference to {baseline} in robust accuracy at equal clean accuracy, from both accuracies after each epoch: "
        "one line per method with a common slope. Only epochs within the clean accuracies that both have count, so "
        "often not the best ones, which the tables above show. With its 95 % bootstrap interval over seeds, which "
        "is too narrow over few (of three seeds without any difference one in four excludes zero), and the number of "
        "seeds.",
        "",
        *_head([f"{name} accuracy (points)" for name in sets]),
        *rows,
        "",
    ]


_ROBUST = Column("robust_accuracy", "", 0.0)


def _cost(row: DataFrame) -> str:
    value, low, high = row[["value", "low", "high"]].mean()
    return f"{value:.3g}" + (f" [{low:.3g}, {high:.3g}]" if low == low and high == high else "")


def cost_table(frame: DataFrame, methods: Sequence[str]) -> list[str]:
    """One row per method: mean time of a step, relative to the baseline's, with its interval where there is one."""
    shown = columns(frame, "cost")
    if not shown:
        return []
    words = "Mean time of a step over the baseline's, timed side by side, with the 95 % interval over cycles of steps."
    lines = [words, ""]
    lines += _head([column.title() for column in shown])
    for method in methods:
        cells = []
        for column in shown:
            row = select(frame, column).query("method == @method")
            cells.append("-" if row.empty else _cost(row))
        if set(cells) != {"-"}:
            lines.append(_row([method, *cells]))
    return [*lines, ""]
