"""Which processes train a model together, and sums over them."""

from __future__ import annotations

import math
import os
import threading
import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import RankMismatchError
from .standing import MARK, Standing, all_equal, apart, different_masks, not_met

CHECK_RANKS = "ROSE_CHECK_RANKS"
# How long a process whose reduction failed waits for others to say that theirs failed too.
GRACE_SECONDS = 3.0


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

    def sum(self, values: Tensor, standing: Standing) -> Tensor:
        """Add a small vector over all processes, so that K processes and K micro-batches give the same scores.

        Args:
            values: float64 [any] on the device of the parameters; one all-reduce of 8 bytes per entry and group.
            standing: Where this process stands; its mark travels in front, for `checked` to look at.

        Returns:
            The sum, equal to the last bit on all processes; [MARK + any], or `values` for a single process.

        Raises:
            RankMismatchError: If the reduction fails because a rank does not come to it. Under NCCL torch's own
                watchdog ends the process instead.
        """
        groups = self.groups
        if not groups:
            return values
        marked = torch.cat([torch.tensor(standing.mark(), dtype=values.dtype, device=values.device), values])
        for group in groups:
            try:
                dist.all_reduce(marked, op=dist.ReduceOp.SUM, group=group)
            except RuntimeError as error:
                raise not_met(dist.get_rank(), standing, *_others(group)) from error
        return marked

    def checked(self, values: Tensor, standing: Standing, device: torch.device) -> Tensor:
        """Take the marks off what `sum` gave, if they say that all processes stand at the same point.

        Args:
            values: float64 [MARK + any] on the CPU; [any] for a single process.
            standing: Where this process stands.
            device: Device for collectives.

        Raises:
            RankMismatchError: On every process, naming the rank that stands elsewhere.
        """
        groups = self.groups
        if not groups:
            return values
        if all_equal(values[:MARK].tolist(), math.prod(dist.get_world_size(group) for group in groups)):
            return values[MARK:]
        found = [error for group in groups if (error := self._apart(group, standing, device)) is not None]
        raise found[0] if found else RankMismatchError("the ranks stand apart, and none of them says how.")

    @staticmethod
    def _apart(group: dist.ProcessGroup, standing: Standing, device: torch.device) -> RankMismatchError | None:
        mine = standing.values(device)
        gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(gathered, mine, group=group)
        ranks = dist.get_process_group_ranks(group)
        return apart(ranks, [values.cpu() for values in gathered], standing.units)

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
            found = different_masks(names, dist.get_process_group_ranks(group), gathered)
            if found is not None:
                raise found


def _others(group: dist.ProcessGroup) -> tuple[list[int], list[int]]:
    """Find out by torch's own store, since the group is broken, who else failed in the same reduction, and who not.

    Args:
        group: The processes.

    Returns:
        Ranks that came to it and ranks that did not, without this one; none of either where the store is lost too.
    """
    others = [rank for rank in dist.get_process_group_ranks(group) if rank != dist.get_rank()]
    came: list[int] = []
    answered = threading.Event()

    def ask() -> None:
        try:
            store = dist.distributed_c10d._get_default_store()
            store.set(f"rose/{dist.get_rank()}", "waited")
            end = time.monotonic() + GRACE_SECONDS
            while len(came) < len(others) and time.monotonic() < end:
                came[:] = [rank for rank in others if store.check([f"rose/{rank}"])]
                time.sleep(0.1)
            answered.set()
        except (RuntimeError, ValueError):  # with the process that had it
            came.clear()

    # A store in a process that hangs does not answer at all.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(2 * GRACE_SECONDS)
    return (came, [rank for rank in others if rank not in came]) if answered.is_set() else ([], [])


def _is_initialized() -> bool:
    return dist.is_available() and dist.is_initialized()
