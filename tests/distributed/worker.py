"""One process of a distributed test: trains a tiny model on fixed data and writes what it saw.

    torchrun --nproc_per_node 2 tests/distributed/worker.py ENGINE STRATEGY OUTPUT [--option ...]

Micro-batch k of a step goes to rank k modulo the number of ranks; its data and its dropout depend on step and k only.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from peft import get_peft_model
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from rose_peft import ROSEConfig, detach_rose, get_selector, sampled
from tests.helpers.tiny import tiny_bert

WORLD = int(os.environ.get("WORLD_SIZE", 1))
RANK = int(os.environ.get("RANK", 0))
DDP_OPTIONS = {"ddp": {}, "ddp_unused": {"find_unused_parameters": True}, "ddp_static": {"static_graph": True}}


def draw_as_where_calls_gather() -> None:
    """Make two small calls here too, as under FSDP2 and ZeRO-3: one call for both draws other numbers."""
    sampled._rows_are_apart = lambda *_: False


def build(strategy: str, risk_pass: str = "paired", **fields: float) -> nn.Module:
    """The same tiny model on every rank; sampled passes come at every second step, so that a few steps show both."""
    if risk_pass == "sampled":
        fields = {"risk_interval": 2, "risk_fraction": 0.5, **fields}
    model = tiny_bert(num_labels=3, hidden_size=32, intermediate_size=64, vocab_size=50, attn_implementation="sdpa")
    return get_peft_model(model, ROSEConfig(task_type="SEQ_CLS", strategy=strategy, risk_pass=risk_pass, **fields))


def wrap(model: nn.Module, engine: str) -> nn.Module:
    """Put the model under an engine."""
    if engine == "fsdp2":
        for block in model.get_base_model().bert.encoder.layer:
            fully_shard(block)
        return fully_shard(model)
    return DistributedDataParallel(model, **DDP_OPTIONS[engine]) if engine in DDP_OPTIONS else model


def micro_batch(step: int, index: int, size: int) -> dict[str, torch.Tensor]:
    """Data of one micro-batch."""
    generator = torch.Generator().manual_seed(1000 * step + index)
    ids = torch.randint(1, 50, (size, 10), generator=generator)
    labels = torch.randint(0, 3, (size,), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def whole(tensors: Iterable[tuple[str, torch.Tensor | None]]) -> dict[str, torch.Tensor]:
    """Copies of tensors by name, shards put together, without those that are not there."""
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
        for name, tensor in tensors
        if tensor is not None
    }


def main() -> None:
    """Train and write {masks, weights, statistics, gradients, and names of shards after each forward call}."""
    parser = argparse.ArgumentParser()
    parser.add_argument("engine")
    parser.add_argument("strategy")
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--micro_batches", type=int, default=2)
    parser.add_argument("--nan_at", type=int, default=-1, help="step at which the last micro-batch has a NaN loss")
    parser.add_argument("--small_last", action="store_true", help="the last micro-batch of each step has one example")
    parser.add_argument("--empty_last", action="store_true", help="the last micro-batch of each step has no example")
    parser.add_argument(
        "--idle_last", action="store_true", help="the last micro-batch of each step has a loss of zero"
    )
    parser.add_argument("--risk_pass", default="paired")
    parser.add_argument("--two_calls", action="store_true", help="see draw_as_where_calls_gather")
    parser.add_argument("--rose", default="on", choices=["on", "open", "off"], help="open: nothing is ever frozen")
    parser.add_argument("--timeout", type=int, default=60, help="of the process group, in seconds")
    parser.add_argument("--diverge_at", type=int, default=-1, help="step before which rank 1 loses its momentum")
    args = parser.parse_args()
    if WORLD > 1:
        dist.init_process_group("gloo", timeout=timedelta(seconds=args.timeout))
    if args.two_calls:
        draw_as_where_calls_gather()
    model = build(args.strategy, args.risk_pass, **({"upper_quantile": 1.0} if args.rose == "open" else {}))
    selector = get_selector(model)
    if args.rose == "off":
        detach_rose(model)
    network = wrap(model, args.engine)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.01)
    masks, gradients, sharded = [], [], []
    per_rank = args.micro_batches // WORLD
    for step in range(args.steps):
        mine = [k for k in range(args.micro_batches) if k % WORLD == RANK]
        for k in mine:
            last = k == args.micro_batches - 1
            size = 0 if args.empty_last and last else 1 if args.small_last and last else 4
            batch = micro_batch(step, k, size)
            torch.manual_seed(1000 * step + k)
            accumulates = WORLD > 1 and k != mine[-1] and hasattr(network, "no_sync")
            with network.no_sync() if accumulates else nullcontext():
                loss = network(**batch).loss / per_rank
                sharded.append({name for name, param in model.named_parameters() if isinstance(param, DTensor)})
                if args.idle_last and last:
                    loss = loss * 0
                if step == args.nan_at and last:
                    loss = loss * float("nan")
                loss.backward()
        if step == args.diverge_at and RANK == 1:
            for state in optimizer.state.values():
                state["exp_avg"].normal_()
        gradients.append(whole((name, param.grad) for name, param in model.named_parameters()))
        optimizer.step()
        optimizer.zero_grad()
        masks.append(selector.state.last_mask.clone())
        Path(f"{args.output}.{RANK}.began").touch()
    result = {
        "masks": torch.stack(masks),
        "weights": whole((name, param) for name, param in model.named_parameters() if param.requires_grad),
        "statistics": selector.statistics().as_dict(),
        "gradients": gradients,
        "sharded": sharded,
    }
    torch.save(result, f"{args.output}.{RANK}")
    if WORLD > 1:
        dist.barrier()  # a rank that leaves early can keep gloo from shutting down in the other
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
