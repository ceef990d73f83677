"""What a model was called with: the tensors inside, some of its rows, and a cache as it was before the call."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
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


# What tells the number of rows, the most telling first.
_ROWS_OF = (
    "input_ids",
    "inputs_embeds",
    "pixel_values",
    "input_values",
    "input_features",
    "decoder_input_ids",
    "labels",
)
# Arguments that have no row for each example and go with any number of them.
_FOR_ALL = ("cache_position", "num_items_in_batch")


@dataclass(frozen=True)
class Rows:
    """Some rows of a batch, spread over it.

    Args:
        args: Positional arguments of the forward call, those rows of them.
        kwargs: Keyword arguments, those rows of them.
        index: Which rows, int64 [k]; None for the whole batch, whose rows cannot be taken apart.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    index: Tensor | None

    def of(self, logits: Tensor) -> Tensor:
        """The same rows of what the model made of the whole batch.

        Args:
            logits: [B, ...].
        """
        return logits if self.index is None else logits.index_select(0, self.index.to(logits.device))


def take_rows(args: tuple[Any, ...], kwargs: dict[str, Any], fraction: float, results: Sequence[int] = ()) -> Rows:
    """Take a share of a batch's rows.

    Args:
        args: Positional arguments of the forward call.
        kwargs: Keyword arguments.
        fraction: Share of the rows, in (0, 1]; one row at least.
        results: Number of rows of each result of the call.
    """
    count = row_count(args, kwargs)
    apart = all(_has_rows(value, count, name) for name, value in _named(args, kwargs)) if count else False
    if count is None or not apart or any(rows != count for rows in results):
        return Rows(args, kwargs, None)
    wanted = math.ceil(fraction * count)
    if wanted >= count:
        return Rows(args, kwargs, torch.arange(count))
    index = torch.arange(wanted) * count // wanted
    taken = tuple(_take(value, index, count, None) for value in args)
    return Rows(taken, {name: _take(value, index, count, name) for name, value in kwargs.items()}, index)


def row_count(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """Number of rows of a batch, or None where nothing tells.

    Args:
        args: Positional arguments of the forward call.
        kwargs: Keyword arguments.
    """
    telling = [kwargs.get(name) for name in _ROWS_OF]
    for value in [*telling, *args, *kwargs.values()]:
        for tensor in tensors_inside(value):
            if tensor.dim() > 0:
                return tensor.shape[0]
    return None


def without_cache(kwargs: dict[str, Any], length: int | None) -> dict[str, Any]:
    """Arguments for a call that neither uses nor advances the caches among them.

    Args:
        kwargs: Keyword arguments of the forward call.
        length: Number of tokens of the call itself; masks that reach into the cache are cut to it.
    """
    caches = [name for name in CACHES if kwargs.get(name) is not None]
    if not caches:
        return kwargs
    kept = {name: value for name, value in kwargs.items() if name not in (*caches, "cache_position")}
    mask = kept.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2 and length is not None:
        kept["attention_mask"] = mask[:, -length:]
    return {**kept, "use_cache": False}


def _named(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[str | None, Any]]:
    yield from ((None, value) for value in args)
    yield from kwargs.items()


def _has_rows(value: Any, count: int, name: str | None) -> bool:
    """Whether rows can be taken from every tensor inside an argument."""
    if isinstance(value, Tensor):
        return _is_for_all(value, name) or value.shape[0] == count
    if type(value) in (list, tuple):
        return all(_has_rows(item, count, name) for item in value)
    if type(value) is dict:
        return all(_has_rows(item, count, key) for key, item in value.items())
    return not any(True for _ in tensors_inside(value))


def _is_for_all(tensor: Tensor, name: str | None) -> bool:
    # Positions may be given once for all rows.
    return tensor.dim() == 0 or name in _FOR_ALL or (name == "position_ids" and tensor.shape[0] == 1)


def _take(value: Any, index: Tensor, count: int, name: str | None) -> Any:
    if isinstance(value, Tensor):
        return value if _is_for_all(value, name) else value.index_select(0, index.to(value.device))
    if type(value) in (list, tuple):
        if len(value) == count and not any(True for _ in tensors_inside(value)):
            return type(value)(value[row] for row in index.tolist())
        return type(value)(_take(item, index, count, name) for item in value)
    if type(value) is dict:
        return {key: _take(item, index, count, key) for key, item in value.items()}
    return value
