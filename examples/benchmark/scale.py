"""What a step of a language model takes: bytes held and bytes sent, per weight, exactly and by the verb.

    python -m examples.benchmark.scale --output runs/plain.json
    torchrun --nproc_per_node 2 -m examples.benchmark.scale --engine fsdp2 --output runs/fsdp2.json
    torchrun --nproc_per_node 2 -m examples.benchmark.scale --engine zero2 --output runs/zero2.json

A causal language model at random weights takes a few steps in each way. torch's profiler tells every allocation, so
the figures are the same on every run; collectives are counted by what they are given. FSDP2 and ZeRO-2 compute in bf16
with weights, momenta and reductions in float32, as most users have them. plan.py reads the figures.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel

from rose_peft import ROSEConfig, attach_rose, get_selector

# Every way to train; a risk pass comes in each of the measured steps.
WAYS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "second order": {"strategy": "second_order"},
    "first order, sampled": {"strategy": "first_order", "risk_pass": "sampled", "risk_interval": 1},
    "first order, paired": {"strategy": "first_order"},
    "ensemble, sampled": {"risk_pass": "sampled", "risk_interval": 1},
    "ensemble, paired": {},
}
STEPS = 3  # second order begins at the second
BUCKET = 10**6  # weights; by default ZeRO reduces 5e8 at once, through a buffer of a gigabyte whatever the model
MARK = "mark:"
COLLECTIVES = {"_allgather_base_": "all-gather", "_reduce_scatter_base_": "reduce-scatter", "allreduce_": "all-reduce"}


@dataclass(frozen=True)
class Figures:
    """One way of training in one process, in bytes; of the last step.

    Args:
        processes: How many train together.
        layers: Number of blocks.
        weights: Number of weights of the model.
        unit_weights: Number of those in units.
        kept: What stays between steps: weights, momenta, and what the engine keeps.
        passes: The most that the forward call takes beside that, risk pass included.
        backward: The most that the backward pass takes beside that.
        step: The most that the optimizer's step takes beside that, gradients included.
        sent: By kind of collective, the size of what is put together, whatever part of it this process has.
        mask: Mean of the masks.
    """

    processes: int
    layers: int
    weights: int
    unit_weights: int
    kept: int
    passes: int
    backward: int
    step: int
    sent: dict[str, int]
    mask: float


def language_model(width: int, layers: int, vocabulary: int) -> GPT2LMHeadModel:
    """A model of GPT-2's kind at random weights.

    Args:
        width: Of the hidden states.
        layers: Number of blocks; one has 12 width^2 weights.
        vocabulary: Number of tokens.
    """
    torch.manual_seed(0)
    sizes = {"n_embd": width, "n_layer": layers, "n_head": max(1, width // 64), "vocab_size": vocabulary}
    sizes |= {"n_positions": 128}  # GPT-2 keeps a mask of positions x positions in every block
    return GPT2LMHeadModel(GPT2Config(**sizes, use_cache=False))


class Traffic(TorchDispatchMode):
    """Adds up what collectives are given while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.split("::")[1]
            tensors = [tensor for arg in args for tensor in _flat(arg)]
            # The whole of an all-gather is its output, of a reduce-scatter its input: the largest of both.
            size = max((tensor.numel() * tensor.element_size() for tensor in tensors), default=0)
            self.sent[COLLECTIVES.get(name, name)] = self.sent.get(COLLECTIVES.get(name, name), 0) + size
        result = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            # gloo's threads let go of the tensors a moment after it; what they free last no profile would show.
            for item in result if isinstance(result, (list, tuple)) else (result,):
                if isinstance(item, torch.ScriptObject):
                    item.wait()
            time.sleep(0.003)
        return result


