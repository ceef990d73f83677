"""Accuracy without a search for adversarial examples: clean, on robust sets, under noise of several kinds and rates.

    python -m rose_peft.robustness noise --model runs/rose --task sst2 --output_dir runs/rose/noise
    python -m rose_peft.robustness noise --model runs/lora --task rte --data_dir DATA --kinds typos swaps \
        --rates 0.1 0.3 --robust_files revised=revised.parquet --output_dir runs/lora/noise

Writes noise.result.json (for the report) and noise.png. AdvGLUE is measured where the task has a counterpart in it.
Synonyms need NLTK with WordNet and its stop words. Where these or AdvGLUE's data are missing, they are named and left
out. Not every word can be changed; the table and config["words_changed"] say what share of all words was.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from ..adv_glue import ADV_GLUE, evaluate_adv_glue
from ..data import get_task
from ..errors import DataError, RobustnessError
from ..noise import DEFAULT_RATES, KINDS, evaluate_noise
from ..plotting import plot_noise
from ..results import SUFFIX, Result
from ..robust_sets import evaluate_robust_sets
from .arguments import DataArguments, LabelArguments, RunArguments, fail, parse


@dataclass
class NoiseArguments:
    """Which noise, and how much."""

    model: str = field(metadata={"help": "Folder or hub name of a model or PEFT adapter, or a run of train.py."})
    output_dir: str = field(metadata={"help": "Folder for noise.result.json and noise.png."})
    kinds: list[str] = field(
        default_factory=lambda: list(KINDS), metadata={"help": f"Kinds of noise, of {', '.join(KINDS)}."}
    )
    rates: list[float] = field(
        default_factory=lambda: list(DEFAULT_RATES),
        metadata={"help": "Shares of words to hit, above 0 and at most 1."},
    )
    robust_files: list[str] = field(
        default_factory=list,
        metadata={"help": "Further test files of the same columns, as NAME=PATH; PATH may lie in data_dir."},
    )
    num_examples: int = field(default=0, metadata={"help": "Size of a random sample; 0 takes all examples."})
    seed: int = field(default=0, metadata={"help": "Seed of the noise and of the sample."})


def main(argv: list[str]) -> int:
    """Run, and return the exit code."""
    types = (NoiseArguments, DataArguments, RunArguments, LabelArguments)
    args, data, run, label = parse(types, "noise", __doc__, argv)
    method, training_seed = label.of(args.model)
    folder = Path(args.output_dir)
    try:
        run.check(folder, args.seed)
        examples = data.load().sample(args.num_examples or None, args.seed)
        robust = data.load_robust(args.robust_files)
        model, tokenizer = run.load(args.model, data.classes(examples))
        noise = evaluate_noise(
            model, tokenizer, examples, kinds=args.kinds, rates=args.rates, seed=args.seed, **run.options()
        )
        rows = noise.rows()
        unavailable = dict(noise.unavailable)
        if data.task is not None and get_task(data.task).adv_config is not None:
            try:
                adversarial = evaluate_adv_glue(
                    model, tokenizer, data.task, data_dir=data.data_dir, clean=examples, **run.options()
                )
                rows += adversarial.rows()[1:]  # the clean accuracy is there already
            except DataError as error:
                unavailable[ADV_GLUE] = str(error)
                print(f"AdvGLUE is not measured: {error}", file=sys.stderr)
        rows += evaluate_robust_sets(model, tokenizer, robust, **run.options())
        for kind, lack in noise.unavailable.items():
            print(f"noise {kind} does not run: it needs {lack}", file=sys.stderr)
        # Not among the rows: they are the same for every model, and would be a table as wide as the noise.
        words_changed = [
            {"kind": kind, "rate": rate, "share": share}
            for kind, by_rate in noise.words_changed.items()
            for rate, share in by_rate.items()
        ]
        plot_noise({method: noise}, folder / "noise.png")
        Result(
            method=method,
            task=data.task or examples.name,
            seed=training_seed,
            rows=rows,
            config={
                "data": examples.fingerprint(),
                "noise_seed": args.seed,
                "rates": args.rates,
                "words_changed": words_changed,
                "unavailable": unavailable,
                "model": args.model,
                **run.written(model, tokenizer),
            },
        ).save(folder / f"noise{SUFFIX}")
    except RobustnessError as error:
        return fail(error)
    for row in rows:
        share = noise.words_changed.get(row.part, {}).get(row.rate or 0.0) if row.measure == "noise_accuracy" else None
        print(f"{row.title:36s} {row.estimate}" + ("" if share is None else f", {share:.1%} of words changed"))
    print(f"{'noise, mean':36s} {noise.mean:.4g}")
    print(f"\nnoise{SUFFIX}, noise.png: {folder}")
    return 0
