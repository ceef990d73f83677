"""Calls of a model without a trace: in random states, buffers, attributes, or the user's backward hooks."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy
import torch
from torch import Tensor, nn


@contextmanager
def aside(module: nn.Module) -> Iterator[None]:
    """Leave random states, buffers, attributes and checkpointing as they are, and the user's backward hooks out.

    Args:
        module: The model to be called inside.
    """
    with ExitStack() as stack:
        stack.enter_context(attributes_kept(module))
        stack.enter_context(_buffers_kept(module))
        stack.enter_context(_without_checkpoints(module))
        stack.enter_context(_without_backward_hooks(module))
        stack.enter_context(_own_draws(module))
        yield


@contextmanager
def attributes_kept(module: nn.Module) -> Iterator[None]:
    """Put back what modules keep of their last call, such as an auxiliary loss that the user adds to his own.

    Tensors are copies inside, and lists, dictionaries and generators get back what they held. What lies deeper, or in
    parameters, is not looked at.

    Args:
        module: The model to be called inside.
    """
    kept = [(inner, _own_attributes(inner)) for inner in module.modules()]
    insides = [(value, _inside(value)) for _, before in kept for value in before.values()]
    for inner, before in kept:
        for name, value in before.items():
            if isinstance(value, Tensor) and not value.requires_grad:
                inner.__dict__[name] = value.clone()
    try:
        yield
    finally:
        for inner, before in kept:
            for name in _own_attributes(inner).keys() - before.keys():
                del inner.__dict__[name]
            inner.__dict__.update(before)
        for value, inside in insides:
            if isinstance(value, list):
                value[:] = inside
            elif isinstance(value, dict):
                value.clear()
                value.update(inside)
            elif isinstance(value, torch.Generator):
                value.set_state(inside)


# What torch itself keeps on modules, and what DeepSpeed counts its hooks by.
_NOT_OWN = {"_parameters", "_buffers", "_modules", *(name for name in nn.Module().__dict__ if "hook" in name)}
_ENGINES = ("ds_", "applied_pre_backward")


def _own_attributes(module: nn.Module) -> dict[str, Any]:
    return {
        name: value for name, value in vars(module).items() if name not in _NOT_OWN and not name.startswith(_ENGINES)
    }


def _inside(value: Any) -> Any:
    """What a plain container held, or the state of a generator; None for anything else."""
    if type(value) in (list, dict):
        return value.copy()
    return value.get_state() if isinstance(value, torch.Generator) else None


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
def _without_backward_hooks(module: nn.Module) -> Iterator[None]:
    """Keep the backward hooks of modules out of a gradient that is ours: it is none of the training's."""
    found = [
        hooks for inner in module.modules() for hooks in (inner._backward_hooks, inner._backward_pre_hooks) if hooks
    ]
    kept = [dict(hooks) for hooks in found]
    for hooks in found:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, before in zip(found, kept, strict=True):
            hooks.update(before)


@contextmanager
def _buffers_kept(module: nn.Module) -> Iterator[None]:
    buffers = _own_buffers(module)
    try:
        yield
    finally:
        for inner, name, buffer in buffers:
            inner._buffers[name] = buffer


def _own_buffers(module: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    """Put copies in the place of what a forward pass may write to, such as running statistics; returns the originals.

    The originals are not touched at all: the user's graph may have saved them, and would know by their version.
    """
    found = []
    copies: dict[int, Tensor] = {}
    for inner in module.modules():
        for name, buffer in inner._buffers.items():
            # Counters and statistics; integers of more dimensions are quantized weights.
            if buffer is not None and (buffer.is_floating_point() or buffer.dim() <= 1):
                found.append((inner, name, buffer))
                inner._buffers[name] = copies.setdefault(id(buffer), buffer.clone())
    return found


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
