"""What a model was called with: the tensors inside, and a cache as it was before the call."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch import Tensor

CACHES = ("past_key_values", "past_key_value", "cache_params", "mems")


def cache_before(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Copies of the caches that a call will advance, to start another call from the same place.

    Args:
        kwargs: Keyword arguments of the forward call.

    Returns:
        The caches among them by name. Containers are copied; tensors are shared, since caches put longer ones in
        their place instead of writing into them.
    """
    found = {}
    for name in CACHES:
        cache = kwargs.get(name)
        if cache is not None:
            memo: dict[int, Any] = {id(tensor): tensor for tensor in tensors_inside(cache)}
            found[name] = copy.deepcopy(cache, memo)
    return found


def tensors_inside(value: Any, _seen: set[int] | None = None) -> Iterator[Tensor]:
    """Every tensor inside nested lists, tuples, mappings and plain objects.

    Args:
        value: Anything.
    """
    seen = set() if _seen is None else _seen
    if isinstance(value, Tensor):
        yield value
        return
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, dict):
        children: Any = value.values()
    elif isinstance(value, (list, tuple, set)):
        children = value
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        children = vars(value).values()
    else:
        return
    for child in children:
        yield from tensors_inside(child, seen)
