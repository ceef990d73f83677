"""The sampled risk pass: a few rows, once in a while, beside the user's own pass and without a trace on it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from .dropout import drops_layers
from .inputs import take_rows, tensors_inside, without_cache
from .norms import IndexedTensors
from .outputs import asking_for_logits
from .risk import Call, Head, RiskWindow

# A row may be rounded otherwise at another place in the batch; seen: 2.3e-6 of the largest logit in float32.
_ROUNDING = 2**-17


@dataclass(frozen=True)
class Sample:
    """Some rows of a call.

    Args:
        call: With those rows as its inputs, and without the user's caches.
        twice: The same with each row in it twice, which makes two passes in one; None where that would not be two.
        asking: Keyword arguments in the place of the call's, for a model that left its logits out.
        whole: Whether it is the whole batch, because its rows cannot be taken apart.
        share: Share of the batch's rows, in (0, 1].
    """

    call: Call
    twice: Call | None
    asking: dict[str, Any]
    whole: bool
    share: float

    def both(self, head: Head) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """The logits of two passes."""
        if self.twice is None:
            first, second = (head.logits(self.call.again(**self.asking)) for _ in range(2))
            return first, second
        halves = [part.chunk(2) for part in head.logits(self.twice.again(**self.asking))]
        return [half[0] for half in halves], [half[1] for half in halves]

    def two_calls_are_equal(self, head: Head) -> Tensor:
        """Whether two calls give the same logits to the last bit, a bool scalar; keeps no graph."""
        first, second = ([part.detach() for part in head.logits(self.call.again(**self.asking))] for _ in range(2))
        return torch.stack([(one == two).all() for one, two in zip(first, second, strict=True)]).all()


def take_sample(call: Call, output: object, head: Head, fraction: float, *, at_once: bool = True) -> Sample:
    """Take some rows of a call, spread over the batch.

    Args:
        call: The user's call.
        output: What it returned; it tells how many rows there are.
        head: What the logits mean.
        fraction: Share of the rows, in (0, 1].
        at_once: Whether one call may do for both passes. Whether it can depends on the rows, and each process has its
            own; so not where all of them must call the model equally often.
    """
    asking = asking_for_logits(output, call.kwargs)
    logits = () if asking else head.logits(output)
    kwargs, results = without_cache(call.args, call.kwargs), [len(part) for part in logits]
    inner = list(call.module.modules())
    if any(getattr(config, "alora_invocation_tokens", None) for config in _adapter_configs(inner)):
        return take_all(call, output)  # PEFT has given each row of the whole batch its place
    least = 2 if any(isinstance(module, _BatchNorm) for module in inner) else 1  # of one row there is no variance
    rows = take_rows(call.args, kwargs, fraction, results, least=least)
    twice = None
    # One call takes half as many kernels, and lets go of each gradient as it comes.
    if at_once and rows.index is not None and _rows_are_apart(call.module, logits):
        doubled = take_rows(call.args, kwargs, fraction, results, times=2)
        twice = Call(call.module, doubled.args, doubled.kwargs, {})
    return Sample(Call(call.module, rows.args, rows.kwargs, {}), twice, asking, rows.index is None, rows.share)


def take_all(call: Call, output: object) -> Sample:
    """Take the whole batch of a call, whose rows cannot be taken apart.

    Args:
        call: The user's call.
        output: What it returned.
    """
    whole = Call(call.module, call.args, without_cache(call.args, call.kwargs), {})
    return Sample(whole, None, asking_for_logits(output, call.kwargs), whole=True, share=1.0)


def _adapter_configs(modules: Sequence[nn.Module]) -> Iterator[Any]:
    """The configs of PEFT's adapters in a model."""
    for module in modules:
        configs = getattr(module, "peft_config", None)
        yield from configs.values() if isinstance(configs, dict) else ()


def _rows_are_apart(module: nn.Module, logits: Sequence[Tensor]) -> bool:
    """Whether what comes of a row depends on no other row of the call, nor on a draw that is made once for all."""
    if any(len(part) in part.shape[1:] for part in logits):  # similarities of rows, or by chance
        return False
    return not any(isinstance(inner, _BatchNorm) or drops_layers(inner) for inner in module.modules())


def sampled_pass(
    sample: Sample,
    head: Head,
    window: RiskWindow,
    parameters: Callable[[], IndexedTensors],
    *,
    scale: float,
    exact: bool,
) -> None:
    """Run two passes over a few rows and keep the norms of the gradient of their divergence.

    The gradient runs through both passes, as the published one does. Through one alone it would hold, besides what
    dropout does, what both passes have in common, and would rank otherwise however many rows it saw.
    To be called `aside`, where the modules show whole parameters.

    Args:
        sample: The rows.
        head: What the logits mean.
        window: Where the norms go.
        parameters: Gives (unit index, parameter) of everything that trains, as the modules show them in the pass.
        scale: Factor on the divergence before its gradient is taken.
        exact: Whether it is worth two calls more to tell to the last bit whether dropout makes passes differ.
    """
    first, second = sample.both(head)
    rounding = 0.0 if sample.twice is None else _ROUNDING
    value, equal = head.divergence(first, second, sample.call.inputs, rounding)
    if exact and sample.twice is not None:
        # Without dropout halves may still differ by more than `_ROUNDING`, where two calls agree to the last bit. And
        # halves that are equal though calls differ, by a draw per call, say nothing either.
        equal = equal | sample.two_calls_are_equal(head)
    # A graph that the user's inputs hang on, or weights that he caches, is still needed; compiled graphs want to be
    # given up otherwise.
    inputs = itertools.chain(tensors_inside(sample.call.args), tensors_inside(sample.call.kwargs))
    retain = any(tensor.requires_grad for tensor in inputs) or bool(parametrize._cache_enabled)
    window.add(parameters(), value, equal, scale, share=sample.share, whole=sample.whole, retain_graph=retain)
