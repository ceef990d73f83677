"""The paper's figure 1 in one command: loss landscapes before fine-tuning, overfitted, plain, and with ROSE.

    python -m examples.benchmark.figure1 --task sst2 --model_name_or_path roberta-base --output_dir runs/figure1
    python -m examples.benchmark.figure1 --task sst2 --data_dir DATA --max_train_samples 4000 --output_dir runs/figure1

It fine-tunes three models, on the same data and with the same options but for the strategy: an overfitted one (few
examples, many epochs, the last model), a plain one and one with ROSE, and draws the four surfaces side by side on one
scale. The options of train.py hold for all three. A run that was killed is continued by the same command.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from datasets import disable_progress_bars
from transformers.utils import logging

from examples.training.arguments import InputError, TrainArguments
from examples.training.model import embedded_encoder
from examples.training.run import train_once
from rose_peft import RoseError
from rose_peft.robustness.command_line import landscape
from rose_peft.robustness.command_line.parser import Parser


@dataclasses.dataclass
class FigureArguments:
    """What to draw, and what overfitted means."""

    overfit_samples: int = dataclasses.field(
        default=200, metadata={"help": "Training examples of the overfitted model."}
    )
    overfit_epochs: int = dataclasses.field(default=30, metadata={"help": "Epochs of the overfitted model."})
    num_examples: int = dataclasses.field(default=128, metadata={"help": "Evaluation examples that give the loss."})
    points: int = dataclasses.field(default=21, metadata={"help": "Points along each direction, odd."})
    radius: float = dataclasses.field(default=1.0, metadata={"help": "Largest step along each direction."})
    probes: int = dataclasses.field(default=16, metadata={"help": "Probes of the Hessian's trace; 0 leaves it out."})


def main(argv: list[str] | None = None) -> int:
    """Run, and return the exit code: 0, or 2 after one line that says what to change."""
    args, figure = Parser((TrainArguments, FigureArguments), description=__doc__).read(argv)
    logging.set_verbosity_error()
    disable_progress_bars()
    folder = Path(args.output_dir)
    overfit = {"max_train_samples": figure.overfit_samples, "epochs": figure.overfit_epochs, "keep": "last"}
    runs = {
        "overfitted": {"strategy": "none", "variant": None, **overfit},
        "plain": {"strategy": "none", "variant": None},
        f"ROSE ({args.strategy})": {},
    }
    try:
        if args.task is None or args.strategy == "none":
            raise InputError(
                f"task={args.task!r}, strategy={args.strategy!r}: figure 1 needs a GLUE task and a strategy of ROSE."
            )
        for name in ("train_file", "validation_file", "overwrite", "resume"):
            if getattr(args, name):
                raise InputError(
                    f"{name}={getattr(args, name)!r} has no place here: figure 1 is of a GLUE task, and the same "
                    "command continues what it finds in output_dir."
                )
        models = [f"before fine-tuning={args.model_name_or_path or embedded_encoder()}"]
        for name, changes in runs.items():
            one = dataclasses.replace(args, output_dir=str(folder / name), **changes)
            one.check()
            train_once(one)
            models.append(f"{name}={folder / name / 'model'}")
    except (InputError, RoseError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    data = ["--data_dir", args.data_dir] if args.data_dir else []
    settings = [f"--{name}={getattr(figure, name)}" for name in ("num_examples", "points", "radius", "probes")]
    place = ["--task", args.task, "--output_dir", str(folder / "landscape"), "--seed", str(args.seed)]
    place += ["--training_seed", str(args.seed)]
    return landscape.main([*place, *data, *settings, "--models", *models])


if __name__ == "__main__":
    sys.exit(main())
