"""Fine-tune a text classifier with ROSE, or plainly, and measure clean and robust accuracy.

    python examples/train.py                                    # the embedded demo: plain and ROSE, three seeds each
    python examples/train.py --task sst2 --model_name_or_path roberta-base --output_dir runs/sst2
    python examples/train.py --task sst2 --data_dir DATA --strategy ensemble --adapter lora --output_dir runs/lora
    accelerate launch --config_file accelerate_configs/multi_gpu_ddp.yaml examples/train.py --task rte ...

A run can be killed at any moment and continued with --resume.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from datasets import disable_progress_bars
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started as a script, it sees only its own folder

from examples.training.arguments import InputError, TrainParser
from examples.training.checkpoint import check_writable
from examples.training.data import load_text
from examples.training.demo import demo
from examples.training.run import train
from rose_peft import RoseError
from rose_peft.robustness import RobustnessError
from rose_peft.robustness.errors import is_full_disk


def table(result: dict[str, Any]) -> str:
    """Format a run: clean and robust accuracies of the best epoch with their intervals, and the time of a step."""
    best = result["best"]
    head = f"{'strategy':14s} {'adapter':8s} {'clean':>8s}"
    line = f"{result['method']:14s} {Path(result['adapter']).stem:8s} {best['clean']['accuracy']:8.1%}"
    for name, robust in best["robust"].items():
        interval = f"{robust['low']:.1%} - {robust['high']:.1%}"
        head += f" {name:>9s} {'(95 %)':>16s}"
        line += f" {robust['accuracy']:{max(9, len(name))}.1%} {interval:>16s}"
    return f"{head} {'s/step':>8s}\n{line} {result['timing']['seconds_per_step']:8.3f}"


def join_processes() -> PartialState:
    """Join the processes that were started with this one.

    Left to itself, Accelerate takes each of several CPU processes for the only one, and all would write to one folder.
    """
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or (several and not torch.accelerator.is_available())
    return PartialState(cpu=on_cpu)


def fail(state: PartialState, message: str) -> int:
    """Print an error as one line, on one process, and return the exit code for it."""
    if state.is_local_main_process:
        print(f"error: {message}", file=sys.stderr)
    return 2


def main(argv: list[str] | None = None) -> int:
    """Run, and return the exit code: 0, or 2 after one line that says what to change."""
    parser = TrainParser()
    args = parser.parse(argv)
    logging.set_verbosity_error()
    disable_progress_bars()
    state = join_processes()
    try:
        args.check()
        args.refuse_without_effect(args.given())
        check_writable(Path(args.output_dir))
        with state.main_process_first():  # the others find the data in the cache
            text = load_text(args)
        lines = demo(args, text, parser.explicit, state.is_main_process) if args.is_demo else table(train(args, text))
    except (InputError, RoseError, RobustnessError) as error:
        return fail(state, str(error))
    except Exception as error:  # safetensors and torch have their own errors for a full disk
        if not is_full_disk(error):
            raise
        return fail(state, f"output_dir={args.output_dir!r}: the disk is full; make room and continue with --resume.")
    if state.is_main_process:
        print(f"\n{lines}")
        print(f"\nmodels, results.json and {'demo.png' if args.is_demo else 'masks.png'}: {args.output_dir}")
    state.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
