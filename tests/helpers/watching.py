"""Watching what a step did to the weights: masks are judged by what moved, not by what is reported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rose_peft import RoseSelector
from tests.helpers.tiny import batch

Weights = dict[str, list[Tensor]]


def unit_weights(selector: RoseSelector) -> Weights:
    """Copies of what trains in each unit now, by name."""
    return {unit.name: [param.detach().clone() for param in unit.parameters()] for unit in selector.units}


def assert_masks_acted(selector: RoseSelector, before: Weights) -> dict[str, float]:
    """Check one step against the masks that the selector reports for it.

    Args:
        selector: Which has just taken a step.
        before: `unit_weights` before the step.

    Returns:
        The masks by name of the unit, not all of which are 1 or 0.
    """
    masks = dict(zip((unit.name for unit in selector.units), selector.state.last_mask.tolist(), strict=True))
    for unit in selector.units:
        same = [torch.equal(now, then) for now, then in zip(unit.parameters(), before[unit.name], strict=True)]
        if masks[unit.name] == 0:
            assert all(same), f"{unit.name} has mask 0 and moved"
        else:
            assert not all(same), f"{unit.name} has mask {masks[unit.name]} and did not move"
    assert min(masks.values()) < 1 and max(masks.values()) > 0, f"nothing was masked, or all: {masks}"
    return masks


def watched_step(
    selector: RoseSelector, step: Callable[[], Any], optimizer: torch.optim.Optimizer
) -> dict[str, float]:
    """Take one step, check that its masks acted and that it was counted once; returns the masks by unit."""
    before, steps = unit_weights(selector), selector.statistics().steps
    step()
    assert selector.statistics().steps == steps + 1
    masks = assert_masks_acted(selector, before)
    optimizer.zero_grad()
    return masks


def backward(model: nn.Module, seed: int) -> None:
    """Forward and backward pass over the batch of that number, with dropout of that number."""
    torch.manual_seed(1000 + seed)
    model(**batch(model, seed=seed)).loss.backward()


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    """One ordinary step over the batch of that number."""
    backward(model, seed)
    optimizer.step()
    optimizer.zero_grad()
