"""Trains four steps, saving after two; or goes on from there, in another number of processes.

torchrun --nproc_per_node N tests/distributed/resize.py ROUTE save|load FOLDER OUTPUT
"""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from rose_peft import get_selector
from tests.distributed.loops import accelerate_state
from tests.distributed.worker import RANK, WORLD, build, micro_batch, whole, wrap

ROUTES = ("dcp ddp", "dcp fsdp2", "accelerate ddp", "accelerate fsdp2", "accelerate zero2")
STEPS, SAVED, MICRO_BATCHES, SIZE = 4, 2, 2, 4


def state_of(model: nn.Module) -> dict[str, Any]:
    """ROSE's state as it lies in the optimizer."""
    values = get_selector(model).state.values
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in values.items()}


class Checkpoint:
    """`torch.distributed.checkpoint` on its own."""

    def __init__(self, model: nn.Module, engine: str) -> None:
        self.model = wrap(model, engine) if WORLD > 1 or engine == "fsdp2" else model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def save(self, folder: Path) -> None:
        weights, state = get_state_dict(self.model, self.optimizer)
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)

    def load(self, folder: Path) -> None:
        weights, state = get_state_dict(self.model, self.optimizer)
        saved = {"model": weights, "optimizer": state}
        dcp.load(saved, checkpoint_id=folder)
        set_state_dict(
            self.model, self.optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"]
        )
        get_selector(self.model).restore(self.optimizer)


class Accelerated:
    """`accelerator.save_state` and `load_state`."""

    def __init__(self, model: nn.Module, engine: str) -> None:
        plugin: dict[str, Any] = {}
        if engine == "zero2":
            from accelerate import DeepSpeedPlugin

            config = {
                "train_micro_batch_size_per_gpu": SIZE,
                "gradient_accumulation_steps": MICRO_BATCHES // WORLD,
                "zero_optimization": {"stage": 2},
                "steps_per_print": 10**9,
            }
            plugin = {"deepspeed_plugin": DeepSpeedPlugin(hf_ds_config=config)}
        self.accelerator = Accelerator(**plugin)
        assert (self.accelerator.distributed_type == DistributedType.DEEPSPEED) == (engine == "zero2")
        self.engine = engine
        optimizer = torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], lr=1e-2)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.backward = self.accelerator.backward

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def save(self, folder: Path) -> None:
        self.accelerator.save_state(str(folder))

    def load(self, folder: Path) -> None:
        self.accelerator.load_state(str(folder))
        if self.engine != "zero2":  # whose own optimizer is seen in the next forward call
            get_selector(self.model).restore(self.optimizer.optimizer)


def main() -> None:
    """Write {state, masks, weights}, or the error of the engine."""
    route, action, folder, output = sys.argv[1], sys.argv[2], Path(sys.argv[3]), sys.argv[4]
    way, engine = route.split()
    if engine == "zero2":
        import deepspeed

        deepspeed.init_distributed("gloo", timeout=timedelta(seconds=60))
    else:
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    result: dict[str, Any] = {"masks": [], "error": ""}
    with accelerate_state(engine, "no") if way == "accelerate" else nullcontext():
        model = build("ensemble", "sampled")
        run = (Accelerated if way == "accelerate" else Checkpoint)(model, engine)
        try:
            if action == "load":
                run.load(folder)
                result["state"] = state_of(model)
            for step in range(SAVED if action == "load" else 0, STEPS):
                for index in range(RANK, MICRO_BATCHES, WORLD):
                    torch.manual_seed(10 * step + index)
                    run.backward(run.model(**micro_batch(step, index, SIZE)).loss * WORLD / MICRO_BATCHES)
                run.step()
                result["masks"].append(get_selector(model).state.last_mask.clone())
                if action == "save" and step == SAVED - 1:
                    run.save(folder)
                    result["state"] = state_of(model)
            trained = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
            result["weights"] = whole(trained)
        except Exception as error:
            if engine != "zero2":
                raise
            result["error"] = f"{type(error).__name__}: {error}"
    torch.save(result, f"{output}.{RANK}")
    sys.stdout.flush()
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    main()
