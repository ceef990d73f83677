"""Fine-tune a text classifier with ROSE, or plainly, and measure clean and robust accuracy.

    python examples/train.py                                    # the embedded demo: plain, then ROSE, side by side
    python examples/train.py --task sst2 --model_name_or_path roberta-base --output_dir runs/sst2
    python examples/train.py --task sst2 --data_dir DATA --strategy ensemble --adapter lora --output_dir runs/lora
    accelerate launch --config_file accelerate_configs/multi_gpu_ddp.yaml examples/train.py --task rte ...

A run can be killed at any moment and continued with --resume.
"""

from __future__ import annotations

import dataclasses
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

from examples.training.arguments import InputError, Parser, TrainArguments
from examples.training.checkpoint import NOTE, check_writable, is_full_disk
from examples.training.data import TextData, load_text
from examples.training.run import train
from rose_peft import RoseError
from rose_peft.robustness import RobustnessError


def demo(args: TrainArguments, text: TextData) -> list[dict[str, Any]]:
    """Train plainly first and with the chosen strategy after it, into two folders beside each other."""
    results: list[dict[str, Any]] = []
    for strategy in dict.fromkeys(("none", args.strategy)):
        folder = Path(args.output_dir) / ("plain" if strategy == "none" else strategy)
        # A demo killed in its first run has no second one to resume.
        resume = args.resume and (not results or (folder / NOTE).exists())
        variant = args.variant if strategy != "none" else None
        one = dataclasses.replace(args, strategy=strategy, variant=variant, output_dir=str(folder), resume=resume)
        results.append(train(one, text))
    return results


def table(results: list[dict[str, Any]]) -> str:
    """Format runs side by side: clean and robust accuracies of the best epoch with their intervals, and cost."""
    sets = list(results[0]["best"]["robust"])
    lines = [
        f"{'strategy':14s} {'adapter':8s} {'clean':>8s}"
        + "".join(f" {name:>9s} {'(95 %)':>16s}" for name in sets)
        + f" {'s/step':>8s} {'cost':>6s}"
    ]
    for result in results:
        best, seconds = result["best"], result["timing"]["seconds_per_step"]
        cells = [f"{best['clean']['accuracy']:8.1%}"]
        for name in sets:
            robust = best["robust"][name]
            interval = f"{robust['low']:.1%} - {robust['high']:.1%}"
            cells.append(f"{robust['accuracy']:9.1%} {interval:>16s}")
        # A run alone has nothing to be compared with.
        cost = f"{seconds / results[0]['timing']['seconds_per_step']:5.1f}x" if len(results) > 1 else ""
        cells.append(f"{seconds:8.3f} {cost:>6s}")
        lines.append(f"{result['method']:14s} {Path(result['adapter']).stem:8s} " + " ".join(cells).rstrip())
    return "\n".join(lines)


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
    args = Parser().parse(argv)
    logging.set_verbosity_error()
    disable_progress_bars()
    state = join_processes()
    try:
        args.check()
        args.refuse_without_effect(args.given())
        check_writable(Path(args.output_dir))
        with state.main_process_first():  # the others find the data in the cache
            text = load_text(args)
        results = demo(args, text) if args.is_demo else [train(args, text)]
    except (InputError, RoseError, RobustnessError) as error:
        return fail(state, str(error))
    except Exception as error:  # safetensors and torch have their own errors for a full disk
        if not is_full_disk(error):
            raise
        return fail(state, f"output_dir={args.output_dir!r}: the disk is full; make room and continue with --resume.")
    if state.is_main_process:
        print(f"\n{table(results)}")
        print(f"\nmodels, results.json and masks.png: {args.output_dir}")
    state.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
