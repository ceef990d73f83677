"""From any number of result files to one page: tables over seeds, paired differences, and pictures."""

from __future__ import annotations

import html
import itertools
import math
import os
import re
import shutil
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from .comparable import (
    NOISE,
    NOISE_MEAN,
    broken_attacks,
    mean_over_noise,
    noise_settings,
    over_common_noise,
    unequal_budgets,
    unequal_samples,
)
from .equal_clean import plot_courses
from .errors import ResultFileError
from .noise import plot_curves
from .plotting import legend_below, style_of
from .results import Figure, Result, load_result, may_be_result
from .tables import (
    cost_table,
    difference_table,
    equal_clean_table,
    figure_names,
    gather_courses,
    source_table,
    summary_table,
    values_by_seed,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Picture

CLEAN = "clean/accuracy"


@dataclass
class Report:
    """What `write_report` made.

    Args:
        page: The Markdown page.
        results: The results it is about.
        problems: One line for each file, or part of one, that was left out, and for what cannot be compared.
        pictures: The pictures beside the page.
    """

    page: Path
    results: list[Result]
    problems: list[str] = field(default_factory=list)
    pictures: list[Path] = field(default_factory=list)


@dataclass(frozen=True)
class _Run:
    """A result and the file it came from."""

    path: Path
    result: Result


def find_results(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Return the files given, and for each folder the result files below it, without repetition and in order.

    Runs leave other JSON files too (a model's configuration, say); in folders only results are taken, and files so
    broken that they may have been results.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        found.extend(sorted(filter(may_be_result, path.rglob("*.json"))) if path.is_dir() else [path])
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
    the same figure with another value, the page says so and keeps the first.

    Args:
        paths: Result files, and folders to search for them.
        output_dir: Folder for `report.md`, the pictures, and `report.html` if asked for.
        baseline: Method that the others are compared with, seed by seed; it comes first.
        order: Methods in the order of the tables; others come after them.
        title: Title of the page.
        as_html: Write the page as HTML too.

    Returns:
        What was made, with one line for each file that was left out and each figure that cannot be compared.

    Raises:
        ResultFileError: If not a single file can be read.
    """
    from matplotlib import rc_context

    folder = Path(output_dir)
    runs: list[_Run] = []
    problems: list[str] = []
    for path in find_results(paths):
        try:
            runs.append(_Run(path, load_result(path)))
        except ResultFileError as error:
            problems.append(str(error))
    if not runs:
        raise ResultFileError("; ".join(problems) or "paths: no result files there; pass the JSON files of the kit.")
    results = _merge(runs, problems)
    folder.mkdir(parents=True, exist_ok=True)
    methods = _methods(results, baseline, order)
    tasks = list(dict.fromkeys(result.task for result in results))
    lines = [f"# {title}", "", _introduction(results, methods, tasks), ""]
    pictures: list[Path] = []
    shown: list[Result] = []
    file_names = _file_names(tasks)
    if baseline not in {result.method for result in results}:
        problems.append(f"baseline={baseline!r}: no result is of this method, so there are no paired differences.")
    for task in tasks:
        of_files = [run.result for run in runs if run.result.task == task]
        of_task, incomplete = over_common_noise([result for result in results if result.task == task])
        shown += of_task
        problems += incomplete + unequal_samples(of_task) + unequal_budgets(of_files) + broken_attacks(of_task)
        main, details = figure_names(of_task)
        lines += [f"## {task}", "", *summary_table(of_task, methods, main), ""]
        lines += difference_table(of_task, methods, baseline, main)
        lines += source_table(of_task, methods)
        courses = gather_courses(of_files, methods)
        lines += equal_clean_table(courses, baseline)
        if details:
            lines += ["Details:", "", *summary_table(of_task, methods, details), ""]
        with rc_context({"text.parse_math": False}):  # a dollar in a name is a dollar
            drawn = {
                "scatter": _plot_scatter(of_task, methods, task),
                "course": plot_courses(courses, f"{_ALT['course']}, {task}") if courses else None,
                "noise": _plot_noise(of_task, methods, task),
            }
        for kind, picture in drawn.items():
            if picture is not None:
                path = folder / f"report_{file_names[task]}_{kind}.png"
                picture.savefig(path, dpi=150)
                pictures.append(path)
                lines += [f"![{_ALT[kind]}, {task}]({path.name})", ""]
        lines += cost_table(of_task, methods)
    lines += _images(runs, folder, pictures, problems)
    for run in runs:
        lacks = run.result.config.get("unavailable")
        for part, lack in lacks.items() if isinstance(lacks, dict) else []:
            problems.append(f"{run.path}: {part} was not measured: {lack}")
    if problems:
        lines += ["## Left out, or not comparable", "", *(f"- {line}" for line in problems), ""]
    lines += ["## Versions", "", *_versions(results), ""]
    page = folder / "report.md"
    # Names of files need not be valid text.
    page.write_text("\n".join(lines), encoding="utf-8", errors="backslashreplace")
    if as_html:
        (folder / "report.html").write_text(_to_html(lines, title), encoding="utf-8", errors="backslashreplace")
    return Report(page, shown, problems, pictures)


_ALT = {
    "scatter": "Clean against robust accuracy",
    "course": "Clean and robust accuracy after each epoch of each run",
    "noise": "Accuracy under noise",
}


def _merge(runs: Sequence[_Run], problems: list[str]) -> list[Result]:
    """Join the files of one method, task and seed."""
    merged: dict[tuple[str, str, int], Result] = {}
    for run in runs:
        new = run.result
        old = merged.setdefault((new.method, new.task, new.seed), Result(new.method, new.task, new.seed, versions={}))
        # Each file has the mean over its own noise; together they have one over all of it.
        known = noise_settings(old)
        more_noise = bool(known) and not noise_settings(new).keys() <= known.keys()
        for name, figure in new.figures.items():
            kept = old.figures.setdefault(name, figure)
            # Every attack repeats the clean accuracy of its own sample; the one over more examples is the better one.
            if name == CLEAN and (figure.n or 0) > (kept.n or 0):
                old.figures[name] = figure
            elif kept != figure and name != CLEAN and not (more_noise and name == NOISE_MEAN):
                problems.append(
                    f"{run.path}: {name} of {new.method}, {new.task}, seed {new.seed} is {figure.value} here and "
                    f"{kept.value} in another file; the other one is shown."
                )
        if more_noise:
            old.figures[NOISE_MEAN] = mean_over_noise(old, list(noise_settings(old)))
        old.cost.update(new.cost)
        old.versions.update(new.versions)
    return list(merged.values())


def _methods(results: Sequence[Result], baseline: str, order: Sequence[str] = ()) -> list[str]:
    """Return the methods that have results: the baseline, those of the order, the others as they appear."""
    names = {result.method for result in results}
    wanted = [baseline, *order, *(result.method for result in results)]
    return [name for name in dict.fromkeys(wanted) if name in names]


def _introduction(results: Sequence[Result], methods: Sequence[str], tasks: Sequence[str]) -> str:
    measured = [result for result in results if result.figures]  # the others hold a cost and nothing else
    seeds = sorted({result.seed for result in measured})
    return (
        f"{_count(measured, 'run')}: {_count(methods, 'method')}, {_count(tasks, 'task')}, "
        f"seeds {', '.join(map(str, seeds))}. "
        "Tables give mean ± standard deviation over training seeds, and the number of seeds where it differs from the "
        "most; of a method with one seed, the figure and its 95 % interval within that run; accuracies and shares in "
        "per cent."
    )


def _count(things: Sequence[Any], noun: str) -> str:
    return f"{len(things)} {noun}{'s' * (len(things) != 1)}"


def _versions(results: Sequence[Result]) -> list[str]:
    """List every version in use, so that mixed ones are seen."""
    found: dict[str, set[str]] = {}
    for result in results:
        for package, number in result.versions.items():
            found.setdefault(package, set()).add(number)
    return [f"- {package} {', '.join(sorted(numbers))}" for package, numbers in sorted(found.items())]


def _images(runs: Sequence[_Run], folder: Path, pictures: list[Path], problems: list[str]) -> list[str]:
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


def _robust_names(results: Sequence[Result]) -> list[str]:
    """Name the accuracies on changed texts that deserve a panel each."""
    names = dict.fromkeys(name for result in results for name in result.figures)
    return [
        name for name in names if name in ("adv_glue/accuracy", NOISE_MEAN) or name.endswith("/accuracy_under_attack")
    ]


def _plot_scatter(results: Sequence[Result], methods: Sequence[str], task: str) -> Picture | None:
    """Draw clean against robust accuracy: small points for seeds, large ones for means; up and right is better."""
    from matplotlib.figure import Figure as Canvas
    from matplotlib.lines import Line2D

    names = [
        name
        for name in _robust_names(results)
        if any(
            set(values_by_seed(results, method, CLEAN)) & set(values_by_seed(results, method, name))
            for method in methods
        )
    ]
    if not names:
        return None
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    figure = Canvas(figsize=(max(5.5, 3.6 * columns), 3.2 * rows + 1.4), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    shown: dict[str, Line2D] = {}
    for axes, name in zip(panels, names, strict=False):
        for number, method in enumerate(methods):
            clean, robust = values_by_seed(results, method, CLEAN), values_by_seed(results, method, name)
            seeds = sorted(set(clean) & set(robust))
            if not seeds:
                continue
            style = {**style_of(number), "linestyle": ""}
            across = [100 * clean[seed] for seed in seeds]
            along = [100 * robust[seed] for seed in seeds]
            axes.plot(across, along, markersize=4, alpha=0.45, **style)
            large: dict[str, Any] = {"markersize": 9, "markeredgecolor": "black", **style}
            axes.plot([statistics.fmean(across)], [statistics.fmean(along)], zorder=3, **large)
            shown[method] = Line2D([], [], **large)
        axes.set_title(_panel_title(name), fontsize=10)
        axes.set_xlabel("clean accuracy (%)", fontsize=9)
        axes.set_ylabel("robust accuracy (%)", fontsize=9)
        axes.grid(alpha=0.3)
        axes.margins(0.15)
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    figure.suptitle(f"Clean against robust accuracy, {task}\nlarge: mean over seeds, small: one seed", fontsize=11)
    legend_below(figure, shown)
    return figure


def _panel_title(name: str) -> str:
    """Name what the texts went through."""
    fixed = {"adv_glue/accuracy": "AdvGLUE", NOISE_MEAN: "noise, mean of kinds and rates"}
    return fixed.get(name) or f"attack: {name.split('/')[1]}"


def _plot_noise(results: Sequence[Result], methods: Sequence[str], task: str) -> Picture | None:
    """Draw the noise curves, mean over seeds, with a band from the lowest to the highest seed."""
    curves: dict[str, dict[str, dict[float, Figure]]] = {}
    names = dict.fromkeys(name for result in results for name in result.figures if NOISE.fullmatch(name))
    for method in methods:
        for name in names:
            match = NOISE.fullmatch(name)
            assert match is not None
            points = curves.setdefault(method, {}).setdefault(match["kind"], {})
            for rate, figure_name in ((0.0, CLEAN), (float(match["rate"]), name)):
                values = list(values_by_seed(results, method, figure_name).values())
                if values:
                    points[rate] = Figure(statistics.fmean(values), len(values), min(values), max(values))
    curves = {
        method: kinds for method, kinds in curves.items() if any(set(points) - {0.0} for points in kinds.values())
    }
    if not curves:
        return None
    figure = plot_curves(curves)
    figure.suptitle(f"Accuracy under noise, {task} (mean over seeds; band: lowest to highest seed)", fontsize=11)
    return figure


def _to_html(lines: Sequence[str], title: str) -> str:
    """Turn the page's own subset of Markdown into HTML, with no further dependency."""
    body: list[str] = []
    table: list[str] = []

    def inline(text: str) -> str:
        escaped = html.escape(text, quote=False)
        return re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", escaped)

    def close_table() -> None:
        if table:
            body.append("<table>" + "".join(table) + "</table>")
            table.clear()

    for line in lines:
        if line.startswith("|"):
            cells = [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            if all(re.fullmatch(r"-+:?", cell) for cell in cells):
                continue
            tag = "td" if table else "th"
            table.append("<tr>" + "".join(f"<{tag}>{inline(cell)}</{tag}>" for cell in cells) + "</tr>")
            continue
        close_table()
        image = re.fullmatch(r"!\[(.*)\]\((.*)\)", line)
        heading = re.fullmatch(r"(#+) (.*)", line)
        if image:
            body.append(f'<p><img src="{html.escape(image[2])}" alt="{html.escape(image[1])}"></p>')
        elif heading:
            level = len(heading[1])
            body.append(f"<h{level}>{inline(heading[2])}</h{level}>")
        elif line.startswith("- "):
            body.append(f"<p>• {inline(line[2:])}</p>")
        elif line:
            body.append(f"<p>{inline(line)}</p>")
    close_table()
    style = (
        "body{font-family:sans-serif;max-width:70em;margin:2em auto;padding:0 1em}"
        "table{border-collapse:collapse;margin:1em 0}td,th{border:1px solid #ccc;padding:.3em .6em;text-align:right}"
        "td:first-child,th:first-child{text-align:left}img{max-width:100%}"
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{style}</style></head><body>" + "\n".join(body) + "</body></html>\n"
    )
