"""The training loops of the table: plain PyTorch, Accelerate and the Trainer, under each engine and precision."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.utils.data import DataLoader, SequentialSampler
from transformers import Trainer, TrainingArguments

from tests.distributed import worker
from tests.distributed.as_gpus import pretend
from tests.distributed.cells import ELSEWHERE, Cell
from tests.distributed.worker import DDP_OPTIONS, RANK, WORLD, micro_batch, wrap
from tests.helpers import loops as user_loops

STEPS, MICRO_BATCHES, SIZE = 4, 4, 2
PER_RANK = MICRO_BATCHES // WORLD
OPTIMIZER = {"lr": 1e-2, "weight_decay": 0.01}
# What `accelerate launch` tells its processes for accelerate_configs/multi_gpu_fsdp2.yaml.
SHARDED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "BertLayer",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_USE_ORIG_PARAMS": "true",
}


class CannotRunError(RuntimeError):
    """What a cell asks for does not exist on a CPU."""


def rows() -> list[dict[str, torch.Tensor]]:
    """All examples in the order of the micro-batches."""
    batches = [micro_batch(step, index, SIZE) for step in range(STEPS) for index in range(MICRO_BATCHES)]
    return [{name: tensor[row] for name, tensor in batch.items()} for batch in batches for row in range(SIZE)]


def build(cell: Cell) -> nn.Module:
    """The model that the cell trains, the same on every rank."""
    special = {"sft": user_loops.causal, "lightning": user_loops.classifier}
    return special.get(cell.loop, worker.build)(cell.strategy, risk_pass=cell.risk_pass)


def steps_of(cell: Cell) -> int:
    """Optimizer steps that the cell takes."""
    return user_loops.STEPS if cell.loop in ELSEWHERE else STEPS


def elsewhere(model: nn.Module, cell: Cell) -> None:
    """Loops that have their own tests, as they are there."""
    loop = {"sft": user_loops.sft_loop, "lightning": user_loops.lightning_loop}[cell.loop]
    with accelerate_state(cell.engine, mixed_precision(cell)), TemporaryDirectory() as folder:
        try:
            loop(model, Path(folder))
        except pytest.skip.Exception as skipped:
            raise CannotRunError(str(skipped)) from skipped


def train(model: nn.Module, cell: Cell) -> None:
    """Train under the cell's engine, in its loop and precision."""
    weights = {"bf16": torch.bfloat16, "float64": torch.float64}.get(cell.precision, torch.float32)
    model.to(weights)
    if cell.loop in ("checkpointing", "reentrant"):
        model.enable_input_require_grads()  # without them reentrant checkpoints see no gradient at all
        model.gradient_checkpointing_enable({"use_reentrant": cell.loop == "reentrant"})
    loops = {"accelerate": accelerate_loop, "trainer": trainer_loop, **dict.fromkeys(ELSEWHERE, elsewhere)}
    loops.get(cell.loop, plain_loop)(model, cell)


def under(engine: str, model: nn.Module) -> nn.Module:
    """Put the model under an engine, those that are refused too."""
    if engine == "fsdp1":
        return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    return OneReplica(model) if engine == "data_parallel" else wrap(model, engine)


