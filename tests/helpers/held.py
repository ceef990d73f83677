"""Which tensors are alive, to tell whether any are kept that nobody needs."""

from __future__ import annotations

import gc

from torch import Tensor


def held_tensors() -> tuple[int, int]:
    """Number of tensors with a storage of their own, and bytes in it; those that compilers and vmap left have none."""
    count = size = 0
    for item in gc.get_objects():
        if issubclass(type(item), Tensor):
            try:
                size += int(item.untyped_storage().nbytes())
            except (NotImplementedError, RuntimeError, TypeError):
                continue
            count += 1
    return count, size
