"""A score per unit, small meaning robust: the two of ROSE, behind a Protocol for those that users bring."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from .engines.seam import Engine, Group, Part
from .errors import UnsupportedOptimizerError
from .masks import second_order_scores
from .norms import local_part, norms_of, squares
from .optimizers import MomentumRule, is_guessed, momentum_of, momentum_rule, no_momentum


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
            sampled passes as the whole batch would have them, but for a common factor. None without a risk pass.
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


class Score(Protocol):
    """Scores the units of one step: first says which norms it needs, then makes numbers of them."""

    def tensors(self, stepping: Sequence[Stepping]) -> Sequence[Sequence[tuple[int, Tensor]]]:
        """Lists of (unit index, tensor) whose norms per unit are wanted; they are taken and fetched together.

        Args:
            stepping: The parameters of units that have a gradient in this step.
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
        """None: the risk passes have their norms already."""
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


@dataclass(frozen=True)
class Starting:
    """Parameters whose momentum begins with the step under way, and what it should be.

    Args:
        entries: Parameters without momentum yet that are not frozen.
        entering: Norm of their momentum after the step if it averages gradients, for those of guessed optimizers.
        decaying: Norm of what weight decay may add to it.
    """

    entries: Sequence[Stepping] = ()
    entering: float = 0.0
    decaying: float = 0.0


# A momentum that is so many times off is no average of gradients. Masks of a half and gradients that the optimizer
# centres or clips a little first stay within.
_FAR = 10.0


def without_momentum(stepping: Sequence[Stepping], stepped: Tensor) -> list[Stepping]:
    """The parameters that have no momentum yet, of optimizers that keep one.

    One of zeros is none either: some look at their first gradients only, and begin with a later step.

    Args:
        stepping: The parameters of units that have a gradient.
        stepped: The units to look at, bool [U].
    """
    chosen = set(stepped.nonzero().flatten().tolist())
    return [
        entry
        for entry in stepping
        if entry.index in chosen
        and momentum_rule(entry.optimizer, entry.group) is not None  # scores of users may do without
        and _is_nothing(entry)
    ]


def _is_nothing(entry: Stepping) -> bool:
    momentum = entry.momentum
    return momentum is None or (is_guessed(entry.optimizer) and not bool(local_part(momentum).any()))


def starting(entries: Sequence[Stepping], loss_scale: float) -> Starting:
    """What is known of momenta that begin with the coming step.

    Args:
        entries: The parameters without momentum that are not frozen.
        loss_scale: Scale that the gradients still carry.
    """
    guessed = _guessed(entries)
    fresh = [entry.rule.fresh for entry in guessed]
    decay = [
        factor * float(entry.group.get("weight_decay") or 0) for factor, entry in zip(fresh, guessed, strict=True)
    ]
    return Starting(
        entries,
        _norm([entry.gradient for entry in guessed], fresh) / loss_scale,
        _norm([entry.part.of(entry.part.holder) for entry in guessed], decay),
    )


def _guessed(entries: Sequence[Stepping]) -> list[Stepping]:
    return [entry for entry in entries if is_guessed(entry.optimizer)]


def _norm(tensors: Sequence[Tensor], factors: Sequence[float]) -> float:
    """Norm of many tensors taken as one vector, each multiplied with a factor; of shards the local part counts."""
    if not tensors:
        return 0.0
    square = squares(norms_of(local_part(tensor.detach()) for tensor in tensors))
    return float((square * square.new_tensor(factors).square()).sum().sqrt())


def require_momentum(starting: Starting) -> None:
    """Refuse an optimizer that has stepped parameters and shows no momentum of them, or none that averages gradients.

    Of the first nothing would ever be ranked; beside the other's, gradients say nothing.

    Args:
        starting: What a step that was just taken began with.

    Raises:
        UnsupportedOptimizerError: Naming where it was looked for.
    """
    way_out = "with register_momentum_rule, or use torch.optim.AdamW, or strategy='first_order'."
    for entry in starting.entries:
        if entry.momentum is None:
            raise UnsupportedOptimizerError(
                f"{type(entry.optimizer).__name__} has stepped and shows no momentum of what it has stepped under "
                f"state[parameter][{entry.rule.key!r}], so new gradients cannot be compared with it. Tell ROSE where "
                f"it is {way_out}"
            )
    guessed = _guessed(starting.entries)
    momenta = [momentum for entry in guessed if (momentum := entry.momentum) is not None]
    found = _norm(momenta, [1.0] * len(momenta))
    # Zero: it begins with a later step. What weight decay adds may be all of it.
    least, most = starting.entering / _FAR, _FAR * (starting.entering + starting.decaying)
    if found and math.isfinite(starting.entering) and (found < least or found > most):  # not finite: says nothing
        entry = guessed[0]
        raise UnsupportedOptimizerError(
            f"{type(entry.optimizer).__name__} does not average gradients under state[parameter][{entry.rule.key!r}]: "
            f"after the step that it begins with the norm there is {found:.3g}, where gradients would have made "
            f"{starting.entering:.3g}. Masks by second order and the ensemble would mean nothing. Tell ROSE how it "
            f"keeps its momentum {way_out}"
        )


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
