"""What ROSE costs, and how well cheap risk passes choose: time, memory and agreement in one benchmark.

    python -m examples.benchmark.cost --output_dir runs/cost
    python -m examples.benchmark.cost --task sst2 --data_dir DATA --rounds 0 --output_dir runs/agreement
    python -m examples.benchmark.cost --model_name_or_path roberta-base --device cuda --rounds 80

Every way trains in a process of its own, and every round takes one step of each in turn on the same batch. The cost of
a way is its mean time over that of plain training: a risk pass comes at some steps only, and a median would hide it.

With a task, a model is trained by first order, and at points on the way its masks are compared with the expected ones,
see agreement.py. Tables, a result file and, with a task, a picture go to the output folder.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from datasets import disable_progress_bars
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, HfArgumentParser
from transformers.utils import logging

from examples.training.arguments import InputError, TrainArguments
from examples.training.data import load_text
from examples.training.model import embedded_encoder
from examples.training.run import tokenize
from rose_peft import RoseError
from rose_peft.robustness import Estimate, Result, RobustnessError, Row
from rose_peft.robustness.estimate import paired_difference
from rose_peft.robustness.plotting import plot_cost
from rose_peft.robustness.results import SUFFIX

from .agreement import PUBLISHED, SETTINGS, Agreement, Batch, agreement_along
from .timing import clock, relative_cost, time_in_turn
from .ways import PLAIN, WAYS, peak_memory, stepper

UPPERS = (0.7, 0.4)
# Seconds of a step, and its time relative to plain training.
Cost = tuple[Estimate, Estimate]


@dataclass
class CostArguments:
    """What to measure."""

    output_dir: str = field(default="runs/cost", metadata={"help": "Folder for tables, result file and picture."})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub name or folder of an encoder; None for the embedded MiniLM."}
    )
    device: str = field(default="cpu", metadata={"help": "Device, such as cpu or cuda."})
    batch_size: int = field(default=32, metadata={"help": "Examples per step."})
    max_length: int = field(default=32, metadata={"help": "Tokens per example; with a task, the most."})
    seed: int = field(default=0, metadata={"help": "Seed of heads, batches and dropout."})
    ways: list[str] = field(
        default_factory=lambda: list(WAYS),
        metadata={"help": f"Ways to train, plain among them: {'; '.join(WAYS)}. All are in memory at once."},
    )
    fused: bool = field(
        default=False, metadata={"help": "Time steps with the fused AdamW, as examples/train.py has it."}
    )
    rounds: int = field(default=40, metadata={"help": "Rounds that count, some more go before; 0 measures no times."})
    memory: bool = field(default=True, metadata={"help": "Whether to measure the peak memory of each way."})
    task: str | None = field(default=None, metadata={"help": "GLUE task to measure agreement on; None does not."})
    data_dir: str | None = field(default=None, metadata={"help": "Folder of its data, as for examples/train.py."})
    train_samples: int = field(default=4000, metadata={"help": "Agreement: training examples."})
    train_steps: int = field(default=240, metadata={"help": "Agreement: length of the training."})
    points: int = field(default=20, metadata={"help": "Agreement: points of the training."})
    draws: int = field(default=12, metadata={"help": "Agreement: draws for the expected mask, 2 or more."})
    learning_rate: float = field(default=5e-5, metadata={"help": "Agreement: learning rate, constant."})

    def check(self) -> None:
        """Check what needs no model.

        Raises:
            InputError: Naming the option, its value and the way out.
        """
        for name in ("batch_size", "max_length", "train_samples", "train_steps", "points"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.draws < 2:
            raise InputError(f"draws={self.draws} must be at least 2; 12 is usual.")
        if self.points > self.train_steps:
            raise InputError(f"points={self.points} must be at most train_steps={self.train_steps}.")
        if self.rounds < 0:
            raise InputError(f"rounds={self.rounds} must be at least 0; 0 measures no times.")
        unknown = [way for way in self.ways if way not in WAYS]
        if unknown or PLAIN not in self.ways:
            raise InputError(f"ways={self.ways} must be of {'; '.join(WAYS)}, with {PLAIN} among them.")
        if not self.rounds and not self.memory and self.task is None:
            raise InputError("rounds=0 without memory and task leaves nothing to measure.")


def main(argv: list[str] | None = None) -> int:
    """Measure, and return the exit code: 0, or 2 after one line that says what to change."""
    (args,) = HfArgumentParser(CostArguments, description=__doc__).parse_args_into_dataclasses(argv)
    logging.set_verbosity_error()
    disable_progress_bars()
    try:
        args.check()
        name = args.model_name_or_path or embedded_encoder()
        torch.manual_seed(args.seed)
        times = _times(args, name) if args.rounds else {}
        memory = _memory(args, name) if args.memory else {}
        text = _write(args, name, times, memory, None)
        if args.task is not None:
            # After every point, so that a run that is killed leaves what it has seen.
            found = _agreement(args, name, lambda seen: _write(args, name, times, memory, seen))
            text = _write(args, name, times, memory, found)
    except (InputError, RoseError, RobustnessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(text)
    return 0


def _write(
    args: CostArguments, name: str, times: dict[str, Cost], memory: dict[str, int], found: Agreement | None
) -> str:
    """Write the result file, the tables and the picture; returns the tables."""
    folder = Path(args.output_dir)
    config = {**asdict(args), "model": Path(name).name, "threads": torch.get_num_threads()}
    for place in ("output_dir", "data_dir", "model_name_or_path"):
        del config[place]
    rows = [Row("step_seconds", seconds, way) for way, (seconds, _) in times.items()]
    rows += [Row("relative_time", cost, way) for way, (_, cost) in times.items()]
    rows += [Row("peak_memory", Estimate(size / 2**20), way) for way, size in memory.items()]
    result = Result("cost", args.task or "random tokens", args.seed, rows, config)
    tables = [_table(args.ways, times, memory)] if times or memory else []
    if found is not None:
        result.rows += _agreement_rows(found)
        result.images["cost against agreement"] = "agreement.png"
        tables.append(_agreement_table(found))
        plot_cost({f"upper quantile {upper:g}": _points(found, upper) for upper in UPPERS}, folder / "agreement.png")
    result.save(folder / f"cost{SUFFIX}")
    text = "\n".join(tables)
    (folder / "cost.md").write_text(text, encoding="utf-8")
    return text


def _times(args: CostArguments, name: str) -> dict[str, Cost]:
    """Mean seconds of a step of each way, and its cost relative to plain."""
    rest = name, args.device, args.batch_size, args.max_length, args.seed, args.fused
    seconds = time_in_turn({way: partial(stepper, way, *rest) for way in args.ways}, args.rounds)
    return {
        way: (Estimate(sum(times) / len(times), len(times)), relative_cost(times, seconds[PLAIN]))
        for way, times in seconds.items()
    }


def _memory(args: CostArguments, name: str) -> dict[str, int]:
    if torch.device(args.device).type == "cpu" and not Path("/proc/self/status").exists():
        raise InputError("memory=True reads /proc of Linux; pass --memory false, or --device cuda.")
    return {way: peak_memory(way, name, args.device, args.batch_size, args.max_length) for way in args.ways}


def _table(ways: list[str], times: dict[str, Cost], memory: dict[str, int]) -> str:
    lines = ["| way | ms per step | x plain | 95 % | peak memory, MB | x plain |", "|---|---|---|---|---|---|"]
    for way in ways:
        cells = ["", "", "", "", ""]
        if way in times:
            seconds, cost = times[way]
            interval = "" if cost.low is None else f"{cost.low:.3f} to {cost.high:.3f}"
            cells[:3] = f"{1000 * (seconds.value or 0):.0f}", f"{cost.value:.3f}", interval if way != PLAIN else ""
        if way in memory:
            cells[3:] = f"{memory[way] / 2**20:.0f}", f"{memory[way] / memory[PLAIN]:.2f}"
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _agreement(args: CostArguments, name: str, after_point: Callable[[Agreement], None]) -> Agreement:
    text = load_text(TrainArguments(task=args.task, data_dir=args.data_dir, max_train_samples=args.train_samples))
    tokenizer = AutoTokenizer.from_pretrained(name)
    rows = tokenize(text.train, tokenizer, args.max_length)
    collate = DataCollatorWithPadding(tokenizer)
    model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=len(text.labels)).to(args.device)

    def batches(seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(rows), generator=generator).tolist()
            for start in range(0, max(1, len(order) - args.batch_size + 1), args.batch_size):
                batch = collate([rows[index] for index in order[start : start + args.batch_size]])
                yield {key: value.to(args.device) for key, value in batch.items()}

    training, fresh = batches(args.seed), batches(args.seed + 1)
    return agreement_along(
        model,
        training,
        lambda: next(fresh),
        steps=args.train_steps,
        points=args.points,
        draws=args.draws,
        learning_rate=args.learning_rate,
        uppers=UPPERS,
        clock=clock,
        after_point=after_point,
    )


def _mean(values: list[float]) -> Estimate:
    return paired_difference(values, [0.0] * len(values))


def _agreement_rows(found: Agreement) -> list[Row]:
    rows = [Row("mask_agreement", _mean(shares), name, upper) for (name, upper), shares in found.shares.items()]
    for (name, upper), shares in found.shares.items():
        if name != PUBLISHED:
            difference = paired_difference(shares, found.shares[PUBLISHED, upper])
            rows.append(Row("mask_agreement_difference", difference, name, upper))
    rows += [Row("relative_time", Estimate(cost), name) for name, cost in _costs(found).items()]
    return rows


def _costs(found: Agreement) -> dict[str, float]:
    """Time of a step of first order, relative to one without its risk pass."""
    return {PUBLISHED: found.cost(1, 2)} | {str(one): found.cost(one.interval, one.fraction) for one in SETTINGS}


def _points(found: Agreement, upper: float) -> dict[str, tuple[float, Estimate]]:
    return {name: (cost, _mean(found.shares[name, upper])) for name, cost in _costs(found).items()}


def _agreement_table(found: Agreement) -> str:
    costs = _costs(found)
    lines = [
        "| scores from | x a step without | "
        + " | ".join(f"agreement at {upper:g} (less published)" for upper in UPPERS),
        "|---|---|" + "---|" * len(UPPERS),
    ]
    lines[0] += " |"
    for name in dict.fromkeys(name for name, _ in found.shares):
        cells = [f"{costs[name]:.2f}" if name in costs else ""]
        for upper in UPPERS:
            shares = found.shares[name, upper]
            less = paired_difference(shares, found.shares[PUBLISHED, upper])
            text = f"{_mean(shares).value:.3f}"
            if name != PUBLISHED:
                text += (
                    f" ({less.value:+.3f}"
                    + ("" if less.low is None else f", {less.low:+.3f} to {less.high:+.3f}")
                    + ")"
                )
            cells.append(text)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
