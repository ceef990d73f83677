"""Calls of a model without a trace: in random states, buffers, attributes, or the user's backward hooks."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy
import torch
from torch import Tensor, nn


@contextmanager
def aside(module: nn.Module) -> Iterator[None]:
    """Call without checkpointing and the user's backward hooks; put random states, buffers and attributes back.

    Args:
        module: The model to be called inside.
    """
    with ExitStack() as stack:
        stack.enter_context(attributes_kept(module))
        stack.enter_context(_without_checkpoints(module))
        modules = list(module.modules())
        stack.enter_context(without_hooks(inner._backward_hooks for inner in modules))
        stack.enter_context(without_hooks(inner._backward_pre_hooks for inner in modules))
        stack.enter_context(_own_draws(module))
        yield


@contextmanager
def attributes_kept(module: nn.Module) -> Iterator[None]:
    """Let a call write to copies of buffers and attributes, and put back what modules keep of their last call.

    An auxiliary loss that the user adds to his own stays that of his call, and running statistics stay where they
    are. The originals are not touched at all: the user's graph may have saved them, and would know by their version.
    What lies deeper than in a list, dictionary or set, or in parameters, is not looked at.

    Args:
        module: The model to be called inside.
    """
    spaces: list[dict[str, Any]] = [space for inner in module.modules() for space in (vars(inner), inner._buffers)]
    kept = [{name: value for name, value in space.items() if name not in _NOT_OWN} for space in spaces]
    generators = [value for before in kept for value in before.values() if isinstance(value, torch.Generator)]
    states = [generator.get_state() for generator in generators]
    copies: dict[int, Any] = {}  # one for each object: what one module writes another may read
    for space, before in zip(spaces, kept, strict=True):
        for name, value in before.items():
            if _is_written(value):
                if id(value) not in copies:
                    copies[id(value)] = value.clone() if isinstance(value, Tensor) else value.copy()
                space[name] = copies[id(value)]
    try:
        yield
    finally:
        for space, before in zip(spaces, kept, strict=True):
            for name in space.keys() - before.keys() - _NOT_OWN:
                del space[name]
            space.update(before)
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


# What torch keeps on modules, and what DeepSpeed counts its own hooks by.
_NOT_OWN = {
    *("_parameters", "_buffers", "_modules"),
    *(name for name in vars(nn.Module()) if "hook" in name),
    *("ds_grads_remaining", "applied_pre_backward_ref_cnt", "pre_bwd_fn", "post_bwd_fn"),
}


def _is_written(value: Any) -> bool:
    """Whether a call may write to what an attribute holds: statistics, counters and logs, no weights."""
    if isinstance(value, Tensor):
        is_weight = value.requires_grad and value.is_leaf
        # Integers of more dimensions are quantized weights.
        return not is_weight and (value.is_floating_point() or value.dim() <= 1)
    return type(value) in (list, dict, set)


@contextmanager
def _without_checkpoints(module: nn.Module) -> Iterator[None]:
    # A small graph needs no checkpoints, and reentrant ones hide the parameters from its gradient.
    checkpointed = [inner for inner in module.modules() if getattr(inner, "gradient_checkpointing", False) is True]
    for inner in checkpointed:
        inner.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for inner in checkpointed:
            inner.gradient_checkpointing = True  # type: ignore[assignment]


@contextmanager
def without_hooks(hooks: Iterable[dict[Any, Any] | None]) -> Iterator[None]:
    """Keep the user's backward hooks out of a gradient that is ours: it is none of the training's.

    Args:
        hooks: Where tensors or modules keep them.
    """
    found = [each for each in hooks if each]
    kept = [dict(each) for each in found]
    for each in found:
        each.clear()
    try:
        yield
    finally:
        for each, before in zip(found, kept, strict=True):
            each.update(before)


@contextmanager
def _own_draws(module: nn.Module) -> Iterator[None]:
    """Draw from generators that follow from the user's and leave them where they are.

    The seed is made of the states of torch's, so that a run that is repeated or resumed with them draws the same
    again. Those of Python and NumPy stay out of it: who draws from torch alone need not seed them.
    """
    tensors = itertools.chain(module.parameters(), module.buffers())
    devices = {tensor.device for tensor in tensors if tensor.device.type not in ("cpu", "meta")}
    generators = [_generator(device) for device in sorted(devices, key=str)]
    plain, numbers, states = random.getstate(), numpy.random.get_state(), [each.get_state() for each in generators]
    cpu = torch.get_rng_state()
    digest = hashlib.blake2b(b"".join(state.numpy().tobytes() for state in [cpu, *states]), digest_size=8).digest()
    seed = int.from_bytes(digest, "little") % 2**63
    try:
        # Not torch.manual_seed, which seeds every device there is.
        for generator in [torch.default_generator, *generators]:
            generator.manual_seed(seed)
        random.seed(seed)
        numpy.random.seed(seed % 2**32)
        yield
    finally:
        torch.set_rng_state(cpu)
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        random.setstate(plain)
        numpy.random.set_state(numbers)


def _generator(device: torch.device) -> torch.Generator:
    """The default generator of an accelerator."""
    if device.type == "mps":
        return torch.mps._get_default_mps_generator()
    return torch.get_device_module(device).default_generators[device.index or 0]
