"""The ways to train that are compared by their cost, and the memory that each of them takes."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from rose_peft import ROSEConfig, attach_rose
from rose_peft.config import RISK_INTERVAL

from .timing import Step

_SAMPLED: dict[str, Any] = {"risk_pass": "sampled"}
_PAIRED: dict[str, Any] = {"risk_pass": "paired"}
PLAIN = "plain"
# The settings of ROSE in each way; None is training without it.
FULL: dict[str, dict[str, Any] | None] = {
    PLAIN: None,
    "second order": {"strategy": "second_order"},
    "first order, sampled": {"strategy": "first_order", **_SAMPLED},
    "first order, sampled, gradients skipped": {
        "strategy": "first_order",
        **_SAMPLED,
        "skip_frozen_gradients": True,
    },
    "ensemble, sampled": _SAMPLED,
    "first order, paired": {"strategy": "first_order", **_PAIRED},
    "ensemble, paired": _PAIRED,
}
LORA: dict[str, dict[str, Any] | None] = {"LoRA": None, "LoRA + ensemble, sampled": _SAMPLED}
WAYS = (*FULL, *LORA)
# What a model of every way has done when its memory is read: a sampled pass has come beside the optimizer's state.
MEMORY_STEPS = RISK_INTERVAL + 2


def build(way: str, name: str) -> nn.Module:
    """Build the model for one way of training; without an adapter ROSE trains it in place, as plain training does.

    Args:
        way: One of `WAYS`.
        name: Hub name or folder of an encoder.
    """
    model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=2)
    if way in FULL:
        settings = FULL[way]
        if settings is not None:
            attach_rose(model, ROSEConfig(task_type="SEQ_CLS", **settings))
        return model
    lora = LoraConfig(task_type="SEQ_CLS", r=8, target_modules="all-linear")
    settings = LORA[way]
    return get_peft_model(
        model, lora if settings is None else ROSEConfig(task_type="SEQ_CLS", base_config=lora, **settings)
    )


def random_batch(rows: int, length: int, vocabulary: int, draws: torch.Generator) -> dict[str, Tensor]:
    """Draw token ids without padding, and labels.

    Args:
        rows: Examples.
        length: Tokens of each.
        vocabulary: Number of tokens; the first eighth, where special ones are, is left out.
        draws: Generator of the CPU.
    """
    ids = torch.randint(vocabulary // 8, vocabulary, (rows, length), generator=draws)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 2}


def stepper(way: str, name: str, device: str, rows: int, length: int, seed: int, fused: bool) -> Step:
    """Make a function that takes one step of a way; with one seed all ways get the same batches.

    Args:
        way: One of `WAYS`.
        name: Hub name or folder of an encoder.
        device: Where to train.
        rows: Examples of a batch.
        length: Tokens of each.
        seed: Of head, batches and dropout.
        fused: Whether AdamW goes through memory once in a step, in place of once for each operation.
    """
    torch.manual_seed(seed)
    model = build(way, name).to(device).train()
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(trained, 2e-5, (0.9, 0.98), 1e-6, weight_decay=0.01, fused=fused or None)
    draws, vocabulary = torch.Generator().manual_seed(seed), model.config.vocab_size

    def step() -> None:
        batch = random_batch(rows, length, vocabulary, draws)
        model(**{key: value.to(device) for key, value in batch.items()}).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def peak_memory(way: str, name: str, device: str, rows: int, length: int) -> int:
    """Most bytes that training takes, in a process of its own.

    On CUDA it is what torch's allocator gave out at most. On the CPU it is the most memory that the process had in use
    after the model was loaded (VmHWM of Linux), less what it had before.

    Args:
        way: One of `WAYS`.
        name: Hub name or folder of an encoder.
        device: Where to train.
        rows: Examples of a batch.
        length: Tokens of each.

    Raises:
        OSError: If the system does not tell (other systems than Linux, on the CPU).
    """
    # Spawned: a forked process would begin with everything that this one holds.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_train_and_look, way, name, device, rows, length, torch.get_num_threads()).result()


def _train_and_look(way: str, name: str, device: str, rows: int, length: int, threads: int) -> int:
    torch.set_num_threads(threads)
    on_cpu = torch.device(device).type == "cpu"
    before = _status("VmRSS") if on_cpu else 0
    step = stepper(way, name, device, rows, length, seed=0, fused=False)
    if on_cpu:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
    else:
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(MEMORY_STEPS):
        step()
    return _status("VmHWM") - before if on_cpu else torch.cuda.max_memory_allocated(device)


def _status(key: str) -> int:
    """A figure in bytes of what Linux says about this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))
