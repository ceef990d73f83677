"""The demo: plain fine-tuning and ROSE on embedded reviews, three seeds each, in one table and one picture."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from rose_peft.robustness import Estimate, Result, Row, consistency, load_classifier
from rose_peft.robustness.estimate import paired_difference
from rose_peft.robustness.plotting import plot_pairs
from rose_peft.robustness.results import SUFFIX, find

from .arguments import TrainArguments
from .checkpoint import NOTE
from .data import TextData
from .run import train

SEEDS = 3
# The learning rate is the lowest of 5e-5, 1.5e-4 and 4.5e-4 at which both methods know every review of the validation
# split (with a seed that is not among these); ROSE learns more slowly and does not at 5e-5.
SETTINGS = {"epochs": 1, "batch_size": 16, "max_length": 32, "keep": "last", "learning_rate": 1.5e-4}
LEARNT = 0.95
CHANGES = {"dropout": None, "typos": 0.1}  # and the share of words hit


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of the table.

    Args:
        title: What it says.
        row: Measure, part and rate of the number.
        is_better: +1 where more is better, -1 where less is, 0 where the line is no verdict on robustness.
    """

    title: str
    row: tuple[str, str, float | None]
    is_better: int = 0


LINES = (
    Line("clean accuracy (%)", ("clean_accuracy", "", None)),
    Line("robust: misspelt, unseen words (%)", ("robust_accuracy", "robust", None), 1),
    Line("predictions flipped by dropout (%)", ("flipped_share", "dropout", CHANGES["dropout"]), -1),
    Line("predictions flipped by typos (%)", ("flipped_share", "typos", CHANGES["typos"]), -1),
    Line("not promised: turned cue (%)", ("robust_accuracy", "turned cue", None)),
)


def demo(args: TrainArguments, text: TextData, explicit: Collection[str], is_main: bool) -> str:
    """Train plainly and with the chosen strategy, seed by seed in turn, and measure what came out.

    Args:
        args: Checked options; each run gets a folder METHOD/seedN in their `output_dir`.
        text: The demo's data.
        explicit: Options that the user gave, which go before the demo's own.
        is_main: Whether this process measures and writes.

    Returns:
        The table with what to conclude; empty on other processes.
    """
    methods = ["plain"] if args.strategy == "none" else ["plain", "ROSE"]
    found: dict[str, list[Result]] = {method: [] for method in methods}
    seconds: dict[str, list[float]] = {method: [] for method in methods}
    for seed in range(args.seed, args.seed + SEEDS):
        for method in methods:
            folder = Path(args.output_dir) / method / f"seed{seed}"
            one = dataclasses.replace(args, **_settings(args, method, explicit), seed=seed, output_dir=str(folder))
            # A demo killed in an early run has no later one to resume.
            resume = args.resume and (not any(seconds.values()) or (folder / NOTE).exists())
            trained = train(dataclasses.replace(one, resume=resume), text)
            seconds[method].append(trained["timing"]["seconds_per_step"])
            if is_main:
                found[method].append(_measure(one, method, trained, text))
    if not is_main:
        return ""
    panels = {
        line.title: {method: [_value(result, line) for result in results] for method, results in found.items()}
        for line in LINES
    }
    title = f"Plain fine-tuning and ROSE on made-up reviews\n{SEEDS} seeds; a line joins the runs of one seed"
    plot_pairs(panels, title, Path(args.output_dir) / "demo.png")
    return "\n".join([*_table(found, seconds), "", *_conclusion(found, seconds)])


def _settings(args: TrainArguments, method: str, explicit: Collection[str]) -> dict[str, Any]:
    """Options of a method's runs that are not the user's."""
    settings = {**SETTINGS, "risk_pass": "sampled"}
    if args.strategy == "second_order":
        del settings["risk_pass"]
    settings = {name: value for name, value in settings.items() if name not in explicit}
    return settings if method == "ROSE" else {**settings, "strategy": "none", "variant": None}