def _flat(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _flat(item)


def mark(name: str) -> None:
    """Note in the profile that something begins or ends."""
    with record_function(MARK + name):
        pass


@contextmanager
def live_bytes() -> Iterator[list[tuple[str, int]]]:
    """Yields a list that holds, afterwards, the live bytes after every allocation ("") and at every mark, in order."""
    course: list[tuple[str, int]] = []
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield course
    live = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            course.append(("", live))
        elif event.name().startswith(MARK):
            course.append((event.name()[len(MARK) :], live))


def measure(way: str, engine: str, adapter: bool, sizes: tuple[int, int, int], rows: int, length: int) -> Figures:
    """Train for a few steps and read off the last one.

    Args:
        way: One of `WAYS`.
        engine: "plain", "fsdp2" or "zero2"; the latter two in a process group.
        adapter: Whether to train LoRA in place of all weights.
        sizes: Of `language_model`.
        rows: Examples in a batch.
        length: Tokens of each.
    """
    ids = torch.randint(0, sizes[2], (rows, length), generator=torch.Generator().manual_seed(1))
    gc.collect()  # what was measured before must not be freed in the middle
    with live_bytes() as course:
        base = language_model(*sizes)
        settings = WAYS[way]
        if adapter:
            lora = LoraConfig(r=8, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
            model = get_peft_model(
                base, lora if settings is None else ROSEConfig(task_type="CAUSAL_LM", base_config=lora, **settings)
            )
        else:
            model = base
            if settings is not None:
                attach_rose(model, ROSEConfig(task_type="CAUSAL_LM", **settings))
        model.train()
        weights = sum(param.numel() for param in model.parameters())
        selector = get_selector(model) if settings is not None else None
        units = sum(unit.size() for unit in selector.units) if selector is not None else 0
        call, step = ENGINES[engine](model, base)
        traffic = Traffic()
        for number in range(STEPS):
            gc.collect()  # engines leave whole weights behind in cycles
            torch.manual_seed(number)
            traffic.sent.clear()
            with traffic:
                mark("forward")
                loss = call(input_ids=ids, labels=ids).loss
                mark("backward")
                step(loss)
            del loss
        mark("end")
    marks = {name: index for index, (name, _) in enumerate(course) if name}
    kept = course[marks["forward"]][1]

    def most(begin: str, end: str) -> int:
        return max(live for _, live in course[marks[begin] : marks[end] + 1]) - kept

    return Figures(
        processes=dist.get_world_size() if dist.is_initialized() else 1,
        layers=sizes[1],
        weights=weights,
        unit_weights=units,
        kept=kept,
        passes=most("forward", "backward"),
        backward=most("backward", "step"),
        step=most("step", "end"),
        sent=dict(traffic.sent),
        mask=float(selector.state.last_mask.mean()) if selector is not None else 1.0,
    )


Call = Callable[..., Any]
Step = Callable[[torch.Tensor], None]


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [param for param in model.parameters() if param.requires_grad]


def _plain(model: nn.Module, base: nn.Module) -> tuple[Call, Step]:
    optimizer = torch.optim.AdamW(_trained(model), lr=1e-4)

    def step(loss: torch.Tensor) -> None:
        loss.backward()
        mark("step")
        optimizer.step()
        optimizer.zero_grad()

    return model, step


def _fsdp2(model: nn.Module, base: nn.Module) -> tuple[Call, Step]:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for module in (*base.transformer.h, model):
        fully_shard(module, mp_policy=policy)
    return _plain(model, base)


def _zero2(model: nn.Module, base: nn.Module) -> tuple[Call, Step]:
    import deepspeed

    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 2, "reduce_bucket_size": BUCKET},
        "bf16": {"enabled": True},
        "steps_per_print": 10**9,
    }
    optimizer = torch.optim.AdamW(_trained(model), lr=1e-4)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)

    def step(loss: torch.Tensor) -> None:
        engine.backward(loss)
        mark("step")
        engine.step()

    return engine, step


ENGINES: dict[str, Callable[[nn.Module, nn.Module], tuple[Call, Step]]] = {
    "plain": _plain,
    "fsdp2": _fsdp2,
    "zero2": _zero2,
}


def main(argv: list[str] | None = None) -> None:
    """Measure all ways under one engine, and write {way: figures} from the first process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="plain", choices=list(ENGINES))
    parser.add_argument("--adapter", action="store_true", help="train LoRA in place of all weights")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocabulary", type=int, default=20000)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=8, help="tokens of a row")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(argv)
    if args.engine != "plain" and not dist.is_initialized():
        dist.init_process_group("gloo")
    found = {}
    for way in args.ways:
        sizes = args.width, args.layers, args.vocabulary
        found[way] = asdict(measure(way, args.engine, args.adapter, sizes, args.rows, args.length))
        if int(os.environ.get("RANK", 0)) == 0:
            per = {name: found[way][name] for name in ("kept", "passes", "backward", "step")} | found[way]["sent"]
            print(way, {name: round(value / found[way]["weights"], 3) for name, value in per.items()}, flush=True)
    if int(os.environ.get("RANK", 0)) == 0:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(found, indent=1), encoding="utf-8")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
