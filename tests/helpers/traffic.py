"""What ROSE itself sends between processes, beside an engine's own traffic."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import Tensor

from rose_peft import distributed

MARK, RISK_COUNTS = 3, 6  # numbers that say where a process stands, and what became of the risk passes


class Counted:
    """torch.distributed as ROSE sees it; notes the bytes of each reduction."""

    def __init__(self) -> None:
        self.bytes: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(dist, name)

    def all_reduce(self, tensor: Tensor, **options: Any) -> Any:
        """As torch's."""
        self.bytes.append(tensor.numel() * tensor.element_size())
        return dist.all_reduce(tensor, **options)

    def in_place(self) -> mock._patch:
        """A context in which ROSE reduces through this."""
        return mock.patch.object(distributed, "dist", self)


def expected_bytes(strategy: str, units: int, sharded: bool, vectors: int) -> int:
    """Of a step with a risk pass: one float64 per unit for the risk, and for gradients and momenta where sharded.

    Args:
        strategy: ROSE's.
        units: Number of units.
        sharded: Whether each process has a part of each unit.
        vectors: Number of weights of units that are vectors, whose gradients of sampled passes are sent.
    """
    risk = units + vectors + RISK_COUNTS if strategy != "second_order" else 0
    norms = 2 * units if sharded and strategy != "first_order" else 0
    return 8 * (MARK + risk + norms)
