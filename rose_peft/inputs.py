"""What a model was called with: the tensors inside, some of its rows, and a cache as it was before the call."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .outputs import unwrapped

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


def by_name(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by their names, positional ones too where a signature tells their names.

    Args:
        module: Who is called.
        args: Positional arguments.
        kwargs: Keyword arguments.
    """
    names = _positional_names(unwrapped(module)) if args else []
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _positional_names(module: nn.Module) -> list[str]:
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):  # a forward that is no Python function tells no names
        return []
    names = [each.name for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    # PeftModel hands whatever it gets to the model inside.
    inner = getattr(module, "get_base_model", None)
    return names if names or inner is None else _positional_names(inner())


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


# What tells the number of rows where no result does, the most telling first.
_ROWS_OF = ("input_ids", "inputs_embeds", "pixel_values", "input_values", "input_features", "decoder_input_ids")
# Arguments that have no row for each example and go with any number of them.
_FOR_ALL = (
    "cache_position",
    "num_items_in_batch",
    "logits_to_keep",
    "head_mask",
    "decoder_head_mask",
    "cross_attn_head_mask",
)
# Masks that reach into a cache, and what has the length of the call itself.
_REACHING = {
    "attention_mask": ("input_ids", "inputs_embeds"),
    "decoder_attention_mask": ("decoder_input_ids", "decoder_inputs_embeds", "labels"),
}


@dataclass(frozen=True)
class Rows:
    """Some rows of a batch, spread over it.

    Args:
        args: Positional arguments of the forward call, those rows of them.
        kwargs: Keyword arguments, those rows of them.
        index: Which rows, int64 [k times]; None for the whole batch, whose rows cannot be taken apart.
        share: Share of the batch's rows, in (0, 1].
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    index: Tensor | None
    share: float = 1.0


def take_rows(
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    fraction: float,
    results: Sequence[int] = (),
    times: int = 1,
    least: int = 1,
) -> Rows:
    """Take a share of a batch's rows.

    Args:
        args: Positional arguments of the forward call.
        kwargs: Keyword arguments.
        fraction: Share of the rows, in (0, 1].
        results: Number of rows of each result of the call; without any the inputs tell.
        times: How often to take them, all of them one time after the other.
        least: Fewest rows to take, where there are as many.
    """
    count = results[0] if results else row_count(args, kwargs)
    parts = [_part_of(value, count, name) for name, value in _named(args, kwargs)] if count else []
    apart = _PER_ROW in parts and None not in parts and all(rows == count for rows in results)
    # A single row, such as a packed one, cannot be taken apart either; all of several rows are what was asked for.
    if count is None or not apart or (count == 1 and fraction < 1):
        return Rows(args, kwargs, None)
    wanted = min(count, max(least, math.ceil(fraction * count)))
    index = (torch.arange(wanted, device="cpu") * count // wanted).repeat(times)
    if wanted == count and times == 1:
        return Rows(args, kwargs, index)
    taken = tuple(_take(value, index, count, None) for value in args)
    named = {name: _take(value, index, count, name) for name, value in kwargs.items()}
    return Rows(taken, named, index, wanted / count)


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


def without_cache(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments for a call that neither uses nor advances the caches among them.

    Args:
        args: Positional arguments of the forward call.
        kwargs: Keyword arguments; masks that reach into the cache are cut to the tokens of the call itself.
    """
    if all(kwargs.get(name) is None for name in CACHES):
        return kwargs
    kept = {name: value for name, value in kwargs.items() if name not in (*CACHES, "cache_position")}
    for name, sources in _REACHING.items():
        mask = kept.get(name)
        found = [kept.get(source) for source in sources] + (list(args[:1]) if name == "attention_mask" else [])
        lengths = [ids.shape[1] for ids in found if isinstance(ids, Tensor) and ids.dim() > 1]
        if isinstance(mask, Tensor) and lengths:
            kept[name] = mask[..., -lengths[0] :]
    return {**kept, "use_cache": False}


def _named(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[str | None, Any]]:
    yield from ((None, value) for value in args)
    yield from kwargs.items()


_PER_ROW, _FOR_ANY_ROWS = "per row", "for any rows"


def _part_of(value: Any, count: int, name: str | None) -> str | None:
    """Whether an argument has a part for each row or goes with any rows; None where rows cannot be taken from it."""
    if isinstance(value, Tensor):
        if value.dim() == 0 or name in _FOR_ALL or (name == "position_ids" and value.shape[0] == 1 != count):
            return _FOR_ANY_ROWS
        # Positions in time, height and width [3, B, T] are no rows, whatever their number.
        return _PER_ROW if value.shape[0] == count and not (name == "position_ids" and value.dim() > 2) else None
    if isinstance(value, (list, tuple)):
        parts = {_part_of(item, count, name) for item in value}
        if len(value) == count:  # one item for each row; but where the items have rows too, nothing tells
            return _PER_ROW if _PER_ROW not in parts or None in parts else None
    elif isinstance(value, MutableMapping):
        parts = {_part_of(item, count, str(key)) for key, item in value.items()}
    else:
        parts = {None} if any(True for _ in tensors_inside(value)) else set()
    return None if None in parts else _PER_ROW if _PER_ROW in parts else _FOR_ANY_ROWS


def _take(value: Any, index: Tensor, count: int, name: str | None) -> Any:
    """The rows of an argument that has some."""
    if _part_of(value, count, name) != _PER_ROW:
        return value
    if isinstance(value, Tensor):
        return value.index_select(0, index.to(value.device))
    if isinstance(value, MutableMapping):
        taken = copy.copy(value)
        for key, item in value.items():
            taken[key] = _take(item, index, count, str(key))
        return taken
    if len(value) == count:
        items = [value[row] for row in index.tolist()]
    else:
        items = [_take(item, index, count, name) for item in value]
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
