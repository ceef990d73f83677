"""How far apart two stochastic outputs of the same inputs are, per kind of head. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import UnsupportedModelError

HeadKind = Literal["softmax", "multi_label", "regression"]
IGNORED_LABEL = -100


def divergence(first: Tensor, second: Tensor, kind: HeadKind) -> Tensor:
    """Symmetric divergence of two outputs, summed over everything but the classes (section 3.2 of the reference).

    "softmax": [KL(P1||P2) + KL(P2||P1)] / 4 per distribution over the last dimension; "multi_label": the same for one
    Bernoulli distribution per label; "regression": mean squared difference. No gradient is stopped.

    Args:
        first: Logits of pass 1, any float dtype, [..., C].
        second: Logits of pass 2, same shape.
        kind: What the logits mean.

    Returns:
        Scalar in nats (squared units of the target for regression), float32 or float64.
    """
    if first.dtype in (torch.float16, torch.bfloat16):
        first, second = first.float(), second.float()
    if kind == "regression":
        return F.mse_loss(first, second)
    if kind == "multi_label":
        # For one Bernoulli variable the two terms of the symmetric divergence collapse to (p1 - p2)(z1 - z2).
        return ((torch.sigmoid(first) - torch.sigmoid(second)) * (first - second)).sum() / 4
    log_first, log_second = F.log_softmax(first, dim=-1), F.log_softmax(second, dim=-1)
    return ((log_first.exp() - log_second.exp()) * (log_first - log_second)).sum() / 4


def logits_of(output: Any) -> tuple[Tensor, ...]:
    """Find the logits in what a model returned.

    Args:
        output: A `ModelOutput` or mapping with `logits` (or `start_logits` and `end_logits`), a tuple in the order of
            transformers (loss first where there is one), or the logits themselves.

    Returns:
        One tensor, or start and end logits for question answering.

    Raises:
        UnsupportedModelError: If there are none.
    """
    if isinstance(output, Tensor):
        return (output,)
    if isinstance(output, Mapping):
        for keys in (("logits",), ("start_logits", "end_logits")):
            if all(isinstance(output.get(key), Tensor) for key in keys):
                return tuple(output[key] for key in keys)
        raise UnsupportedModelError(
            f"The model returned {type(output).__name__} with {', '.join(map(str, output))}, but no logits, so the "
            "outputs of two passes cannot be compared. Use a model with a head, or strategy='second_order'."
        )
    if isinstance(output, tuple):
        tensors = [item for item in output if isinstance(item, Tensor) and item.dim() > 0]
        if tensors:
            return (tensors[0],)
    raise UnsupportedModelError(
        f"The model returned {type(output).__name__}, in which no logits were found, so the outputs of two passes "
        "cannot be compared. Return a ModelOutput with `logits`, or use strategy='second_order'."
    )


def loss_of(output: Any) -> Tensor | None:
    """Return the loss in what a model returned, or None where it computed none."""
    if isinstance(output, Mapping):
        loss = output.get("loss")
    elif isinstance(output, tuple) and output and isinstance(output[0], Tensor) and output[0].dim() == 0:
        loss = output[0]
    else:
        loss = None
    return loss if isinstance(loss, Tensor) else None


def with_loss(output: Any, loss: Tensor) -> Any:
    """Return the output with its loss replaced; mappings are changed in place, tuples are rebuilt."""
    if isinstance(output, tuple):
        return (loss, *output[1:])
    output["loss"] = loss
    return output


def head_kind(logits: Tensor, problem_type: str | None) -> HeadKind:
    """Tell what logits mean: by the `problem_type` of transformers, else by the number of outputs.

    Args:
        logits: [..., C].
        problem_type: `model.config.problem_type`, which transformers sets itself once it has seen labels.
    """
    if problem_type == "regression" or logits.shape[-1] == 1:
        return "regression"
    if problem_type == "multi_label_classification":
        return "multi_label"
    return "softmax"


def counted_positions(logits: Tensor, inputs: Mapping[str, Any], causal: bool) -> Tensor | None:
    """Which positions of token-level logits count: those with a label, or without labels those that are no padding.

    Args:
        logits: [B, T, C].
        inputs: Keyword arguments of the forward call; `labels`, `decoder_attention_mask` and `attention_mask` count.
        causal: Whether the logits at position t predict the label at t + 1.

    Returns:
        bool [B, T], or None where the logits are not per token or nothing tells.
    """
    labels = inputs.get("labels")
    if isinstance(labels, Tensor) and logits.dim() == 3 and labels.shape == logits.shape[:2]:
        counted = labels != IGNORED_LABEL
        if causal:
            counted = torch.cat([counted[:, 1:], torch.zeros_like(counted[:, :1])], dim=1)
        return counted.to(logits.device)
    for name in ("decoder_attention_mask", "attention_mask"):
        mask = inputs.get(name)
        if isinstance(mask, Tensor) and logits.dim() == 3 and mask.shape == logits.shape[:2]:
            return mask.bool().to(logits.device)
    return None


def output_divergence(
    first: Any, second: Any, inputs: Mapping[str, Any], problem_type: str | None, causal: bool
) -> tuple[Tensor, Tensor]:
    """Divergence between what a model returned in two passes over the same inputs.

    Args:
        first: Output of pass 1.
        second: Output of pass 2.
        inputs: Keyword arguments of the forward call.
        problem_type: `model.config.problem_type` or None.
        causal: Whether the model is a causal language model.

    Returns:
        The divergence, a scalar, and whether both outputs are equal to the last bit, a bool scalar.

    Raises:
        UnsupportedModelError: If there are no logits.
    """
    total: Tensor | None = None
    equal: Tensor | None = None
    for one, two in zip(logits_of(first), logits_of(second), strict=True):
        same = (one == two).all()
        equal = same if equal is None else equal & same
        # Positions of a span head (one logit per token) are the classes of a distribution over the sequence.
        counted = counted_positions(one, inputs, causal)
        if counted is not None:
            one, two = one[counted], two[counted]
        part = divergence(one, two, head_kind(one, problem_type))
        total = part if total is None else total + part
    assert total is not None and equal is not None  # logits_of returns at least one tensor
    return total, equal
