"""A bare copy of a model that does by hand, with the same draws, what ROSE does to the one beside it.

Nothing of rose_peft decides here: scores, masks and steps are those of `tests.helpers.reference`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from rose_peft import ROSEConfig
from tests.helpers.reference import adamw_step, band, mix, second_order_score, sgd_step


@dataclass(frozen=True)
class Pass:
    """
    What one risk pass said.

    Args:
        squares: Squared norms by unit.
        vectors: Gradients of units that are vectors, by unit.
        more_rows: How many times more rows the batch had, less one.
    """

    squares: list[float]
    vectors: dict[int, Tensor]
    more_rows: float = 0.0


@dataclass
class Shadow:
    """One adapter of a bare model.

    Args:
        model: The model, without ROSE.
        config: The settings of the adapter.
        units: Names of the parameters of each unit, in the order of the masks.
        options: Of the optimizer: those of AdamW have `betas`, those of SGD `momentum`.
        memory: Of the optimizer, by parameter.
        trained: Names of the adapter's parameters.
    """

    model: nn.Module
    config: ROSEConfig
    units: list[list[str]]
    options: dict[str, Any]
    memory: dict[str, dict[str, Any]]
    trained: list[str]
    steps: int = 0
    window: list[Pass] = field(default_factory=list)
    past: list[list[Pass]] = field(default_factory=list)  # of sampled passes the means of each step, by unit
    backward_seen: bool = False
    first_mask: list[float] = field(default_factory=list)
    plan: list[float] | None = None

    def __post_init__(self) -> None:
        everything = dict(self.model.named_parameters())
        self.parameters = {name: everything[name] for name in self.trained}
        self.unit_of = {name: index for index, names in enumerate(self.units) for name in names}
        self.first_mask = [1.0] * len(self.units)
        self.past = [[] for _ in self.units]

    # The forward side ------------------------------------------------------------------------------------------------

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        """What the loss of a training call should be, and the risk passes of that call."""
        config = self.config
        if config.skip_frozen_gradients and self.plan is None and self.steps >= config.warmup_steps and any(self.past):
            self.plan = self._first_ranking(self._smoothed(self.past), [not self.trains(unit) for unit in self.units])
        if self.is_due() and config.risk_pass == "paired":
            self._forget_discarded()
            first, second = self.model(x, labels=labels), self.model(x, labels=labels)
            self.window.append(self._risk(_divergence(first.logits, second.logits)))
            return (first.loss + second.loss) / 2
        with self._held_back():
            loss = self.model(x, labels=labels).loss
        if self.is_due():
            with _draws_aside():
                count = math.ceil(config.risk_fraction * len(x))
                rows = [row * len(x) // count for row in range(count)] * 2
                first, second = self.model(x[rows]).logits.chunk(2)
            self.window.append(self._risk(_divergence(first, second), len(x) / count - 1))
        return loss

    def is_due(self) -> bool:
        """Whether a training call has a risk pass now."""
        config = self.config
        if config.strategy == "second_order":
            return False
        return config.risk_pass == "paired" or self.steps % config.risk_interval == 0

    def trains(self, unit: Sequence[str]) -> bool:
        """Whether any parameter of a unit trains."""
        return any(self.parameters[name].requires_grad for name in unit)

    @contextmanager
    def _held_back(self):
        masks = dict.fromkeys(range(len(self.units)), 1.0) if self.plan is None else dict(enumerate(self.plan))
        frozen = [unit for index, unit in enumerate(self.units) if masks[index] == 0 and self.trains(unit)]
        if len(frozen) == sum(map(self.trains, self.units)):
            frozen = []  # where everything would be frozen nothing is held back
        held = [self.parameters[name] for unit in frozen for name in unit if self.parameters[name].requires_grad]
        for param in held:
            param.requires_grad_(False)
        try:
            yield
        finally:
            for param in held:
                param.requires_grad_(True)

    def _forget_discarded(self) -> None:
        gradients = [self.parameters[name].grad for name in self.unit_of if self.parameters[name].requires_grad]
        if self.backward_seen and not any(grad is not None and bool(grad.any()) for grad in gradients):
            self.window = []
            self.backward_seen = any(grad is not None for grad in gradients)

    def _risk(self, divergence: Tensor, more_rows: float = 0.0) -> Pass:
        names = [name for name in self.unit_of if self.parameters[name].requires_grad]
        tensors = [self.parameters[name] for name in names]
        gradients = torch.autograd.grad(divergence, tensors, retain_graph=True, allow_unused=True)
        squares, vectors = [0.0] * len(self.units), {}
        for name, gradient in zip(names, gradients, strict=True):
            if gradient is not None:
                squares[self.unit_of[name]] += float(gradient.square().sum())
                if gradient.dim() == 1 and len(self.units[self.unit_of[name]]) == 1:
                    vectors[self.unit_of[name]] = gradient
        return Pass(squares, vectors, more_rows)

    # The step --------------------------------------------------------------------------------------------------------

    def step(self) -> list[float] | None:
        """Take a step; returns its masks, 0 for units without a gradient, or None where nothing has one."""
        graded = [any(self.parameters[name].grad is not None for name in unit) for unit in self.units]
        if not any(graded):
            return None
        if self.plan is not None:
            graded = [one or mask == 0 for one, mask in zip(graded, self.plan, strict=True)]
        first = self._first(graded)
        second = self._second(graded) if self.config.strategy != "first_order" else first
        masks = {"first_order": first, "second_order": second, "ensemble": mix(first, second, self.config.gamma)}
        mask = masks[self.config.strategy] if self.steps >= self.config.warmup_steps else [1.0] * len(self.units)
        with torch.no_grad():
            for name, param in self.parameters.items():
                if param.grad is not None:
                    share = float(numpy.float32(mask[self.unit_of[name]])) if name in self.unit_of else 1.0
                    rule = adamw_step if "betas" in self.options else sgd_step
                    memory = self.memory.setdefault(name, {})
                    param.copy_(rule(param, param.grad, memory, share, **self.options))
        self.steps += 1
        self.window, self.plan, self.backward_seen = [], None, False
        return [share if one else 0.0 for share, one in zip(mask, graded, strict=True)]

    def _first(self, graded: Sequence[bool]) -> list[float]:
        if self.config.strategy == "second_order":
            return self.first_mask
        squares = self._new_squares()
        if self.plan is not None:
            self.first_mask = self.plan
        elif squares is not None:
            self.first_mask = self._first_ranking(squares, [not one for one in graded])
        return self.first_mask

    def _new_squares(self) -> list[float] | None:
        """Mean squares of the passes of this step, or the smoothed ones of all steps; None where there are none."""
        passes, units = self.window, range(len(self.units))
        means = [sum(one.squares[unit] for one in passes) / max(1, len(passes)) for unit in units]
        if self.config.risk_pass == "paired":
            return means if passes else None
        for unit in units if self.is_due() else ():
            if means[unit] > 0:
                gradients = [one.vectors[unit] for one in passes if unit in one.vectors]
                vectors = {unit: sum(gradients) / len(passes)} if gradients else {}
                more_rows = sum(one.more_rows for one in passes) / len(passes)
                self.past[unit].append(Pass([means[unit]], vectors, more_rows))
        return self._smoothed(self.past) if any(self.past) else None

    def _smoothed(self, past: Sequence[Sequence[Pass]]) -> list[float]:
        """As the whole batch would have them: what gradients of different passes have in common counts in full."""
        found = []
        for unit, passes in enumerate(past):
            weights = [self.config.risk_smoothing ** (len(passes) - 1 - index) for index in range(len(passes))]
            total = sum(weights)
            mean = sum(w * one.squares[0] for w, one in zip(weights, passes, strict=True)) / total if total else 0.0
            more = sum(w * one.more_rows for w, one in zip(weights, passes, strict=True)) / total if total else 0.0
            products = pairs = 0.0
            for i, one in enumerate(passes):
                for j, other in enumerate(passes):
                    if i != j and unit in one.vectors:
                        pairs += weights[i] * weights[j]
                        products += weights[i] * weights[j] * float(one.vectors[unit] @ other.vectors[unit])
            common = products / pairs if pairs > 1e-9 * total**2 else 0.0
            found.append(mean + more * min(max(common, 0.0), mean))
        return found

    def _first_ranking(self, squares: Sequence[float], absent: Sequence[bool]) -> list[float]:
        unranked = [square == 0 or missing for square, missing in zip(squares, absent, strict=True)]
        levels = self.config.lower_quantile, self.config.upper_quantile
        return band([math.sqrt(square) for square in squares], *levels, unranked)[0]

    def _second(self, graded: Sequence[bool]) -> list[float]:
        fresh = 1 - self.options["betas"][0] if "betas" in self.options else 1.0
        scores, unranked = [], []
        for unit, has_one in zip(self.units, graded, strict=True):
            parameters = {name: self.parameters[name] for name in unit if self.parameters[name].grad is not None}
            gradient = _norm([param.grad for param in parameters.values()])
            momentum = _norm([self.memory.get(name, {}).get("m") for name in parameters])
            unranked.append(not has_one or gradient == 0 or momentum == 0)
            scores.append(0.0 if unranked[-1] else second_order_score(gradient, momentum, fresh))
        if all(unranked):
            return [1.0] * len(self.units)
        return band(scores, self.config.lower_quantile, self.config.upper_quantile, unranked)[0]


def _divergence(first: Tensor, second: Tensor) -> Tensor:
    p, q = first.log_softmax(-1), second.log_softmax(-1)
    return ((p.exp() - q.exp()) * (p - q)).sum() / 4


def _norm(tensors: Sequence[Tensor | None]) -> float:
    return math.sqrt(sum(float(tensor.square().sum()) for tensor in tensors if tensor is not None))


@contextmanager
def _draws_aside():
    """Draw from a seed that follows from the state of the generator, and leave that as it was."""
    state = torch.get_rng_state()
    digest = hashlib.blake2b(state.numpy().tobytes(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") % 2**63)
    try:
        yield
    finally:
        torch.set_rng_state(state)
