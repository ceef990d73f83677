"""What a step is decided by, and the decision: pure, on the CPU, the same on all processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import masks
from .config import ROSEConfig
from .masks import Ranking
from .scores import Facts, Scores


@dataclass(frozen=True)
class RiskFigures:
    """What the risk passes of one step said, summed over all processes.

    Args:
        square_sum: Squared norms, float64 [U].
        finite: Number of passes whose gradient was finite.
        skipped: Number of passes whose gradient was not.
        equal: Number of passes whose outputs were equal, but for rounding where both were one call.
        whole: Number of sampled passes that took the whole batch.
        bypassed: Number of processes whose gradients come from calls that went past the hook.
    """

    square_sum: Tensor
    finite: float = 0
    skipped: float = 0
    equal: float = 0
    whole: float = 0
    bypassed: float = 0

    @property
    def passes(self) -> float:
        """Number of passes, finite or not."""
        return self.finite + self.skipped


@dataclass(frozen=True)
class Decision:
    """What was decided for one step; it is recorded once the optimizer has stepped.

    Args:
        masks: What acts, float32 [U].
        stepped: Units that have a gradient, bool [U].
        first: The first-order ranking, or None without a new one.
        second: The second-order ranking, or None without one.
        risk: What the risk passes said, or None without any.
        average: The smoothed mean squares and their weights after this step, [2, U], or None where they stay.
        unmatched: Units with a gradient that second order has nothing to compare with, bool [U]; None without it.
    """

    masks: Tensor
    stepped: Tensor
    first: Ranking | None = None
    second: Ranking | None = None
    risk: RiskFigures | None = None
    average: Tensor | None = None
    unmatched: Tensor | None = None


@dataclass(frozen=True)
class Gathered:
    """What a step is decided by.

    Args:
        facts: What is known of the step.
        first_norms: float64 [U] for each list of tensors that the first-order score asked for.
        second_norms: float64 [U] for each list of tensors that the second-order score asked for.
        risk: What the risk passes said, or None for strategies without any.
        ungraded: Units without a gradient in this step, bool [U].
        last_first_mask: First-order mask of the last step, float32 [U].
        average: The smoothed mean squares and their weights after this step, [2, U], or None where they stay.
        planned: The first-order ranking that was made before the step, or None.
    """

    facts: Facts
    first_norms: Sequence[Tensor]
    second_norms: Sequence[Tensor]
    risk: RiskFigures | None
    ungraded: Tensor
    last_first_mask: Tensor
    average: Tensor | None = None
    planned: Ranking | None = None


def smooth(average: Tensor, mean: Tensor, smoothing: float) -> Tensor:
    """Put new mean squares into a smoothed average, for units that the passes have reached.

    Args:
        average: Weighted sums and the sums of their weights, float64 [2, U]; the sums over the weights are the
            bias-corrected average.
        mean: Mean squared norms of this step's passes, float64 [U]; zero for units that none has reached.
        smoothing: Weight of the past, in [0, 1).
    """
    new = smoothing * average + (1 - smoothing) * torch.stack([mean, torch.ones_like(mean)])
    return torch.where(mean > 0, new, average)


def averaged(average: Tensor) -> Tensor | None:
    """The bias-corrected average, float64 [U], zero for units that no pass has reached yet; None where there is none.

    Args:
        average: As `smooth` makes it.
    """
    sums, weights = average
    return torch.where(weights > 0, sums / weights, torch.zeros_like(sums)) if bool(weights.any()) else None


def decide(config: ROSEConfig, scores: Scores, gathered: Gathered) -> Decision:
    """Make the masks of a step out of what was gathered.

    Args:
        config: The settings.
        scores: What units are ranked by.
        gathered: What is known.
    """
    facts = gathered.facts
    band = config.lower_quantile, config.upper_quantile
    first_mask = second_mask = first = second = unmatched = None
    if config.needs_risk_pass:
        if gathered.planned is not None:
            first = gathered.planned
        elif facts.risk is not None:
            values, unscored = scores.first_order.score(gathered.first_norms, facts)
            first = masks.rank(values, unscored, gathered.ungraded, *band)
        # Without a finite pass the last mask stays.
        first_mask = first.mask if first is not None else gathered.last_first_mask
    if config.needs_momentum:
        values, unscored = scores.second_order.score(gathered.second_norms, facts)
        unmatched, unscored = unscored & ~gathered.ungraded, unscored | gathered.ungraded
        if not bool(unscored.all()):  # else it is the first step: there is nothing to compare with
            second = masks.rank(values, unscored, gathered.ungraded, *band)
        second_mask = second.mask if second is not None else torch.ones(len(facts.units), device="cpu")
    mask = masks.mix_or_either(first_mask, second_mask, config.gamma)
    if facts.steps < config.warmup_steps:
        mask = torch.ones_like(mask)
    return Decision(mask, ~gathered.ungraded, first, second, gathered.risk, gathered.average, unmatched)
