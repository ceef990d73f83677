"""Optimizers as users write them, that do more in a step than one update."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class Muon(torch.optim.Optimizer):
    """
    Momentum for the matrices, and an AdamW of its own for the rest.

    Args:
        matrices: What it moves itself.
        rest: What the inner optimizer moves.
        inner: "before": the inner optimizer steps before the own update; "after"; "" for no inner step.
    """

    def __init__(self, matrices: Iterable[Tensor], rest: Iterable[Tensor], inner: str) -> None:
        super().__init__([{"params": list(matrices)}], {"lr": 1e-2, "momentum": 0.9})
        self.inner = torch.optim.AdamW(list(rest), lr=1e-2, weight_decay=0.1)
        self.when = inner

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self.inner.zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        if self.when == "before":
            self.inner.step()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                momentum = state.setdefault("momentum_buffer", torch.zeros_like(param))
                momentum.lerp_(param.grad, 1 - group["momentum"])
                param.add_(momentum / (momentum.norm() + 1e-12), alpha=-group["lr"])
        if self.when == "after":
            self.inner.step()


class Lookahead(torch.optim.Optimizer):
    """
    Steps another optimizer, and at every second step goes back half of the way.

    Args:
        inner: Optimizer of the same parameters.
    """

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner
        super().__init__([{"params": group["params"]} for group in inner.param_groups], {"lr": 0.5})
        self._slow = [param.detach().clone() for group in self.param_groups for param in group["params"]]
        self._count = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.inner.step()
        self._count += 1
        if self._count % 2 == 0:
            fast = [param for group in self.param_groups for param in group["params"]]
            for slow, param in zip(self._slow, fast, strict=True):
                slow.lerp_(param, 0.5)
                param.copy_(slow)


class Announced(torch.optim.Optimizer):
    """
    Plain gradient descent that calls back in the middle of its step.

    Args:
        params: Parameters.
        during: Called before and after the weights move.
    """

    def __init__(self, params: Iterable[Tensor], during: Callable[[], Any]) -> None:
        super().__init__(list(params), {"lr": 1e-2})
        self.during = during

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.during()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.add_(param.grad, alpha=-group["lr"])
        self.during()


class Derived(torch.optim.AdamW):
    """Whose step is that of its parent class, called as any derived class does: torch runs the hooks of both."""

    def step(self, closure: Any = None) -> None:
        super().step(closure)
