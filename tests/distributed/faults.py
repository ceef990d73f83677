"""One process of runs in which something goes wrong on the last rank at one step; writes how far each came, and why.

torchrun --nproc_per_node 2 tests/distributed/faults.py ENGINE OUTPUT STRATEGY/RISK_PASS/FAULT ... [--timeout SECONDS]
"""

from __future__ import annotations

import argparse
import os
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import get_peft_model
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from transformers.modeling_outputs import SequenceClassifierOutput

from rose_peft import ROSEConfig, get_selector
from tests.distributed.worker import DDP_OPTIONS, RANK, WORLD, micro_batch, whole, wrap
from tests.helpers.tiny import tiny_bert

STEPS, MICRO_BATCHES, SIZE = 4, 2, 4
# What the last rank does at one step, where all others make two model calls with four examples each.
CALLS = {"one call": 1, "one call, reduced once": 1, "one call more": MICRO_BATCHES + 1, "no call": 0}
FAULTS = ("none", "nan loss", "nan logits", "empty", *CALLS)


class Means(nn.Module):
    """A classifier that takes batches of no examples, unlike those of transformers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, 16)
        self.layer = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Dropout(0.1)) for _ in range(4))
        self.head = nn.Linear(16, 3)

    def forward(self, input_ids: Tensor, labels: Tensor, **rest: Any) -> SequenceClassifierOutput:
        hidden = self.embed(input_ids).mean(1)
        for layer in self.layer:
            hidden = layer(hidden)
        logits = self.head(hidden)
        loss = nn.functional.cross_entropy(logits, labels, reduction="sum") / SIZE
        return SequenceClassifierOutput(loss=loss, logits=logits)


def build(strategy: str, risk_pass: str, means: bool) -> nn.Module:
    """The same model on every rank."""
    often = {"risk_interval": 2, "risk_fraction": 0.5} if risk_pass == "sampled" else {}
    settings: dict[str, Any] = {"strategy": strategy, "risk_pass": risk_pass, **often}
    if means:
        return get_peft_model(Means(), ROSEConfig(target_modules=["0"], **settings))
    base = tiny_bert(num_labels=3, vocab_size=50, hidden_size=32)
    return get_peft_model(base, ROSEConfig(task_type="SEQ_CLS", **settings))


def under(
    engine: str, model: nn.Module, accumulation: int = MICRO_BATCHES
) -> tuple[nn.Module, Callable[[Tensor], None], Callable[[], None]]:
    """The model under an engine, its backward pass, and its optimizer step."""
    if engine.startswith("zero"):
        import deepspeed

        config = {
            "train_micro_batch_size_per_gpu": SIZE,
            "gradient_accumulation_steps": accumulation,
            "zero_optimization": {"stage": int(engine[-1]), "stage3_param_persistence_threshold": 0},
            "steps_per_print": 10**9,
        }
        trained = [param for param in model.parameters() if param.requires_grad]
        network, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(trained, lr=1e-2), config=config)
        return network, network.backward, network.step
    if engine == "fsdp2" and isinstance(model.get_base_model(), Means):
        for block in model.get_base_model().layer:
            fully_shard(block)
        network = fully_shard(model)
    else:
        network = wrap(model, engine)
    optimizer = torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], lr=1e-2)

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return network, lambda loss: (loss / accumulation).backward(), step


def train(engine: str, cell: str, at: int, result: dict[str, Any]) -> None:
    """Take the steps."""
    strategy, risk_pass, fault = cell.split("/")
    model = build(strategy, risk_pass, fault == "empty")
    selector = get_selector(model)
    network, backward, step = under(engine, model)
    poisoned = False
    head = next(module for name, module in model.named_modules() if name.endswith(("classifier", "head")))
    head.register_forward_hook(lambda module, args, logits: logits * float("nan") if poisoned else None)
    zero = engine.startswith("zero")
    for number in range(STEPS):
        now = fault if number == at and RANK == WORLD - 1 else "none"
        calls = CALLS.get(now, MICRO_BATCHES)
        for call in range(calls):
            first = now if call == 0 else "none"
            batch = micro_batch(number, MICRO_BATCHES * call + RANK, 0 if first == "empty" else SIZE)
            torch.manual_seed(1000 * number + 10 * call + RANK)
            poisoned = first == "nan logits"
            waits = engine in DDP_OPTIONS and fault.endswith("reduced once") and call < calls - 1
            with network.no_sync() if waits else nullcontext():
                loss = network(**batch).loss
                backward(loss * float("nan") if first == "nan loss" else loss)
            if zero:  # counts the calls itself
                step()
        if not zero:
            step()
        if int(selector.state.steps) > len(result["masks"]):
            result["masks"].append(selector.state.last_mask.clone())
            result["skipped"].append(int(selector.state.skipped))
    result["weights"] = whole((name, param) for name, param in model.named_parameters() if param.requires_grad)


def main() -> None:
    """Train, and write what came of it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("engine")
    parser.add_argument("output", type=Path)
    parser.add_argument("cells", nargs="+")
    parser.add_argument("--timeout", type=float, default=60)
    parser.add_argument("--at", type=int, default=2)
    args = parser.parse_args()
    timeout = timedelta(seconds=args.timeout)
    if args.engine.startswith("zero"):
        import deepspeed

        deepspeed.init_distributed("gloo", timeout=timeout)
    else:
        dist.init_process_group("gloo", timeout=timeout)
    results = {}
    for cell in args.cells:
        result: dict[str, Any] = {"error": "", "message": "", "masks": [], "skipped": []}
        try:
            train(args.engine, cell, args.at, result)
        except Exception as error:
            result |= {"error": type(error).__name__, "message": str(error)}
            traceback.print_exc()
        results[cell] = result
        if result["error"]:
            break
    torch.save(results, f"{args.output}.{RANK}")
    if not result["error"]:
        dist.barrier()  # a rank that leaves early can keep gloo from shutting down in the other
    os._exit(bool(result["error"]))  # the group may be broken


if __name__ == "__main__":
    main()
