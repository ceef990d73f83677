"""The tables of the report: one row per method, as lines of Markdown."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Mapping, Sequence

from .comparable import NOISE
from .equal_clean import Course, difference_at_equal_clean, read_course
from .intervals import Interval, bootstrap_paired_difference
from .results import Result

_SOURCE = re.compile(r"adv_glue/source/(?P<source>.+)/accuracy")
# Seeds from which on a bootstrap interval over them is taken at its word.
_FEW = 5
#: Figures that are fractions and read best as per cent.
_SHARES = ("accuracy", "accuracy_under_attack", "success_rate", "words_changed", "clean_accuracy")
# Figures that explain others and have a table of their own.
_DETAILS = ("/success_rate", "/words_changed", "/queries", "landscape/loss")


def _in_table(name: str) -> bool:
    """Tell figures of the main table from what repeats the clean accuracy, or is shown elsewhere.

    Noise has a picture, the sources of AdvGLUE a table of their own, and attacks that broke are named under the page.
    """
    shown_elsewhere = NOISE.fullmatch(name) or _SOURCE.fullmatch(name)
    return not shown_elsewhere and not name.endswith(("/clean_accuracy", "/errors"))


def figure_names(results: Sequence[Result]) -> tuple[list[str], list[str]]:
    """Return the figures of the main table, and those of the table of details."""
    names = dict.fromkeys(name for result in results for name in result.figures)
    shown = [name for name in names if _in_table(name)]
    return (
        [name for name in shown if not name.endswith(_DETAILS)],
        [name for name in shown if name.endswith(_DETAILS)],
    )


def values_by_seed(results: Sequence[Result], method: str, name: str) -> dict[int, float]:
    """Return seed -> value of a figure, without undefined ones."""
    return {
        result.seed: figure.value
        for result in results
        if result.method == method and (figure := result.figures.get(name)) is not None and figure.value is not None
    }


def _scale(name: str) -> float:
    return 100.0 if name.rpartition("/")[2] in _SHARES else 1.0


def _number(value: float, name: str, sign: str = "") -> str:
    """Format a figure that is scaled already: one decimal for per cent, at least three digits for the rest."""
    if _scale(name) == 100.0:
        return f"{value:{sign}.1f}"
    return f"{value:{sign}.0f}" if abs(value) >= 100 else f"{value:{sign}.3g}"


def _title(name: str) -> str:
    return name.replace("/", " ").replace("_", " ") + (" (%)" if _scale(name) == 100.0 else "")


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def summary_table(
    results: Sequence[Result], methods: Sequence[str], names: Sequence[str], titles: Sequence[str] = ()
) -> list[str]:
    """One row per method, one column per figure; without titles, the names are the columns' titles."""
    counts = {
        method: sum(result.method == method and bool(result.figures) for result in results) for method in methods
    }
    present = [method for method in methods if counts[method]]
    lines = [_row(["method", *(titles or map(_title, names))]), _row(["---"] + ["---:"] * len(names))]
    for method in present:
        cells = []
        for name in names:
            values = [_scale(name) * value for value in values_by_seed(results, method, name).values()]
            cells.append(_mean_and_spread(values, counts[method], name) + _interval(results, method, name))
        lines.append(_row([f"{method} ({counts[method]} seed{'s' * (counts[method] != 1)})", *cells]))
    return lines


def _mean_and_spread(values: Sequence[float], expected: int, name: str) -> str:
    if not values:
        return "-"
    text = _number(statistics.fmean(values), name)
    if len(values) > 1:
        text += f" ± {_number(statistics.stdev(values), name)}"
    return text + (f" (n={len(values)})" if len(values) != expected else "")


def _interval(results: Sequence[Result], method: str, name: str) -> str:
    """Format the interval that a figure has within a run, where there is one run and so no spread over seeds."""
    (figure, *others) = [result.figures.get(name) for result in results if result.method == method and result.figures]
    if others or figure is None or figure.value is None or figure.low is None or figure.high is None:
        return ""
    low, high = (_number(_scale(name) * bound, name) for bound in (figure.low, figure.high))
    return f" [{low}, {high}]"


def source_table(results: Sequence[Result], methods: Sequence[str]) -> list[str]:
    """One row per method, one column per attack that AdvGLUE's examples come from."""
    found = {
        name: match["source"] for result in results for name in result.figures if (match := _SOURCE.fullmatch(name))
    }
    if not found:
        return []
    names = sorted(found, key=found.__getitem__)
    table = summary_table(results, methods, names, [found[name] for name in names])
    return ["AdvGLUE accuracy (%) by the attack behind the examples:", "", *table, ""]


