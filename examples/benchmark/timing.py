"""Timing steps in turn, so that a machine that gets slower hits all alike, and what one costs beside another."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack

import torch
from transformers.utils import logging

from rose_peft.config import RISK_INTERVAL
from rose_peft.robustness import Estimate
from rose_peft.robustness.estimate import paired_difference

# Steps that are added up before they are compared: a risk pass comes at some of them, and a median would hide it.
CYCLE = RISK_INTERVAL
WARM_UP = RISK_INTERVAL
Step = Callable[[], None]


def clock() -> float:
    """Seconds: processor time where one thread computes, of which a crowded machine takes less than of wall time."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def time_in_turn(ways: Mapping[str, Callable[[], Step]], rounds: int) -> dict[str, list[float]]:
    """Take steps of all ways in turn, each way in a process of its own, as users train.

    In one process they would share the heap, and what one leaves there makes the allocations of the next cheaper or
    dearer; seen: by up to a tenth of a step.

    Args:
        ways: Name of each -> a function that can be pickled; its process calls it once, for a function that takes one
            step.
        rounds: Rounds that count; `WARM_UP` more go before them.

    Returns:
        Seconds of each way's step in each round.
    """
    # Spawned: a forked process would begin with everything that this one holds.
    spawn = multiprocessing.get_context("spawn")
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    with ExitStack() as stack:
        pools = {way: stack.enter_context(ProcessPoolExecutor(1, spawn)) for way in ways}
        for way, make in ways.items():
            pools[way].submit(_begin, make, torch.get_num_threads(), torch.get_float32_matmul_precision()).result()
        for round_ in range(-WARM_UP, rounds):
            for way, pool in pools.items():
                found = pool.submit(_take).result()
                if round_ >= 0:
                    seconds[way].append(found)
    return seconds


# What a process that `time_in_turn` has started steps.
_steps: list[Step] = []


def _begin(make: Callable[[], Step], threads: int, precision: str) -> None:
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)
    logging.set_verbosity_error()
    _steps.append(make())


def _take() -> float:
    start = clock()
    _steps[-1]()
    return clock() - start


def relative_cost(seconds: Sequence[float], baseline: Sequence[float]) -> Estimate:
    """Mean time over the baseline's mean time of the same rounds, with the 95 % interval of Student's t over cycles.

    Args:
        seconds: Of a step of the way in each round.
        baseline: Of a step of the baseline in each round.
    """
    ends = range(CYCLE, len(seconds) + 1, CYCLE)
    cycles = [sum(seconds[end - CYCLE : end]) / sum(baseline[end - CYCLE : end]) for end in ends]
    value = sum(seconds) / sum(baseline)
    if len(cycles) < 2:
        return Estimate(value, len(seconds))
    spread = paired_difference(cycles, [0.0] * len(cycles))
    assert spread.value is not None and spread.high is not None
    half = spread.high - spread.value
    return Estimate(value, len(seconds), value - half, value + half)
