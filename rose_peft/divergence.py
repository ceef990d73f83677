"""How far apart two stochastic outputs of the same inputs are, per kind of head. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .outputs import HeadKind, class_dimension, classes_second, counted_positions, head_kind


def divergence(first: Tensor, second: Tensor, kind: HeadKind) -> Tensor:
    """Symmetric divergence of two outputs, added up over all distributions (section 3.2 of the reference).

    "softmax": [KL(P1||P2) + KL(P2||P1)] / 4 per distribution over the classes; "multi_label": the same for one
    Bernoulli distribution per label; "regression": mean squared difference. No gradient is stopped.

    Args:
        first: Logits of pass 1, any float dtype, [..., C] or [B, C, H, W].
        second: Logits of pass 2, same shape.
        kind: What the logits mean.

    Returns:
        Scalar in nats (squared units of the target for regression), float32 or float64.
    """
    # Engines may cast what the model returns, so that both need not have the same dtype.
    if torch.float64 not in (first.dtype, second.dtype):
        first, second = first.float(), second.float()
    if kind == "regression":
        return F.mse_loss(first, second)
    if kind == "multi_label":
        # For one Bernoulli variable the two terms of the symmetric divergence collapse to (p1 - p2)(z1 - z2).
        return ((torch.sigmoid(first) - torch.sigmoid(second)) * (first - second)).sum() / 4
    dim = class_dimension(first)
    log_first, log_second = F.log_softmax(first, dim), F.log_softmax(second, dim)
    return ((log_first.exp() - log_second.exp()) * (log_first - log_second)).sum() / 4


def logits_divergence(
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    inputs: Mapping[str, Any],
    problem_type: str | None = None,
    causal: bool = False,
    head: str | None = None,
    rounding: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Divergence between the logits of two passes over the same inputs, over the positions that count.

    Args:
        first: Logits of pass 1, as `logits_of` found them.
        second: Logits of pass 2.
        inputs: Arguments of the forward call by name.
        problem_type: `model.config.problem_type` or None.
        causal: Whether the model is a causal language model.
        head: `ROSEConfig.head`: what the logits mean, where the user says it.
        rounding: Logits that differ by at most this share of the logit, or of the largest, are equal.

    Returns:
        The divergence, a scalar, and whether both are equal, a bool scalar.
    """
    total: Tensor | None = None
    equal: Tensor | None = None
    for one, two in zip(first, second, strict=True):
        one, two = classes_second(one, inputs), classes_second(two, inputs)
        same = _are_equal(one, two, rounding)
        equal = same if equal is None else equal & same
        # Positions of a span head (one logit per token) are the classes of a distribution over the sequence.
        counted = counted_positions(one, inputs, causal)
        if counted is not None:
            one, two = one[counted], two[counted]
        part = divergence(one, two, head_kind(one, problem_type, head))
        total = part if total is None else total + part
    assert total is not None and equal is not None  # there is at least one tensor of logits
    return total, equal


# Logits beyond it are masks (-1e4, the least number there is), next to which every difference would be rounding.
_LARGEST_LOGIT = 1e3


def _are_equal(one: Tensor, two: Tensor, rounding: float) -> Tensor:
    """Whether two tensors are equal but for rounding, a bool scalar; NaN equals nothing."""
    same = one == two
    if rounding:
        size = one.abs()
        largest = size.where(size < _LARGEST_LOGIT, 0).max()
        same = same | ((one - two).abs() <= rounding * size.maximum(largest))
    return same.all()
