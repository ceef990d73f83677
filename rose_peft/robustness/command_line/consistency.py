"""How often a classifier changes its mind where it should not: under dropout, typos and synonyms. Needs no labels.

    python -m rose_peft.robustness consistency --model runs/rose --task sst2 --output_dir runs/rose/consistency
    python -m rose_peft.robustness consistency --model runs/mine --data_file unlabelled.csv --text_columns text \
        --output_dir runs/mine/consistency

Writes consistency.result.json for the report.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from ..consistency import DEFAULT_CHANGES, consistency
from ..data import digest
from ..errors import RobustnessError
from ..noise import KINDS
from ..results import SUFFIX, Result
from .arguments import DataArguments, LabelArguments, RunArguments, fail, parse


@dataclass
class ConsistencyArguments:
    """What is changed, and how much."""

    model: str = field(metadata={"help": "Folder or hub name of a model or PEFT adapter, or a run of train.py."})
    output_dir: str = field(metadata={"help": "Folder for consistency.result.json."})
    changes: list[str] = field(
        default_factory=lambda: list(DEFAULT_CHANGES), metadata={"help": f"Of dropout, {', '.join(KINDS)}."}
    )
    rate: float = field(default=0.1, metadata={"help": "Share of words that noise hits, above 0 and at most 1."})
    seed: int = field(default=0, metadata={"help": "Seed of dropout and noise."})


def main(argv: list[str]) -> int:
    """Run, and return the exit code."""
    types = (ConsistencyArguments, DataArguments, RunArguments, LabelArguments)
    args, data, run, label = parse(types, "consistency", __doc__, argv)
    folder = Path(args.output_dir)
    try:
        run.check(folder, args.seed)
        texts = data.load_texts()
        model, tokenizer = run.load(args.model, len(data.names()) or 2)
        found = consistency(
            model, tokenizer, texts, changes=args.changes, rate=args.rate, seed=args.seed, **run.options()
        )
        method, training_seed = label.of(args.model)
        Result(
            method=method,
            task=data.task or str(data.data_file),
            seed=training_seed,
            rows=found.rows(),
            config={
                "seed": args.seed,
                "data": digest(texts),
                "texts": len(texts),
                "unavailable": found.unavailable,
                "model": args.model,
                **run.written(model, tokenizer),
            },
        ).save(folder / f"consistency{SUFFIX}")
    except RobustnessError as error:
        return fail(error)
    for change, lack in found.unavailable.items():
        print(f"{change} is not measured: {lack}", file=sys.stderr)
    for row in found.rows():
        print(f"{row.title:44s} {row.estimate}")
    print(f"\nconsistency{SUFFIX}: {folder}")
    return 0