def paired_differences(
    results: Sequence[Result], method: str, baseline: str, name: str
) -> tuple[Interval, int] | None:
    """Compare a method with the baseline on one figure, over the seeds both have.

    Args:
        results: Results of one task.
        method: The method.
        baseline: What it is compared with.
        name: Name of the figure.

    Returns:
        The mean difference with its 95 % bootstrap interval, and the number of seeds; None without common seeds.
    """
    ours, theirs = values_by_seed(results, method, name), values_by_seed(results, baseline, name)
    seeds = sorted(set(ours) & set(theirs))
    if not seeds:
        return None
    interval = bootstrap_paired_difference([ours[seed] for seed in seeds], [theirs[seed] for seed in seeds])
    return interval, len(seeds)


def difference_table(
    results: Sequence[Result], methods: Sequence[str], baseline: str, names: Sequence[str]
) -> list[str]:
    """One row per method but the baseline, one column per figure."""
    others = [method for method in methods if method != baseline and any(r.method == method for r in results)]
    rows = []
    for method in others:
        cells = []
        for name in names:
            found = paired_differences(results, method, baseline, name)
            if found is None:
                cells.append("-")
                continue
            interval, count = found
            value, low, high = (_scale(name) * part for part in interval)
            text = _number(value, name, "+")
            if count > 1:
                text += f" [{_number(low, name, '+')}, {_number(high, name, '+')}]"
                # Over three seeds the interval excludes zero whenever all three agree, one time in four by chance.
                text = f"**{text}**" if (low > 0 or high < 0) and count >= _FEW else text
            cells.append(f"{text} ({count})")
        if any(cell != "-" for cell in cells):
            rows.append(_row([method, *cells]))
    if not rows:
        return []
    return [
        f"Difference to {baseline}, paired by seed, with its 95 % bootstrap interval and the number of seeds. Bold "
        f"where the interval excludes zero over at least {_FEW} seeds; over fewer it is too narrow to mean much.",
        "",
        _row(["method", *(_title(name).replace("(%)", "(points)") for name in names)]),
        _row(["---"] + ["---:"] * len(names)),
        *rows,
        "",
    ]


def gather_courses(results: Sequence[Result], methods: Sequence[str]) -> dict[str, Course]:
    """Gather the accuracies after each epoch, of the methods whose runs wrote them down."""
    courses: dict[str, dict[int, list[tuple[float, float]]]] = {method: {} for method in methods}
    for result in results:
        course = read_course(result.config.get("history"))
        if course:
            courses[result.method].setdefault(result.seed, course)
    return {method: course for method, course in courses.items() if course}


def equal_clean_table(courses: Mapping[str, Course], baseline: str) -> list[str]:
    if baseline not in courses or len(courses) < 2:
        return []
    rows = []
    for method in courses:
        if method == baseline:
            continue
        interval = difference_at_equal_clean(courses[method], courses[baseline])
        count = len(set(courses[method]) & set(courses[baseline]))
        if interval is None:
            cell = "not comparable"
        else:
            value, low, high = (f"{100 * part:+.1f}" for part in interval)
            cell = value + (f" [{low}, {high}]" if count > 1 else "")
            excludes_zero = count >= _FEW and (interval.low > 0 or interval.high < 0)
            cell = f"**{cell}** ({count})" if excludes_zero else f"{cell} ({count})"
        rows.append(_row([method, cell]))
    return [
        f"Difference to {baseline} in robust accuracy at equal clean accuracy, from both accuracies after each epoch: "
        "one line per method with a common slope, where their clean accuracies overlap; intervals as above.",
        "",
        _row(["method", "robust accuracy (points)"]),
        _row(["---", "---:"]),
        *rows,
        "",
    ]


def cost_table(results: Sequence[Result], methods: Sequence[str]) -> list[str]:
    names = list(dict.fromkeys(name for result in results for name in result.cost))
    if not names:
        return []
    lines = ["Cost, mean over seeds:", "", _row(["method", *names]), _row(["---"] + ["---:"] * len(names))]
    for method in methods:
        of_method = [result for result in results if result.method == method]
        if not any(result.cost for result in of_method):
            continue
        cells = []
        for name in names:
            values = [result.cost[name] for result in of_method if result.cost.get(name) is not None]
            cells.append(f"{statistics.fmean(values):.3g}" if values else "-")
        lines.append(_row([method, *cells]))
    return [*lines, ""]
