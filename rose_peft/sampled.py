"""The sampled risk pass: a few rows, once in a while, beside the user's own pass and without a trace on it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from .distributed import whole_parameters
from .inputs import take_rows, without_cache
from .norms import IndexedTensors
from .risk import Call, Head, RiskWindow


@dataclass(frozen=True)
class Draw:
    """What the random numbers of one pass depend on, so that a resumed run draws the same.

    Args:
        seed: The run's.
        step: Masked steps taken before.
        call: Calls of the model since the last step.
        rank: Of this process among those that train the model.
    """

    seed: int
    step: int
    call: int
    rank: int

    @property
    def number(self) -> int:
        """One seed for all."""
        return (self.seed + 1_000_003 * self.step + 7_919 * self.call + 104_729 * self.rank) % 2**63


def sampled_pass(
    call: Call,
    output: object,
    head: Head,
    window: RiskWindow,
    parameters: Callable[[], IndexedTensors],
    *,
    fraction: float,
    scale: float,
    draw: Draw,
    confirm: bool,
) -> None:
    """Run a second pass over a few rows and keep the norms of its divergence from the user's own logits.

    The gradient runs through this pass alone. The user's graph, loss, outputs, buffers and random numbers stay as
    they are.

    Args:
        call: The user's call.
        output: What it returned.
        head: What the logits mean.
        window: Where the norms go.
        parameters: Gives (unit index, parameter) of everything that trains, as the modules show them in the pass.
        fraction: Share of the rows, in (0, 1].
        scale: Factor on the divergence before its gradient is taken.
        draw: Where the random numbers come from.
        confirm: Whether to find out by one more pass, without gradient, if there is any dropout at all; else outputs
            that are as near as rounding count as equal.
    """
    # TRL's trainers ask for log-probabilities and no logits: those are made here, without gradient.
    fused = bool(call.kwargs.get("fused_lm_head"))
    changed = {"fused_lm_head": False} if fused else {}
    ours = [] if fused else [logits.detach() for logits in head.logits(output)]
    rows = take_rows(call.args, without_cache(call.kwargs, _length(call)), fraction, [len(logits) for logits in ours])
    small = Call(call.module, rows.args, rows.kwargs, {})
    with _aside(call.module, draw.number), whole_parameters(head.model):
        first: Sequence[Tensor] = [rows.of(logits) for logits in ours]
        if fused:
            with torch.no_grad():
                first = head.logits(small.again(**changed))
        second = head.logits(small.again(**changed))
        value, _ = head.divergence(first, second, small.kwargs)
        if confirm:
            with torch.no_grad():
                third = head.logits(small.again(**changed))
            equal = _all([(one == other).all() for one, other in zip(second, third, strict=True)])
        else:
            equal = _all([_nearly_equal(one, other) for one, other in zip(first, second, strict=True)])
        window.add(parameters(), value, equal, scale, whole=rows.index is None)


def _length(call: Call) -> int | None:
    ids = call.kwargs.get("input_ids", call.args[0] if call.args else call.kwargs.get("inputs_embeds"))
    return ids.shape[1] if isinstance(ids, Tensor) and ids.dim() > 1 else None


def _all(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(parts)).all()


def _nearly_equal(one: Tensor, other: Tensor) -> Tensor:
    """Whether two passes differ by no more than the rounding of another batch size."""
    tolerance = 16 * torch.finfo(one.dtype).eps
    return (one - other).abs().max() <= tolerance * one.abs().max()


@contextmanager
def _aside(module: nn.Module, seed: int) -> Iterator[None]:
    """Leave random states, running statistics and checkpointing as they are."""
    device = next((param.device for param in module.parameters()), torch.device("cpu"))
    index = [device.index or 0] if device.type not in ("cpu", "meta") else []
    plain, numbers = random.getstate(), numpy.random.get_state()
    statistics = [
        (buffer, buffer.clone())
        for inner in module.modules()
        if isinstance(inner, _NormBase)
        for buffer in inner.buffers(recurse=False)
    ]
    # The small graph needs no checkpoints, and reentrant ones hide the parameters from its gradient.
    checkpointed = [inner for inner in module.modules() if getattr(inner, "gradient_checkpointing", False) is True]
    for inner in checkpointed:
        inner.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        with torch.random.fork_rng(devices=index, device_type=device.type if index else "cuda"):
            torch.manual_seed(seed)
            random.seed(seed)
            numpy.random.seed(seed % 2**32)
            yield
    finally:
        random.setstate(plain)
        numpy.random.set_state(numbers)
        for inner in checkpointed:
            inner.gradient_checkpointing = True  # type: ignore[assignment]
        with torch.no_grad():
            for buffer, before in statistics:
                buffer.copy_(before)
