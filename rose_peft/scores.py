"""A score per unit, small meaning robust: the two of ROSE, behind a Protocol for those that users bring."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from .engines.seam import Engine, Group, Part
from .masks import second_order_scores
from .optimizers import MomentumRule, momentum_of, momentum_rule, no_momentum


@dataclass(frozen=True)
class Stepping:
    """One parameter of a unit that is about to be stepped.

    Args:
        index: Its unit's.
        param: The parameter.
        optimizer: Who steps it.
        group: Its parameter group.
        engine: What is around the model.
    """

    index: int
    param: Tensor
    optimizer: torch.optim.Optimizer
    group: Group
    engine: Engine

    @property
    def part(self) -> Part:
        """What this process steps of it: all of it, unless an engine splits it."""
        return self.engine.part(self.param)

    @property
    def gradient(self) -> Tensor:
        """This part's gradient as the optimizer gets it: clipped, and still scaled where a fused one unscales."""
        return self.engine.gradient(self.param)

    @property
    def rule(self) -> MomentumRule:
        """How the optimizer keeps the momentum.

        Raises:
            UnsupportedOptimizerError: If it keeps none.
        """
        rule = momentum_rule(self.optimizer, self.group)
        if rule is None:
            raise no_momentum(self.optimizer, self.group)
        return rule

    @property
    def momentum(self) -> Tensor | None:
        """This part's momentum before the step, or None where there is no state yet.

        Raises:
            UnsupportedOptimizerError: If the optimizer keeps none, or none that can be read.
        """
        return momentum_of(self.optimizer, self.part, self.rule)


@dataclass(frozen=True)
class Facts:
    """What is known of a step besides the norms that a score asked for.

    Args:
        units: Names of the units, U of them.
        sizes: Number of weights of each unit, float64 [U].
        stepping: The parameters of units that have a gradient in this step.
        steps: Number of masked steps taken before this one.
        risk: Mean squared norms of the divergence gradients, float64 [U], zero for units that none has reached; of
            sampled passes as the whole batch would have them, but for a common factor. None while no finite pass is
            known.
        loss_scale: Scale that the gradients still carry.
        dtype: In which the scores are ranked, float32 or float64.
    """

    units: Sequence[str]
    sizes: Tensor
    stepping: Sequence[Stepping]
    steps: int
    risk: Tensor | None
    loss_scale: float
    dtype: torch.dtype


def ranking_dtype(param: Tensor) -> torch.dtype:
    """In which dtype scores are ranked, as published: float64 for a model in float64, else float32.

    Args:
        param: A parameter of the model.
    """
    return torch.float64 if param.dtype == torch.float64 else torch.float32


class Score(Protocol):
    """
    Scores the units of one step: first says which norms it needs, then makes numbers of them.

    A second-order score that is not a `SecondOrder` says itself where the optimizer's momentum is no average of
    gradients; for that class and those derived from it this is looked at after the first step.
    """

    def tensors(self, stepping: Sequence[Stepping]) -> Sequence[Sequence[tuple[int, Tensor]]]:
        """Lists of (unit index, tensor) whose norms per unit are wanted; they are taken and fetched together.

        The norm of a unit is that of all its tensors in a list, taken as one vector.

        Args:
            stepping: The parameters of units that have a gradient in this step. Empty where `skip_frozen_gradients`
                asks before the step has begun; a score that wants tensors all the same is refused there.
        """
        ...

    def score(self, norms: Sequence[Tensor], facts: Facts) -> tuple[Tensor, Tensor]:
        """Score the units.

        Args:
            norms: float64 [U] on the CPU for each list that `tensors` returned.
            facts: What else is known.

        Returns:
            Non-negative scores in `facts.dtype` [U], and units that cannot be ranked and are kept, bool [U].
        """
        ...


class FirstOrder:
    """Scores a unit by the norm of the gradient of the dropout divergence (section 3.3 step 4 of the reference)."""

    def tensors(self, stepping: Sequence[Stepping]) -> Sequence[Sequence[tuple[int, Tensor]]]:
        """No tensors: the risk passes have their norms already."""
        return ()

    def score(self, norms: Sequence[Tensor], facts: Facts) -> tuple[Tensor, Tensor]:
        """Take the root mean square over the passes; a unit that none has reached has nothing to be ranked by."""
        assert facts.risk is not None
        return facts.risk.sqrt().to(facts.dtype), facts.risk == 0


class SecondOrder:
    """Scores a unit by its new gradient against its momentum (section 3.3 step 4 of the reference)."""

    def tensors(self, stepping: Sequence[Stepping]) -> Sequence[Sequence[tuple[int, Tensor]]]:
        """Gradients and momenta."""
        rules = rules_of(stepping)
        momenta = [
            (entry.index, momentum_of(entry.optimizer, entry.part, rules[id(entry.group)])) for entry in stepping
        ]
        return (
            [(entry.index, entry.gradient) for entry in stepping],
            [(index, momentum) for index, momentum in momenta if momentum is not None],
        )

    def score(self, norms: Sequence[Tensor], facts: Facts) -> tuple[Tensor, Tensor]:
        """Compare norms; a unit without momentum has nothing to be compared with, one without gradient nothing to
        compare: an expert that no token went to, where it has a gradient of zeros, would rank as a jump."""
        gradients, momenta = norms
        scores = second_order_scores(
            (gradients / facts.loss_scale).to(facts.dtype), momenta.to(facts.dtype), fresh_factors(facts)
        )
        return scores, (momenta == 0) | (gradients == 0)


def fresh_factors(facts: Facts) -> Tensor:
    """Factor with which each unit's gradient enters its momentum, in `facts.dtype` [U]; 1 for units without gradient.

    Args:
        facts: What is known of the step.
    """
    rules = rules_of(facts.stepping)
    fresh = [1.0] * len(facts.units)  # a list: writing numbers into a tensor one by one takes ten times as long
    for entry in facts.stepping:
        fresh[entry.index] = rules[id(entry.group)].fresh
    return torch.tensor(fresh, dtype=torch.float64, device="cpu").to(facts.dtype)


def rules_of(stepping: Sequence[Stepping]) -> dict[int, MomentumRule]:
    """The momentum rule of each parameter group, by its identity, read once for all of its parameters.

    Args:
        stepping: Parameters of one optimizer.

    Raises:
        UnsupportedOptimizerError: If a group keeps no momentum.
    """
    return {key: entry.rule for key, entry in {id(entry.group): entry for entry in stepping}.items()}


@dataclass(frozen=True)
class Scores:
    """The scores that a selector ranks by; each strategy uses its own, the ensemble both.

    Args:
        first_order: Ranked by the strategies "first_order" and "ensemble".
        second_order: Ranked by the strategies "second_order" and "ensemble".
    """

    first_order: Score = field(default_factory=FirstOrder)
    second_order: Score = field(default_factory=SecondOrder)
