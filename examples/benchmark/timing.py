"""Timing steps in turn, so that a machine that gets slower hits all alike, and what one costs beside another."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import torch

from rose_peft.config import RISK_INTERVAL
from rose_peft.robustness import Estimate
from rose_peft.robustness.estimate import paired_difference

# Steps that are added up before they are compared: a risk pass comes at some of them, and a median would hide it.
CYCLE = RISK_INTERVAL
WARM_UP = RISK_INTERVAL


def clock() -> float:
    """Seconds: processor time where one thread computes, of which a crowded machine takes less than of wall time."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def time_in_turn(
    steps: Mapping[str, Callable[[], None]], rounds: int, before_round: Callable[[], None] = lambda: None
) -> dict[str, list[float]]:
    """Take steps of all ways in turn.

    Args:
        steps: Name of each way -> a function that takes one of its steps.
        rounds: Rounds that count; `WARM_UP` more go before them.
        before_round: Called before each round.

    Returns:
        Seconds of each way's step in each round.
    """
    seconds: dict[str, list[float]] = {way: [] for way in steps}
    for round_ in range(-WARM_UP, rounds):
        before_round()
        for way, step in steps.items():
            start = clock()
            step()
            if round_ >= 0:
                seconds[way].append(clock() - start)
    return seconds


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