class OneReplica(nn.DataParallel):
    """What nn.DataParallel does on GPUs, which it leaves out on a CPU: it calls marked copies."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        copies = {module: module._replicate_for_data_parallel() for module in self.module.modules()}
        for module, copy in copies.items():
            copy._parameters = module._parameters
            copy._modules = {name: copies.get(child) for name, child in module._modules.items()}
        return copies[self.module](*args, **kwargs)


def plain_loop(model: nn.Module, cell: Cell) -> None:
    """A loop in PyTorch alone, with clipping."""
    network = under(cell.engine, model)
    optimizer = torch.optim.AdamW(network.parameters(), **OPTIMIZER)
    half = {"bf16_autocast": torch.bfloat16, "fp16_autocast": torch.float16}.get(cell.precision)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=half is torch.float16)
    for step in range(STEPS):
        mine = [index for index in range(MICRO_BATCHES) if index % WORLD == RANK]
        for index in mine:
            quiet = index != mine[-1] and hasattr(network, "no_sync") and cell.engine != "ddp_static"
            with network.no_sync() if quiet else nullcontext():
                with torch.autocast("cpu", half) if half else nullcontext():
                    loss = network(**micro_batch(step, index, SIZE)).loss
                scaler.scale(loss / PER_RANK).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        if cell.loop == "step(closure)":
            optimizer.step(lambda loss=loss: loss)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()


@contextmanager
def accelerate_state(engine: str, mixed_precision: str) -> Iterator[None]:
    """Start Accelerate anew, as `accelerate launch` does in a process of its own."""
    # Told to use the CPU, Accelerate takes no DeepSpeed; it finds the CPU itself.
    environment = {} if engine.startswith("zero") else {"ACCELERATE_USE_CPU": "true"}
    sharded = engine in ("fsdp1", "fsdp2")
    if sharded:
        environment = {**SHARDED, "FSDP_VERSION": engine[-1], "ACCELERATE_TORCH_DEVICE": "cpu"}
    environment["ACCELERATE_MIXED_PRECISION"] = mixed_precision

    def reset() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    reset()
    with mock.patch.dict(os.environ, environment), pretend() if sharded else nullcontext():
        try:
            yield
        finally:
            reset()


def mixed_precision(cell: Cell) -> str:
    """What Accelerate calls it."""
    return {"bf16_autocast": "bf16", "fp16_autocast": "fp16"}.get(cell.precision, "no")


def accumulation(engine: str) -> GradientAccumulationPlugin:
    """DDP with a static graph reduces at every micro-batch: `no_sync` in its first step ends in an error of torch."""
    return GradientAccumulationPlugin(num_steps=PER_RANK, sync_each_batch=engine == "ddp_static")


def check_autocast(accelerator: Accelerator) -> None:
    """Fail where Accelerate trains in another precision than it was asked for, as with fp16 on a CPU."""
    if accelerator.mixed_precision != "no" and not accelerator.native_amp:
        raise CannotRunError(f"Accelerate has no {accelerator.mixed_precision} here and would train in float32")


def accelerate_loop(model: nn.Module, cell: Cell) -> None:
    """The loop of Accelerate's documentation."""
    with accelerate_state(cell.engine, mixed_precision(cell)):
        accelerator = Accelerator(
            gradient_accumulation_plugin=accumulation(cell.engine),
            kwargs_handlers=[DistributedDataParallelKwargs(**DDP_OPTIONS.get(cell.engine, {}))],
        )
        check_autocast(accelerator)
        optimizer = torch.optim.AdamW(model.parameters(), **OPTIMIZER)
        model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(rows(), SIZE))
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()


class InOrder(Trainer):
    """A Trainer that takes the examples as they come, and passes DDP what its arguments cannot say."""

    ddp_options: dict[str, Any]

    def _get_train_sampler(self, *args: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def _wrap_model(self, *args: Any, **kwargs: Any) -> nn.Module:
        wrapped = super()._wrap_model(*args, **kwargs)
        self.accelerator.ddp_handler = DistributedDataParallelKwargs(**self.ddp_options)
        return wrapped


def trainer_loop(model: nn.Module, cell: Cell) -> None:
    """transformers.Trainer."""
    with accelerate_state(cell.engine, mixed_precision(cell)), TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            use_cpu=cell.engine != "fsdp2",
            per_device_train_batch_size=SIZE,
            gradient_accumulation_steps=PER_RANK,
            num_train_epochs=1,
            learning_rate=OPTIMIZER["lr"],
            weight_decay=OPTIMIZER["weight_decay"],
            lr_scheduler_type="constant",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
        )
        trainer = InOrder(model=model, args=arguments, train_dataset=rows())
        check_autocast(trainer.accelerator)
        trainer.ddp_options = DDP_OPTIONS.get(cell.engine, {})
        if cell.engine == "ddp_static":  # as with `accumulation`, which the Trainer does not look at
            trainer.accelerator.no_sync = lambda model=None: nullcontext()
        trainer.train()
