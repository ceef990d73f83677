"""Where a process stands in the training, and what is to be said where the processes of one run stand apart."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import RankMismatchError

# Numbers in a mark. Digests of 20 bits keep the sums of their squares exact in float64 for up to 8192 processes.
MARK = 3
_DIGEST = 2**20 - 1
_WAY_OUT = (
    "All ranks must take the same steps and call the model equally often in each: one without examples takes any, "
    "with a loss times zero."
)


@dataclass(frozen=True)
class Standing:
    """Where this process stands.

    Args:
        steps: Optimizer steps that it has begun, those without a gradient included.
        calls: Model calls since the last of them.
        units: Unit names, U of them.
        masks: Those of the last step, float32 [U].
    """

    steps: int
    calls: int
    units: Sequence[str]
    masks: Tensor

    def mark(self) -> list[float]:
        """One, a digest of steps and masks, and its square: their sums over processes tell whether all are equal.

        Calls are left out: with gradients that are reduced at the last micro-batch, ranks may differ in them.
        """
        digest = zlib.crc32(self.masks.numpy().tobytes(), self.steps) & _DIGEST
        return [1.0, float(digest), float(digest**2)]

    def values(self, device: torch.device) -> Tensor:
        """All of it in one vector, float64 [2 + U].

        Args:
            device: Where it is wanted.
        """
        return torch.cat(
            [torch.tensor([self.steps, self.calls], dtype=torch.float64, device="cpu"), self.masks.double()]
        ).to(device)


def all_equal(marks: Sequence[float], processes: int) -> bool:
    """Whether as many processes as there are have added marks, and equal ones.

    Args:
        marks: Sums of `Standing.mark`.
        processes: Their number.
    """
    came, total, squares = (int(value) for value in marks)
    return came == processes and processes * squares == total**2


def apart(ranks: Sequence[int], standings: Sequence[Tensor], units: Sequence[str]) -> RankMismatchError | None:
    """The error that says which rank stands elsewhere than the first one, or None where none does.

    Args:
        ranks: Their numbers.
        standings: What each has as `Standing.values`, on the CPU.
        units: Unit names.
    """
    steps = [int(values[0]) for values in standings]
    for rank, step in zip(ranks, steps, strict=True):
        if step != steps[0]:
            each = ", ".join(
                f"rank {one} begins its optimizer step {int(values[0])} after {int(values[1])} model calls"
                for one, values in zip(ranks, standings, strict=True)
            )
            return RankMismatchError(
                f"rank {rank} has taken another number of steps than rank {ranks[0]}: {each}. {_WAY_OUT}"
            )
    return different_masks(units, ranks, [values[2:] for values in standings])


def different_masks(units: Sequence[str], ranks: Sequence[int], masks: Sequence[Tensor]) -> RankMismatchError | None:
    """The error that names the first unit whose masks differ, or None where none do.

    Args:
        units: Unit names, U of them.
        ranks: Their numbers.
        masks: What each has, [U].
    """
    for rank, theirs in zip(ranks, masks, strict=True):
        different = (theirs != masks[0]).nonzero().flatten().tolist()
        if different:
            index = different[0]
            return RankMismatchError(
                f"mask of unit {units[index]!r} is {float(masks[0][index])} on rank {ranks[0]} and "
                f"{float(theirs[index])} on rank {rank} ({len(different)} units differ). The replicas have diverged: "
                "check that all ranks load the same weights and that gradients are synchronised."
            )
    return None


def not_met(rank: int, standing: Standing, came: Sequence[int], missing: Sequence[int]) -> RankMismatchError:
    """The error that says who did not come to a reduction that failed.

    Args:
        rank: Of this process.
        standing: Where it stands.
        came: The other ranks that have said that they are in it too.
        missing: Those that have not.
    """
    with_others = f", as ranks {_list(came)} do" if came else ""
    calls = f"{standing.calls} model call{'' if standing.calls == 1 else 's'}"
    who = f"rank{'s' if len(missing) != 1 else ''} {_list(missing)}" if missing else "another rank"
    return RankMismatchError(
        f"rank {rank} begins its optimizer step {standing.steps} after {calls}{with_others}, and {who} did not come "
        f"to the reduction that makes the masks: lost, or at another number of model calls. {_WAY_OUT}"
    )


def _list(ranks: Sequence[int]) -> str:
    return ", ".join(str(rank) for rank in ranks)
