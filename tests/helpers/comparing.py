"""Everything of a training that must be the same after another way of running it."""

from __future__ import annotations

import torch
from torch import Tensor


def everything(model, selector, optimizer) -> tuple[dict, dict, dict]:
    state = {key: value for key, value in selector.state.values.items() if isinstance(value, Tensor)}
    return model.state_dict(), state, optimizer.state_dict()["state"]


def assert_same(one, other) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def worst(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
    """Largest difference between two sets of weights.

    Key biases are left out: softmax cancels them, so their gradient is rounding noise, and Adam turns its sign into
    full steps whenever sums are taken in another order.
    """
    return max(float((one[name] - two[name]).abs().max()) for name in one if "key" not in name or "bias" not in name)
