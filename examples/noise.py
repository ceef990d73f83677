"""Accuracy without a search for adversarial examples: clean, on AdvGLUE, and under noise of several kinds and rates.

    python examples/noise.py --model runs/rose --task sst2 --output_dir runs/rose/noise
    python examples/noise.py --model runs/lora --task rte --data_dir DATA --kinds typos swaps --rates 0.1 0.3 \
        --output_dir runs/lora/noise

Writes noise.json (a result file for the report) and noise.png. AdvGLUE is measured where the task has a counterpart in
it. Synonyms need NLTK with WordNet and its stop words; where they are missing, that kind is named and left out.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser

from rose_peft.robustness.adv_glue import evaluate_adv_glue
from rose_peft.robustness.cli import DataArguments, LabelArguments, RunArguments, fail
from rose_peft.robustness.data import get_task
from rose_peft.robustness.errors import RobustnessError
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
        if data.task is not None and get_task(data.task).adv_config is not None:
            adversarial = evaluate_adv_glue(
                model, tokenizer, data.task, data_dir=data.data_dir, clean=examples, **run.options()
            )
            figures.update(adversarial.figures())
    except RobustnessError as error:
        return fail(error)
    for kind, lack in noise.unavailable.items():
        print(f"noise {kind} does not run: it needs {lack}", file=sys.stderr)
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
            "unavailable": noise.unavailable,
            **run.options(),
        },
    ).save(folder / "noise.json")
    for name, figure in figures.items():
        print(f"{name:36s} {figure}")
    print(f"\nnoise.json, noise.png: {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
