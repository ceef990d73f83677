"""Attack a classifier with TextAttack recipes: accuracy under attack and more, with intervals.

    NLTK_DATA=nltk_data python -m rose_peft.robustness attack --model runs/rose --task sst2 \
        --output_dir runs/rose/attack
    python -m rose_peft.robustness attack --model runs/lora --task rte --data_dir DATA --recipes deepwordbug pwws \
        --num_examples 100 --query_budget 500 --device cuda --bf16 --output_dir runs/lora/attack
    python -m rose_peft.robustness attack --model runs/mine --data_file test.csv --text_columns text \
        --output_dir runs/mine/attack
    python -m rose_peft.robustness attack --list_recipes

Killed and called again with the same arguments, it continues where it stopped. Every model meets the same sample of
examples and the same random choices. With --speed it times this kit's model wrapper against TextAttack's own instead.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass, field

from ..attacks.recipes import RECIPES
from ..attacks.run import AttackReport, describe, run_attacks
from ..errors import RobustnessError
from .arguments import DataArguments, LabelArguments, RunArguments, fail, parse


@dataclass
class AttackArguments:
    """Which attacks, and how hard."""

    model: str | None = field(default=None, metadata={"help": "Folder or hub name of a model, or of a PEFT adapter."})
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder for records, examples.csv, examples.parquet and attack.result.json."}
    )
    recipes: list[str] = field(
        default_factory=lambda: ["offline"],
        metadata={"help": "Recipes, or presets: 'offline' for those that need no download, 'all'."},
    )
    num_examples: int = field(default=200, metadata={"help": "Size of the random sample; 0 takes all examples."})
    seed: int = field(default=0, metadata={"help": "Seed of the sample and of the attacks."})
    query_budget: int | None = field(default=None, metadata={"help": "Model queries per example; default: no limit."})
    allow_downloads: bool = field(default=False, metadata={"help": "Let recipes download what they are missing."})
    overwrite: bool = field(default=False, metadata={"help": "Start again instead of continuing."})
    list_recipes: bool = field(default=False, metadata={"help": "Print all recipes and what they need, and stop."})
    speed: bool = field(
        default=False, metadata={"help": "Time our wrapper against TextAttack's own on these examples, and stop."}
    )


def table(report: AttackReport) -> str:
    """Format the results of all recipes, in per cent where they are shares."""
    lines = [f"{'recipe':16s}{'clean':>8s}{'under attack':>24s}{'success':>10s}{'words changed':>15s}{'queries':>9s}"]
    for name, result in report.results.items():
        under = result.accuracy_under_attack
        interval = f"[{100 * (under.low or 0):.1f}, {100 * (under.high or 0):.1f}]"
        cells = [
            f"{100 * figure.value:.1f} %" if figure.value is not None else "-"
            for figure in (result.clean_accuracy, under, result.success_rate, result.words_changed)
        ]
        queries = "-" if result.queries.value is None else f"{result.queries.value:.0f}"
        lines.append(
            f"{name:16s}{cells[0]:>8s}{cells[1] + ' ' + interval:>24s}{cells[2]:>10s}{cells[3]:>15s}{queries:>9s}"
        )
    return "\n".join(lines)


def measure_speed(args: AttackArguments, data: DataArguments, run: RunArguments) -> None:
    """Print examples per second of each recipe through both wrappers."""
    from ..attacks.speed import compare_wrappers

    given = {"bf16": run.bf16, "max_length": run.max_length, "allow_downloads": args.allow_downloads}
    for name, value in given.items():
        if value:
            raise RobustnessError(f"{name}={value}: TextAttack's wrapper has no such option; leave it out of --speed.")
    examples = data.load()
    model, tokenizer = run.load(str(args.model), data.classes(examples))
    speeds = compare_wrappers(
        model,
        tokenizer,
        examples.sample(args.num_examples or None, args.seed),
        args.recipes,
        seed=args.seed,
        query_budget=args.query_budget,
        batch_size=run.batch_size,
    )
    print(f"{'recipe':16s}{'ours (ex/s)':>14s}{'TextAttack (ex/s)':>20s}{'ratio':>8s}{'same result':>13s}")
    for speed in speeds:
        print(
            f"{speed.recipe:16s}{speed.ours:14.2f}{speed.theirs:20.2f}{speed.ratio:8.1f}"
            f"{100 * speed.same_results:11.0f} %",
            flush=True,
        )


def main(argv: list[str]) -> int:
    """Run, and return the exit code."""
    types = (AttackArguments, DataArguments, RunArguments, LabelArguments)
    args, data, run, label = parse(types, "attack", __doc__, argv)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    if args.list_recipes:
        print("\n".join(describe(recipe) for recipe in RECIPES.values()))
        return 0
    try:
        if args.model is None or (args.output_dir is None and not args.speed):
            raise RobustnessError(f"model={args.model!r}, output_dir={args.output_dir!r}: both are needed.")
        if args.speed:
            measure_speed(args, data, run)
            return 0
        run.check(args.output_dir, args.seed)
        examples = data.load()
        model, tokenizer = run.load(args.model, data.classes(examples))
        method, training_seed = label.of(args.model)
        report = run_attacks(
            model,
            tokenizer,
            examples,
            args.recipes,
            output_dir=args.output_dir,
            num_examples=args.num_examples or None,
            seed=args.seed,
            query_budget=args.query_budget,
            allow_downloads=args.allow_downloads,
            overwrite=args.overwrite,
            method=method,
            task=data.task,
            training_seed=training_seed,
            report=lambda line: print(line, file=sys.stderr),
            **run.options(),
        )
    except RobustnessError as error:
        return fail(error)
    print(table(report))
    print(f"\nexamples.csv, examples.parquet, attack.result.json: {report.output_dir}")
    return 0
