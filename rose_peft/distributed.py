"""Which processes train a model together, and sums over them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import RankMismatchError

CHECK_RANKS = "ROSE_CHECK_RANKS"


class Processes:
    """
    The processes that train one model together: those of the engine around it, or those that the user names.

    Models in one process group that no engine ties together (one model per process) are independent.

    Args:
        given: The user's process group, or None to go by the engine.
    """

    def __init__(self, given: dist.ProcessGroup | None = None) -> None:
        self._given = given
        self._found: list[dist.ProcessGroup] = []
        self._warned = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_found": []}

    def follow(self, groups: list[dist.ProcessGroup]) -> None:
        """Go by the engine.

        Args:
            groups: Its process groups.
        """
        self._found = groups

    def warn_if_alone(self) -> None:
        """Say once that processes which no engine ties together are taken for independent ones."""
        alone = self._given is None and not self._found and _is_initialized() and dist.get_world_size() > 1
        if alone and not self._warned:
            self._warned = True
            warnings.warn(
                f"this process is one of {dist.get_world_size()}, and neither DDP, FSDP2 nor ZeRO is around the "
                "model: ROSE takes it for one that this process trains alone. If they train it together by other "
                "means, pass process_group=torch.distributed.group.WORLD to attach_rose.",
                stacklevel=2,
            )

    @property
    def groups(self) -> list[dist.ProcessGroup]:
        """The process groups over which sums run, one after the other; none for a single process."""
        groups = [self._given] if self._given is not None else self._found
        return [group for group in groups if dist.get_world_size(group) > 1]

    def sum(self, values: Tensor) -> Tensor:
        """Add a small vector over all processes, so that K processes and K micro-batches give the same scores.

        Args:
            values: float64 [any] on the device of the parameters; one all-reduce of 8 bytes per entry and group.

        Returns:
            The sum, equal to the last bit on all processes.
        """
        for group in self.groups:
            dist.all_reduce(values, op=dist.ReduceOp.SUM, group=group)
        return values

    def check_equal(self, names: Sequence[str], masks: Tensor, device: torch.device) -> None:
        """Compare the masks of all processes where the environment variable ROSE_CHECK_RANKS is 1.

        Args:
            names: Unit names, U of them.
            masks: float32 [U].
            device: Device for the collective.

        Raises:
            RankMismatchError: On every process, naming the first unit that differs.
        """
        if os.environ.get(CHECK_RANKS, "0") in ("", "0"):
            return
        for group in self.groups:
            mine = masks.to(device)
            gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
            dist.all_gather(gathered, mine, group=group)
            for rank, theirs in enumerate(gathered):
                different = (theirs != gathered[0]).nonzero().flatten().tolist()
                if different:
                    raise RankMismatchError(
                        f"mask of unit {names[different[0]]!r} is {float(gathered[0][different[0]])} on rank 0 and "
                        f"{float(theirs[different[0]])} on rank {rank} ({len(different)} units differ). The replicas "
                        "have diverged: check that all ranks load the same weights and that gradients are "
                        "synchronised."
                    )


def _is_initialized() -> bool:
    return dist.is_available() and dist.is_initialized()
