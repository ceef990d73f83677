"""Norms of many tensors at once, added up per unit: one kernel, no host synchronisation, shards included."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from .errors import UnsupportedModelError

IndexedTensors = Sequence[tuple[int, Tensor]]


def wide_dtype(device: torch.device) -> torch.dtype:
    """The dtype for sums of squares: float64, in which squares of float32 norms are exact; Apple GPUs have none."""
    return torch.float32 if device.type == "mps" else torch.float64


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: its shard, or all of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_sharded(tensors: IndexedTensors) -> bool:
    """Whether norms of these tensors are complete only when they are added up over processes."""
    return any(isinstance(tensor, DTensor) for _, tensor in tensors)


def norms_of(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Frobenius norms, one kernel for all tensors of a dtype and no host synchronisation.

    Args:
        tensors: Any shapes and float dtypes. They may lie on several devices.

    Returns:
        A scalar for each, in float32 or wider.

    Raises:
        UnsupportedModelError: If one is sparse, as the gradients of some embeddings are.
    """
    found = list(tensors)
    sparse = next((tensor for tensor in found if tensor.layout != torch.strided), None)
    if sparse is not None:
        raise UnsupportedModelError(
            f"a gradient of shape {tuple(sparse.shape)} is sparse, and units are ranked by norms that sparse tensors "
            "do not have. Build its embedding with sparse=False, or leave the embedding out of target_modules."
        )
    norms: list[Tensor] = [*found]
    for kind in {tensor.dtype for tensor in found}:
        places = [place for place, tensor in enumerate(found) if tensor.dtype == kind]
        # In float32 by the kernel itself: copies of all gradients of a large model would take twice their memory.
        wide = torch.float32 if kind in (torch.float16, torch.bfloat16) else None
        for place, norm in zip(places, torch._foreach_norm([found[p] for p in places], 2, wide), strict=True):
            norms[place] = norm
    return norms


def squares(norms: Sequence[Tensor]) -> Tensor:
    """Squares of norms, [number of norms] on the first one's device, in its `wide_dtype`.

    Args:
        norms: Scalars as `norms_of` gives them; at least one.
    """
    device = norms[0].device
    if all(norm.device == device for norm in norms):
        return torch.stack(list(norms)).to(wide_dtype(device)).square()
    return torch.stack([norm.to(device, wide_dtype(device)) for norm in norms]).square()


def square_norms_per_unit(tensors: IndexedTensors, units: int, device: torch.device) -> Tensor:
    """Squared norms per unit, see `add_per_unit`.

    Args:
        tensors: (unit index, tensor) each; of a shard the local part counts.
        units: Number of units U.
        device: Where the result is wanted.
    """
    norms = norms_of(local_part(tensor) for _, tensor in tensors)
    return add_per_unit([(index, norm) for (index, _), norm in zip(tensors, norms, strict=True)], units, device)


def add_per_unit(norms: IndexedTensors, units: int, device: torch.device) -> Tensor:
    """Add up squares of norms per unit, in a fixed order: the same to the last bit on every run and process.

    Args:
        norms: (unit index, norm) each.
        units: Number of units U.
        device: Where the result is wanted.

    Returns:
        [U] in the `wide_dtype` of the device, zero for units without norms.
    """
    if not norms:
        return torch.zeros(units, dtype=wide_dtype(device), device=device)
    square = squares([norm for _, norm in norms])
    rows = _rows(tuple(index for index, _ in norms), units, square.device)
    # Gathered and added along rows: unlike index_add, that does not depend on the order of threads.
    return torch.cat([square, square.new_zeros(1)])[rows].sum(dim=1).to(device)


@lru_cache(maxsize=64)
def _rows(indices: tuple[int, ...], units: int, device: torch.device) -> Tensor:
    """For each unit the positions of its tensors, padded with one position past the end."""
    rows: list[list[int]] = [[] for _ in range(units)]
    for position, index in enumerate(indices):
        rows[index].append(position)
    width = max(len(row) for row in rows)
    return torch.tensor([row + [len(indices)] * (width - len(row)) for row in rows], device=device)
