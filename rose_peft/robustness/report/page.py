"""From any number of result files to one page: tables over seeds, paired differences, and pictures."""

from __future__ import annotations

import html
import itertools
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from ..errors import ResultFileError
from ..plotting import styles_of
from ..results import SUFFIX, load_result
from .comparable import broken_attacks, unequal_budgets, unequal_samples, unequal_settings, with_noise_mean
from .equal_clean import gather_courses
from .frame import Run, columns, gather, seeds_of
from .pictures import MOST, draw
from .pooled import pooled_by_task
from .tables import (
    cost_table,
    difference_table,
    differences,
    equal_clean_table,
    pooled_table,
    source_table,
    summary_table,
)

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass
class Report:
    """What `write_report` made.

    Args:
        page: The Markdown page.
        rows: All numbers it is about: task, method, seed, measure, part, rate, value, n, low, high.
        problems: One line for each file, or part of one, that was left out, and for what cannot be compared.
        pictures: The pictures beside the page.
    """

    page: Path
    rows: DataFrame
    problems: list[str] = field(default_factory=list)
    pictures: list[Path] = field(default_factory=list)

    @property
    def runs(self) -> int:
        """Number of runs: methods, tasks and seeds of which something was measured."""
        return sum(sum(seeds_of(of_task).values()) for _, of_task in self.rows.groupby("task"))


