"""Accuracy without a search for adversarial examples: clean, on AdvGLUE, and under noise of several kinds and rates.

    python examples/noise.py --model runs/rose --task sst2 --output_dir runs/rose/noise
    python examples/noise.py --model runs/lora --task rte --data_dir DATA --kinds typos swaps --rates 0.1 0.3 \
        --output_dir runs/lora/noise

Writes noise.json (a result file for the report) and noise.png. AdvGLUE is measured where the task has a counterpart in
it. Synonyms need NLTK with WordNet and its stop words. Where these or AdvGLUE's data are missing, they are named and
left out. Not every word can be changed; the table and config["words_changed"] say what share of all words was.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser

from rose_peft.robustness.adv_glue import evaluate_adv_glue
from rose_peft.robustness.cli import DataArguments, LabelArguments, RunArguments, fail
from rose_peft.robustness.data import get_task
from rose_peft.robustness.errors import DataError, RobustnessError
from rose_peft.robustness.noise import DEFAULT_RATES, KINDS, evaluate_noise, plot_noise
from rose_peft.robustness.results import Result


@dataclass
class NoiseArguments:
    """Which noise, and how much."""

    model: str = field(metadata={"help": "Folder or hub name of a model, or of a PEFT adapter."})
    output_dir: str = field(metadata={"help": "Folder for noise.json and noise.png."})
    kinds: list[str] = field(
        default_factory=lambda: list(KINDS), metadata={"help": f"Kinds of noise, of {', '.join(KINDS)}."}
    )
    rates: list[float] = field(
        default_factory=lambda: list(DEFAULT_RATES),
        metadata={"help": "Shares of words to hit, above 0 and at most 1."},
    )
    num_examples: int = field(default=0, metadata={"help": "Size of a random sample; 0 takes all examples."})
    seed: int = field(default=0, metadata={"help": "Seed of the noise and of the sample."})


def main(argv: list[str] | None = None) -> int:
    """Run, and return the exit code: 0, or 2 after one line that says what to change."""
    parser = HfArgumentParser((NoiseArguments, DataArguments, RunArguments, LabelArguments), description=__doc__)
    args, data, run, label = parser.parse_args_into_dataclasses(argv)
    try:
        examples = data.load().sample(args.num_examples or None, args.seed)
        model, tokenizer = run.load(args.model, data.classes(examples))
        noise = evaluate_noise(
            model, tokenizer, examples, kinds=args.kinds, rates=args.rates, seed=args.seed, **run.options()
        )
        figures = noise.figures()
        unavailable = dict(noise.unavailable)
        if data.task is not None and get_task(data.task).adv_config is not None:
            try:
                adversarial = evaluate_adv_glue(
                    model, tokenizer, data.task, data_dir=data.data_dir, clean=examples, **run.options()
                )
                figures.update(adversarial.figures())
            except DataError as error:
                unavailable["AdvGLUE"] = str(error)
                print(f"AdvGLUE is not measured: {error}", file=sys.stderr)
    except RobustnessError as error:
        return fail(error)
    for kind, lack in noise.unavailable.items():
        print(f"noise {kind} does not run: it needs {lack}", file=sys.stderr)
    # Not among the figures: they are the same for every model, and would be a table as wide as the noise.
    words_changed = {
        f"{kind}@{rate:g}": share for kind, by_rate in noise.words_changed.items() for rate, share in by_rate.items()
    }
    folder = Path(args.output_dir)
    plot_noise({label.method: noise}, folder / "noise.png")
    Result(
        method=label.method,
        task=data.task or examples.name,
        seed=label.training_seed,
        figures=figures,
        config={
            "data": examples.fingerprint(),
            "noise_seed": args.seed,
            "rates": args.rates,
            "words_changed": words_changed,
            "unavailable": unavailable,
            **run.options(),
        },
    ).save(folder / "noise.json")
    for name, figure in figures.items():
        share = words_changed.get(name.removeprefix("noise/").removesuffix("/accuracy"))
        print(f"{name:36s} {figure}" + ("" if share is None else f", {share:.1%} of words changed"))
    print(f"\nnoise.json, noise.png: {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
