"""Prints the tensors that a step makes at most, in bytes, with and without ROSE: of a BERT with 12 layers.

torchrun --nproc_per_node 2 tests/distributed/memory.py ddp|fsdp2|zero2
"""

from __future__ import annotations

import sys
from datetime import timedelta

import torch.distributed as dist
from peft import get_peft_model
from torch import nn
from torch.profiler import ProfilerActivity, profile

from rose_peft import ROSEConfig, detach_rose
from tests.distributed.faults import under
from tests.distributed.worker import RANK
from tests.helpers.tiny import batch, tiny_bert

SIZES = {"num_hidden_layers": 12, "hidden_size": 256, "intermediate_size": 1024, "vocab_size": 1000}
WAYS = ("without ROSE", "second_order/paired", "ensemble/sampled", "ensemble/paired")


def build(way: str) -> nn.Module:
    """About ten million weights, most of them in blocks."""
    strategy, _, risk_pass = way.partition("/")
    fields = {"strategy": strategy, "risk_pass": risk_pass, "risk_interval": 1} if risk_pass else {}
    base = tiny_bert(num_attention_heads=4, max_position_embeddings=64, attn_implementation="sdpa", **SIZES)
    model = get_peft_model(base, ROSEConfig(task_type="SEQ_CLS", **fields))
    if not risk_pass:
        detach_rose(model)
    return model


def peak(way: str, engine: str) -> tuple[int, int]:
    """Bytes that live at most during a third step beyond those before it, and weights that train."""
    model = build(way)
    weights = sum(param.numel() for param in model.parameters() if param.requires_grad)
    network, backward, step = under(engine, model, accumulation=1)
    inputs = batch(model, size=8, length=64)

    def once() -> None:
        backward(network(**inputs).loss)
        step()

    once()
    once()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        once()
    now = most = 0
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most, weights


def main() -> None:
    """One line for each way."""
    engine = sys.argv[1]
    if engine.startswith("zero"):
        import deepspeed

        deepspeed.init_distributed("gloo", timeout=timedelta(seconds=120))
    else:
        dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    for way in WAYS:
        most, weights = peak(way, engine)
        if RANK == 0:
            print(f"{engine} {way}: {most / 2**20:.1f} MiB for {weights / 1e6:.1f} million weights", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