def find_results(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Return the files given, and for each folder the result files below it, without repetition and in order."""
    found: list[Path] = []
    for path in map(Path, paths):
        found.extend(sorted(path.rglob(f"*{SUFFIX}")) if path.is_dir() else [path])
    return list(dict.fromkeys(found))


def write_report(
    paths: Iterable[str | os.PathLike[str]],
    output_dir: str | os.PathLike[str],
    *,
    baseline: str = "plain",
    order: Sequence[str] = (),
    title: str = "Robustness report",
    as_html: bool = False,
) -> Report:
    """Read result files and write one page with its pictures.

    Several files about the same method, task and seed (one per kind of evaluation) count as one run; where they give
    the same number with another value, the page says so and keeps the first.

    Args:
        paths: Result files, and folders to search for them.
        output_dir: Folder for `report.md`, the pictures, `differences.csv` (all paired differences, and the pooled
            figure, with the intervals of Student's t and of the bootstrap), and `report.html` if asked for.
        baseline: Method that the others are compared with, seed by seed; it comes first.
        order: Methods in the order of the tables; others come after them. The pictures show the first six, the
            baseline among them.
        title: Title of the page.
        as_html: Write the page as HTML too.

    Returns:
        What was made, with one line for each file that was left out and each number that cannot be compared.

    Raises:
        ResultFileError: If not a single file can be read.
    """
    import pandas
    from matplotlib import rc_context

    folder = Path(output_dir)
    runs: list[Run] = []
    problems: list[str] = []
    for path in find_results(paths):
        try:
            runs.append(Run(path, load_result(path)))
        except ResultFileError as error:
            problems.append(str(error))
    if not runs:
        none = f"paths: no result files (*{SUFFIX}) there; pass folders with what the kit wrote."
        raise ResultFileError("; ".join(problems) or none)
    frame = gather(runs, problems)
    if frame.empty:
        raise ResultFileError("; ".join([*problems, f"{runs[0].path}: holds no rows; run that evaluation again."]))
    folder.mkdir(parents=True, exist_ok=True)
    methods = _methods(frame, baseline, order)
    tasks = list(dict.fromkeys(frame["task"]))
    pictures: list[Path] = []
    of_tasks = {task: with_noise_mean(frame[frame["task"] == task], task) for task in tasks}
    shown = pandas.concat([of_task for of_task, _ in of_tasks.values()], ignore_index=True)
    pooled, left_out = pooled_by_task(shown, methods, baseline)
    in_pictures = methods[:MOST]
    styles = styles_of(in_pictures)
    compared: list[DataFrame] = []
    lines: list[str] = []
    file_names = _file_names(tasks)
    if baseline not in methods:
        problems.append(f"baseline={baseline!r}: no result is of this method, so there are no paired differences.")
    for task in tasks:
        of_files = [run for run in runs if run.result.task == task]
        of_task, incomplete = of_tasks[task]
        compared.append(differences(of_task, methods, baseline).assign(task=task))
        problems += incomplete + unequal_samples(of_task, task)
        problems += unequal_settings(of_files, task) + unequal_budgets(of_files, task) + broken_attacks(of_task, task)
        main, details = columns(of_task, "main"), columns(of_task, "details")
        lines += [f"## {task}", "", *summary_table(of_task, methods, main), "", *_unequal_seeds(of_task)]
        lines += difference_table(of_task, methods, baseline)
        lines += source_table(of_task, methods)
        courses = gather_courses([run.result for run in of_files], methods)
        lines += equal_clean_table(courses, baseline)
        if details:
            lines += ["Details:", "", *summary_table(of_task, methods, details), ""]
        with rc_context({"text.parse_math": False}):  # a dollar in a name is a dollar
            drawn = draw(of_task, styles, courses, task)
            lines += _not_drawn(methods, in_pictures) if drawn else []
            for name, slug in _file_names(drawn).items():
                caption, picture = drawn[name]
                path = folder / f"report_{file_names[task]}_{slug}.png"
                picture.savefig(path, dpi=110)
                pictures.append(path)
                lines += [f"![{caption}, {task}]({path.name})", ""]
        lines += cost_table(of_task, methods)
    lines = [*pooled_table(pooled, left_out, baseline), *lines]
    compared.append(pooled.assign(baseline=baseline, measure="pooled_robustness"))
    lines += _images(runs, folder, pictures, problems)
    for run in runs:
        for part, lack in run.result.config.get("unavailable", {}).items():
            problems.append(f"{run.path}: {part} was not measured: {lack}")
    if problems:
        lines += ["## Left out, or not comparable", "", *(f"- {line}" for line in problems), ""]
    lines += ["## Versions", "", *_versions(runs), ""]
    report = Report(folder / "report.md", shown, problems, pictures)
    # Names of files need not be valid text.
    text = "\n".join([f"# {title}", "", _introduction(report, methods, tasks), "", *lines])
    report.page.write_text(text, encoding="utf-8", errors="backslashreplace")
    if as_html:
        (folder / "report.html").write_text(_to_html(text, title), encoding="utf-8", errors="backslashreplace")
    pandas.concat(compared, ignore_index=True).to_csv(folder / "differences.csv", index=False)
    return report


def _methods(frame: DataFrame, baseline: str, order: Sequence[str] = ()) -> list[str]:
    """Return the methods that have results: the baseline, those of the order, the others as they appear."""
    names = set(frame["method"])
    return [name for name in dict.fromkeys([baseline, *order, *frame["method"]]) if name in names]


def _not_drawn(methods: Sequence[str], in_pictures: Sequence[str]) -> list[str]:
    """Say which methods the pictures leave out."""
    missing = [method for method in methods if method not in in_pictures]
    if not missing:
        return []
    return [
        f"The pictures show the first {len(in_pictures)} of {len(methods)} methods. Left out of them: "
        f"{', '.join(missing)}.",
        "",
    ]


def _unequal_seeds(frame: DataFrame) -> list[str]:
    """Say where the means of a task are over different seeds."""
    seeds = frame[frame["measure"] != "step_time"].groupby("method")["seed"].agg(frozenset)
    if seeds.nunique() < 2:
        return []
    return [
        "Methods have different seeds here, so subtract no row from another: differences paired by seed follow.",
        "",
    ]


def _introduction(report: Report, methods: Sequence[str], tasks: Sequence[str]) -> str:
    seeds = sorted(report.rows.loc[report.rows["measure"] != "step_time", "seed"].unique())
    return (
        f"{_count(report.runs, 'run')}: {_count(len(methods), 'method')}, {_count(len(tasks), 'task')}, "
        f"seeds {', '.join(map(str, seeds))}. "
        "Tables give mean ± standard deviation over training seeds, and the number of seeds where it differs from the "
        "most; of a method with one seed, the number and its 95 % interval within that run; accuracies and shares in "
        "per cent."
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _versions(runs: Sequence[Run]) -> list[str]:
    """List every version in use, so that mixed ones are seen."""
    found: dict[str, set[str]] = {}
    for run in runs:
        for package, number in run.result.versions.items():
            found.setdefault(package, set()).add(number)
    return [f"- {package} {', '.join(sorted(numbers))}" for package, numbers in sorted(found.items())]


def _images(runs: Sequence[Run], folder: Path, pictures: list[Path], problems: list[str]) -> list[str]:
    """Show the pictures that results name (mask heat maps, landscapes); those outside the page's folder are copied."""
    lines: list[str] = []
    for number, run in enumerate(runs):
        file_names = _file_names(run.result.images)
        for title, image in run.result.images.items():
            target = run.path.parent / image
            try:
                if not target.is_file():
                    problems.append(f"{run.path}: image {image!r} is not there; keep it beside the result file.")
                    continue
                if not target.resolve().is_relative_to(folder.resolve()):
                    target = folder / f"report_image_{number}_{file_names[title]}{target.suffix}"
                    shutil.copyfile(run.path.parent / image, target)
            except OSError as error:
                problems.append(f"{run.path}: image {image!r} cannot be copied ({error.strerror}); check that file.")
                continue
            pictures.append(target)
            caption = f"{title}: {run.result.method}, {run.result.task}, seed {run.result.seed}"
            link = quote(os.fsencode(target.resolve().relative_to(folder.resolve()).as_posix()))
            lines += [f"![{caption}]({link})", "", caption, ""]
    return ["## Pictures", "", *lines] if lines else []


def _file_names(names: Iterable[str]) -> dict[str, str]:
    """Give each name one of its own that any file system takes; those that differ in letters lost get a number."""
    slugs = {name: re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower() or "x" for name in names}
    found: dict[str, str] = {}
    # Names that lose least choose first, so that they keep theirs whatever stands beside them.
    for name in sorted(slugs, key=lambda name: (slugs[name] != name, not name.isascii())):
        numbered = (f"{slugs[name]}-{number}" for number in itertools.count(2))
        free = (slug for slug in itertools.chain([slugs[name]], numbered) if slug not in found.values())
        found[name] = next(free)
    return found


def _to_html(text: str, title: str) -> str:
    from markdown import markdown

    body = markdown(html.escape(text, quote=False), extensions=["tables"])
    style = (
        "body{font-family:sans-serif;max-width:70em;margin:2em auto;padding:0 1em}"
        "table{border-collapse:collapse;margin:1em 0}td,th{border:1px solid #ccc;padding:.3em .6em}img{max-width:100%}"
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{style}</style></head><body>{body}</body></html>\n"
    )
