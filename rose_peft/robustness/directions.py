"""Moving a model's weights along directions, and putting them back to the bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .errors import ModelError, RobustnessError
from .predict import evaluating

#: Loss of each example of one batch, of shape `[examples]`, with a graph to the weights.
Loss = Callable[[nn.Module, Any], Tensor]
Scope = Literal["used", "trainable"]


@contextmanager
def weights_kept(weights: Sequence[Tensor]) -> Iterator[None]:
    """Give the weights back bit for bit, whatever happens in between."""
    originals = [weight.detach().clone() for weight in weights]
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, original in zip(weights, originals, strict=True):
                weight.copy_(original)


@contextmanager
def gradients_for(model: nn.Module, scope: Scope = "used") -> Iterator[list[nn.Parameter]]:
    """Let the weights in question require gradients, and put all flags back afterwards.

    Args:
        model: The model.
        scope: "used" for all floating-point weights, frozen or not; "trainable" for those that already require
            gradients.
    """
    if scope not in ("used", "trainable"):
        raise RobustnessError(f"scope={scope!r}: must be 'used' (all weights in use) or 'trainable'.")
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    chosen = [parameter for parameter, flag in flags if parameter.is_floating_point() and (flag or scope == "used")]
    if not chosen:
        raise ModelError(f"scope={scope!r}: the model has no such floating-point weights; try 'used'.")
    try:
        for parameter in chosen:
            parameter.requires_grad_(True)
        yield chosen
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def weights_in_use(model: nn.Module, batches: Sequence[Any], loss: Loss, scope: Scope = "used") -> list[nn.Parameter]:
    """Find the weights that the loss depends on.

    A `PeftModel` may carry weights that take no part, such as the original of a module of which a copy was trained;
    moving these would change nothing, and counting them would enlarge the weights' norm.

    Args:
        model: The model, in any mode.
        batches: Batches to try.
        loss: The loss.
        scope: See `gradients_for`.

    Returns:
        The weights, each once, in the order of `model.parameters()`.

    Raises:
        ModelError: If there are none.
    """
    used: set[int] = set()
    with evaluating(model), gradients_for(model, scope) as candidates, torch.enable_grad():
        for batch in batches:
            gradients = torch.autograd.grad(loss(model, batch).sum(), candidates, allow_unused=True)
            used |= {number for number, gradient in enumerate(gradients) if gradient is not None}
            # One batch shows them all unless the model routes its inputs; then a second one adds some.
            if len(used) == len(candidates):
                break
    if not used:
        raise ModelError(f"scope={scope!r}: the loss depends on no such weight, so there is no landscape to look at.")
    return [candidates[number] for number in sorted(used)]


def mean_loss(model: nn.Module, batches: Sequence[Any], loss: Loss) -> float:
    """Return the mean loss over all examples of all batches, without gradients, in evaluation mode."""
    total, count = 0.0, 0
    with evaluating(model), torch.no_grad():
        for batch in batches:
            values = loss(model, batch)
            total += float(values.double().sum())
            count += values.numel()
    return total / count


def mean_gradient(
    model: nn.Module, batches: Sequence[Any], loss: Loss, weights: Sequence[nn.Parameter]
) -> tuple[float, list[Tensor]]:
    """Return the mean loss and its gradient; the weights must require gradients, and `.grad` stays untouched."""
    total, count = 0.0, 0
    gradient = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
    with evaluating(model), torch.enable_grad():
        for batch in batches:
            values = loss(model, batch)
            parts = torch.autograd.grad(values.sum(), weights, allow_unused=True)
            total += float(values.detach().double().sum())
            count += values.numel()
            for sum_, part in zip(gradient, parts, strict=True):
                if part is not None:
                    sum_ += part.float()
    return total / count, [sum_ / count for sum_ in gradient]


def filter_normalised_direction(
    weights: Sequence[Tensor], generator: torch.Generator, model: nn.Module | None = None
) -> list[Tensor]:
    """Draw a random direction in which every filter is as long as the model's own.

    Source: Li et al. 2018, "Visualizing the Loss Landscape of Neural Nets", https://arxiv.org/abs/1712.09913. A filter
    is all that leads to one output: a row of a matrix (a column in GPT-2's `Conv1D`, which stores them the other way
    round) or one output channel of a convolution. As there, biases and the weights of normalisation layers, which have
    one dimension, stay where they are.

    Args:
        weights: The weights, of any shapes.
        generator: Source of randomness, on the CPU, so that a seed means the same on every device.
        model: The model of the weights, where it may have `Conv1D` layers; None takes rows everywhere.

    Returns:
        Float32 tensors of the weights' shapes on the weights' devices. A filter of zeros gets zeros.
    """
    by_input = set() if model is None else _stored_by_input(model)
    direction = []
    for weight in weights:
        draw = torch.randn(weight.shape, generator=generator)
        if weight.ndim < 2:
            direction.append(torch.zeros_like(weight, dtype=torch.float32))
            continue
        dims = (0,) if id(weight) in by_input else tuple(range(1, weight.ndim))
        draw = draw.to(weight.device)
        length = torch.linalg.vector_norm(draw, dim=dims, keepdim=True)
        wanted = torch.linalg.vector_norm(weight.detach().float(), dim=dims, keepdim=True)
        direction.append(draw * (wanted / length.clamp_min(torch.finfo(torch.float32).tiny)))
    return direction


def _stored_by_input(model: nn.Module) -> set[int]:
    """Return the ids of the matrices that are stored as [inputs, outputs]."""
    from transformers.pytorch_utils import Conv1D

    return {id(module.weight) for module in model.modules() if isinstance(module, Conv1D)}


def move(
    weights: Sequence[Tensor], originals: Sequence[Tensor], directions: Sequence[tuple[float, Sequence[Tensor]]]
) -> None:
    """Set the weights to the originals plus a combination of directions.

    Args:
        weights: Tensors to set.
        originals: Where to start from.
        directions: Pairs of a step and a direction.
    """
    with torch.no_grad():
        for number, (weight, original) in enumerate(zip(weights, originals, strict=True)):
            target = original.float()
            for step, direction in directions:
                target = target + step * direction[number]
            weight.copy_(target)