def _measure(args: TrainArguments, method: str, trained: dict[str, Any], text: TextData) -> Result:
    """Write down the accuracies of a run, and how often its predictions change where they should not."""
    folder = Path(args.output_dir)
    model, tokenizer = load_classifier(folder / "model", num_labels=len(text.labels))
    best = trained["best"]
    accuracies = {("clean_accuracy", ""): best["clean"]}
    accuracies |= {("robust_accuracy", name): one for name, one in best["robust"].items()}
    rows = [
        Row(measure, Estimate(one["accuracy"], one["n"], one["low"], one["high"]), part)
        for (measure, part), one in accuracies.items()
    ]
    texts = list(text.validation["text"])
    rows += consistency(model, tokenizer, texts, changes=list(CHANGES), max_length=args.max_length).rows()
    result = Result(method=method, task="demo", seed=args.seed, rows=rows, config=trained["config"])
    result.save(folder / f"demo{SUFFIX}")
    return result


def _value(result: Result, line: Line) -> float:
    estimate = find(result.rows, *line.row)
    assert estimate is not None and estimate.value is not None
    return estimate.value


def _paired(found: Mapping[str, Sequence[Result]], line: Line) -> Estimate:
    ours, theirs = ([_value(result, line) for result in found[method]] for method in ("ROSE", "plain"))
    return paired_difference(ours, theirs)


def _table(found: Mapping[str, Sequence[Result]], seconds: Mapping[str, Sequence[float]]) -> list[str]:
    """Mean and standard deviation over seeds, and ROSE's difference to plain with its interval."""

    def spread(values: Sequence[float], scale: float) -> str:
        return f"{scale * statistics.fmean(values):.1f} ± {scale * statistics.stdev(values):.1f}"

    head = f"{SEEDS} seeds, mean ± standard deviation"
    lines = [f"{head:36s}" + "".join(f"{method:>16s}" for method in found)]
    lines[0] += "   difference, 95 % interval (paired t)" if "ROSE" in found else ""
    for line in LINES:
        cells = "".join(f"{spread([_value(r, line) for r in results], 100):>16s}" for results in found.values())
        if "ROSE" in found:
            difference = _paired(found, line)
            low, high = (100 * float(bound or 0) for bound in (difference.low, difference.high))
            cells += f"   {100 * float(difference.value or 0):+.1f}  {low:+.1f} to {high:+.1f}"
        lines.append(f"{line.title:36s}{cells}")
    times = "".join(f"{spread(values, 1000):>16s}" for values in seconds.values())
    ratio = f"   x {_ratio(seconds):.2f}" if "ROSE" in seconds else ""
    lines.append(f"{'time of a step (ms)':36s}{times}{ratio}")
    return lines


def _ratio(seconds: Mapping[str, Sequence[float]]) -> float:
    """Median over seeds of ROSE's time to that of the plain run just before it."""
    return statistics.median(ours / theirs for ours, theirs in zip(seconds["ROSE"], seconds["plain"], strict=True))


def _conclusion(found: Mapping[str, Sequence[Result]], seconds: Mapping[str, Sequence[float]]) -> list[str]:
    """Say what the table allows to conclude, in words that follow from its numbers alone."""
    if "ROSE" not in found:
        return ["Plain fine-tuning alone: choose a strategy to have ROSE beside it."]
    clean = {method: statistics.fmean(_value(one, LINES[0]) for one in results) for method, results in found.items()}
    slow = [method for method, value in clean.items() if value < LEARNT]
    if slow:
        return [
            f"{' and '.join(slow)} did not learn the task (clean below {LEARNT:.0%}), so nothing can be said about "
            "robustness: train longer, or with another learning rate."
        ]
    verdicts: dict[str, list[str]] = {"better than plain": [], "worse than plain": [], "no sure difference": []}
    for line in LINES:
        if line.is_better:
            difference = _paired(found, line)
            better = float(difference.value or 0) * line.is_better > 0
            sure = difference.excludes_zero()
            name = "no sure difference" if not sure else "better than plain" if better else "worse than plain"
            verdicts[name].append(line.title.removesuffix(" (%)"))
    said = "; ".join(f"{name}: {', '.join(titles)}" for name, titles in verdicts.items() if titles)
    return [
        f"Both have learnt the task. ROSE against plain fine-tuning: {said}.",
        f"A step took {_ratio(seconds):.2f} times as long.",
        "Where the cue of the training turns, ROSE promises nothing. Made-up reviews and a few seeds show how to read",
        "such figures, not whether ROSE helps on your task: python -m examples.benchmark.compare measures that.",
    ]
