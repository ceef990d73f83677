"""Trains with Accelerate, a checkpoint after every step; goes on from the last whole one.

torchrun --nproc_per_node 2 tests/distributed/resume_accelerate.py ddp|fsdp2|zero2 OUTPUT STEPS
"""

from __future__ import annotations

import os
import shutil
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from rose_peft import get_selector
from tests.distributed.loops import accelerate_state
from tests.distributed.resize import SIZE, Accelerated
from tests.distributed.worker import RANK, build, micro_batch, whole


def save(run: Accelerated, folder: Path, step: int) -> None:
    """A checkpoint gets its name when all processes have written their part; the last two stay."""
    partial = folder / f"checkpoint-{step}.partial"
    run.save(partial)
    dist.barrier()
    if RANK == 0:
        partial.rename(folder / f"checkpoint-{step}")
        shutil.rmtree(folder / f"checkpoint-{step - 2}", ignore_errors=True)
    dist.barrier()


def main() -> None:
    """Train, and write {weights, statistics}."""
    engine, folder, steps = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    if engine == "zero2":
        import deepspeed

        deepspeed.init_distributed("gloo", timeout=timedelta(seconds=60))
    else:
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    done = [int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*") if path.suffix != ".partial"]
    dist.barrier()  # all have looked before any writes
    if RANK == 0:
        for path in folder.glob("*.partial"):
            shutil.rmtree(path)
    with accelerate_state(engine, "no"):
        model = build("ensemble", "sampled")
        run = Accelerated(model, engine)
        if done:
            run.load(folder / f"checkpoint-{max(done)}")
        for step in range(max(done, default=0), steps):
            torch.manual_seed(10 * step + RANK)
            run.backward(run.model(**micro_batch(step, RANK, SIZE)).loss)
            run.step()
            save(run, folder, step + 1)
        weights = whole((name, param) for name, param in model.named_parameters() if param.requires_grad)
    if RANK == 0:
        torch.save({"weights": weights, "statistics": get_selector(model).statistics().as_dict()}, folder / "end")
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    main()
