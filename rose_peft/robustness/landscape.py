"""Loss landscape and sharpness around a model's weights, in evaluation mode, on a fixed set of examples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .data import Examples
from .directions import (
    Loss,
    Scope,
    filter_normalised_direction,
    gradients_for,
    mean_gradient,
    mean_loss,
    move,
    weights_in_use,
    weights_kept,
)
from .errors import RobustnessError
from .estimate import Estimate, mean
from .predict import Predictor, evaluating
from .results import Row


def classification_batches(
    predictor: Predictor, examples: Examples, batch_size: int | None = None
) -> list[dict[str, Tensor]]:
    """Tokenize examples once, into batches with their labels, sorted by length.

    Args:
        predictor: The model with its tokenizer.
        examples: The data.
        batch_size: Texts per batch; None for the predictor's.
    """
    size = batch_size or predictor.batch_size
    order = sorted(range(len(examples)), key=lambda position: sum(map(len, examples.texts[position])))
    batches = []
    for start in range(0, len(order), size):
        part = examples.select(order[start : start + size])
        batches.append({**predictor.encode(part.texts), "labels": torch.tensor(part.labels)})
    return batches


def classification_loss(predictor: Predictor) -> Loss:
    """Return the loss for `classification_batches`: the cross-entropy of each example."""

    def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        # The labels stay out of the model: what it does with them (a second pass, a penalty) is not the landscape.
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits = predictor.forward(inputs)
        return functional.cross_entropy(logits, batch["labels"].to(logits.device), reduction="none")

    return loss


@dataclass(frozen=True)
class Surface:
    """Losses on a line or plane through the weights.

    Args:
        steps: Steps along each direction, in multiples of the filter-normalised direction, ascending.
        losses: Mean loss at each step: a list for a line; for a plane one list per step along the second direction.
        seed: Seed of the directions.
        n: Number of examples that each loss is the mean over, where that is known.
    """

    steps: list[float]
    losses: list[Any]
    seed: int
    n: int | None = None

    @property
    def dimensions(self) -> int:
        """1 for a line, 2 for a plane."""
        return 2 if isinstance(self.losses[0], list) else 1

    @property
    def centre(self) -> float:
        """Loss at the weights themselves."""
        middle = len(self.steps) // 2
        return self.losses[middle][middle] if self.dimensions == 2 else self.losses[middle]


def check_grid(dimensions: int, radius: float, points: int) -> None:
    """Check what `loss_surface` is to measure.

    Raises:
        RobustnessError: Naming the argument that is out of range.
    """
    if dimensions not in (1, 2):
        raise RobustnessError(f"dimensions={dimensions}: must be 1 or 2.")
    if points < 3 or points % 2 == 0:
        raise RobustnessError(f"points={points}: must be odd and at least 3, to have the weights in the middle.")
    if not radius > 0:
        raise RobustnessError(f"radius={radius}: must be positive; 1 moves every filter by its own length.")


def loss_surface(
    model: nn.Module,
    batches: Sequence[Any],
    loss: Loss,
    *,
    dimensions: int = 2,
    radius: float = 1.0,
    points: int = 21,
    seed: int = 0,
    scope: Scope = "used",
    progress: bool = False,
) -> Surface:
    """Measure the loss on a line or plane of filter-normalised random directions through the weights.

    Source: Li et al. 2018, https://arxiv.org/abs/1712.09913. The weights are as they were afterwards, to the bit, also
    when something fails.

    Args:
        model: The model.
        batches: Fixed batches; the loss at every point is the mean over all of them.
        loss: Loss of each example of a batch.
        dimensions: 1 or 2.
        radius: Largest step; at 1 every filter has moved by its own length.
        points: Points along each direction; odd, so that the weights themselves are one of them.
        seed: Seed of the directions: the same for models of the same shapes.
        scope: "used" moves all weights that the loss depends on, "trainable" those that require gradients.
        progress: Show a progress bar.

    Raises:
        RobustnessError: If an argument is out of range.
    """
    from tqdm.auto import tqdm

    check_grid(dimensions, radius, points)
    _need_batches(batches)
    weights = weights_in_use(model, batches, loss, scope)
    originals = [weight.detach().clone() for weight in weights]
    generator = torch.Generator().manual_seed(seed)
    directions = [filter_normalised_direction(weights, generator, model) for _ in range(dimensions)]
    half = points // 2
    steps = [radius * number / half for number in range(-half, half + 1)]
    rows = steps if dimensions == 2 else [0.0]
    bar = tqdm(total=len(rows) * points, desc="loss surface", disable=not progress)
    table = []
    sizes: list[int] = []

    def counted(model: nn.Module, batch: Any) -> Tensor:
        losses = loss(model, batch)
        sizes.append(losses.numel())
        return losses

    with bar, weights_kept(weights):
        for second in rows:
            row = []
            for first in steps:
                move(weights, originals, list(zip((first, second), directions, strict=False)))
                row.append(mean_loss(model, batches, counted))
                bar.update()
            table.append(row)
    return Surface(steps, table if dimensions == 2 else table[0], seed, sum(sizes) // (len(rows) * points))


@dataclass(frozen=True)
class Sharpness:
    """How steeply the loss rises around the weights.

    Args:
        loss: Loss at the weights.
        worst_loss: Highest loss found in the ball.
        epsilon: Relative radius of the ball.
    """

    loss: float
    worst_loss: float
    epsilon: float

    @property
    def increase(self) -> float:
        """How much the loss rises at worst."""
        return self.worst_loss - self.loss


def check_ball(epsilon: float, ascent_steps: int) -> None:
    """Check where `worst_loss` is to search.

    Raises:
        RobustnessError: Naming the argument that is out of range.
    """
    if not epsilon > 0:
        raise RobustnessError(f"epsilon={epsilon}: must be positive; it is a share of each tensor's norm.")
    if ascent_steps < 1:
        raise RobustnessError(f"ascent_steps={ascent_steps}: must be at least 1.")


def worst_loss(
    model: nn.Module,
    batches: Sequence[Any],
    loss: Loss,
    *,
    epsilon: float = 0.005,
    ascent_steps: int = 10,
    seed: int = 0,
    scope: Scope = "used",
) -> Sharpness:
    """Search the highest loss when every weight tensor may move by a share of its own norm.

    The ball is the one of adversarial weight perturbation (Wu et al. 2020, https://arxiv.org/abs/2004.05884): each
    tensor moves by at most `epsilon` times its norm, so that rescaling a tensor changes nothing. Projected gradient
    ascent from a small random start; the result is a lower bound of the true maximum.

    Args:
        model: The model; its weights are as they were afterwards, to the bit, also when something fails.
        batches: Fixed batches.
        loss: Loss of each example of a batch.
        epsilon: Radius of each tensor's ball over the tensor's norm.
        ascent_steps: Steps of the ascent, each as long as the radius.
        seed: Seed of the start.
        scope: See `loss_surface`.

    Raises:
        RobustnessError: If an argument is out of range.
    """
    check_ball(epsilon, ascent_steps)
    _need_batches(batches)
    weights = weights_in_use(model, batches, loss, scope)
    originals = [weight.detach().clone() for weight in weights]
    radii = [epsilon * torch.linalg.vector_norm(original.float()) for original in originals]
    start = mean_loss(model, batches, loss)
    # At a minimum the gradient is zero and shows no way up, hence not from the weights themselves.
    generator = torch.Generator().manual_seed(seed)
    offset = [
        _of_length(torch.randn(original.shape, generator=generator).to(original.device), 0.01 * radius)
        for original, radius in zip(originals, radii, strict=True)
    ]
    highest = start
    with weights_kept(weights), gradients_for(model, scope):
        for _ in range(ascent_steps):
            move(weights, originals, [(1.0, offset)])
            here, gradient = mean_gradient(model, batches, loss, weights)
            highest = _higher(highest, here)
            offset = [
                _within(part + _of_length(slope, radius), radius)
                for part, slope, radius in zip(offset, gradient, radii, strict=True)
            ]
        move(weights, originals, [(1.0, offset)])
        highest = _higher(highest, mean_loss(model, batches, loss))
    return Sharpness(start, highest, epsilon)


def measure_sharpness(
    predictor: Predictor,
    examples: Examples,
    *,
    epsilon: float = 0.005,
    ascent_steps: int = 10,
    probes: int = 16,
    seed: int = 0,
    scope: Scope = "used",
    progress: bool = False,
) -> list[Row]:
    """Measure the loss of a classifier, how much it rises at worst, and the trace of its Hessian.

    Args:
        predictor: The model with its tokenizer.
        examples: The data.
        epsilon: See `worst_loss`.
        ascent_steps: See `worst_loss`.
        probes: See `hessian_trace`; 0 leaves it out.
        seed: Seed of start and probes.
        scope: See `loss_surface`.
        progress: Show a progress bar.

    Returns:
        Rows of a result file.

    Raises:
        RobustnessError: If an argument is out of range.
    """
    model, loss = predictor.model, classification_loss(predictor)
    batches = classification_batches(predictor, examples)
    found = worst_loss(model, batches, loss, epsilon=epsilon, ascent_steps=ascent_steps, seed=seed, scope=scope)
    rows = [
        Row("loss", Estimate(found.loss, len(examples))),
        Row("worst_loss_increase", Estimate(found.increase, len(examples))),
    ]
    if probes:
        trace = hessian_trace(model, batches, loss, probes=probes, seed=seed, scope=scope, progress=progress)
        rows.append(Row("hessian_trace", trace))
    return rows


def _higher(loss: float, other: float) -> float:
    """Return the higher loss; one that is no number any more is as high as can be."""
    return max(loss, other) if math.isfinite(loss) and math.isfinite(other) else math.inf


def _of_length(direction: Tensor, length: Tensor) -> Tensor:
    """Scale to a length; zeros stay zeros."""
    norm = torch.linalg.vector_norm(direction)
    return direction * (length / norm) if norm > 0 else torch.zeros_like(direction)


def _within(offset: Tensor, radius: Tensor) -> Tensor:
    """Project onto the ball."""
    norm = torch.linalg.vector_norm(offset)
    return offset * (radius / norm) if norm > radius else offset


def hessian_trace(
    model: nn.Module,
    batches: Sequence[Any],
    loss: Loss,
    *,
    probes: int = 16,
    seed: int = 0,
    scope: Scope = "used",
    progress: bool = False,
) -> Estimate:
    """Estimate the trace of the Hessian of the mean loss by random probes.

    Source: Hutchinson 1990; Yao et al. 2020 (PyHessian), https://arxiv.org/abs/1912.07145. Each probe v has entries
    +1 and -1 with equal chance, and the mean of v'Hv over probes is an unbiased estimate. Second derivatives need
    attention without a fused kernel; it is switched for the time being.

    Args:
        model: The model.
        batches: Fixed batches.
        loss: Loss of each example of a batch.
        probes: Number of probes.
        seed: Seed of the probes.
        scope: See `loss_surface`.
        progress: Show a progress bar.

    Returns:
        The trace, with the bootstrap interval over probes.

    Raises:
        RobustnessError: If an argument is out of range.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from tqdm.auto import tqdm

    if probes < 1:
        raise RobustnessError(f"probes={probes}: must be at least 1; 16 is usual.")
    _need_batches(batches)
    weights = weights_in_use(model, batches, loss, scope)
    generator = torch.Generator().manual_seed(seed)
    sums, count = [0.0] * probes, 0
    bar = tqdm(total=probes * len(batches), desc="Hessian trace", disable=not progress)
    with evaluating(model), gradients_for(model, scope), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), bar:
        for batch in batches:
            losses = loss(model, batch)
            gradient = torch.autograd.grad(losses.sum(), weights, create_graph=True, allow_unused=True)
            count += losses.numel()
            generator.manual_seed(seed)  # each batch meets the same probes, which are drawn anew to save their memory
            for number in range(probes):
                probe = [
                    (torch.randint(0, 2, weight.shape, generator=generator) * 2 - 1).to(weight) for weight in weights
                ]
                # The gradient's graph serves all probes; making it is the larger part of the work for one.
                sums[number] += _curvature(gradient, weights, probe, keep_graph=number < probes - 1)
                bar.update()
    values = [total / count for total in sums]
    # A loss that is no number has no curvature to speak of.
    return mean(values) if all(map(math.isfinite, values)) else Estimate(None, len(values))


def _curvature(
    gradient: Sequence[Tensor | None], weights: Sequence[Tensor], probe: Sequence[Tensor], keep_graph: bool
) -> float:
    """Second derivative along a probe, v'Hv, from a gradient that has a graph."""
    slope = torch.stack(
        [(part * v).sum().double() for part, v in zip(gradient, probe, strict=True) if part is not None]
    ).sum()
    if not slope.requires_grad:  # a loss that is linear in the weights has no second derivative
        return 0.0
    curved = torch.autograd.grad(slope, weights, allow_unused=True, retain_graph=keep_graph)
    return sum(
        float((part.double() * v.double()).sum()) for part, v in zip(curved, probe, strict=True) if part is not None
    )


def _need_batches(batches: Sequence[Any]) -> None:
    if not len(batches):
        raise RobustnessError("batches is empty: a loss needs examples.")
