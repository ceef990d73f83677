"""What a step is decided by, and the decision: pure, on the CPU, the same on all processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import masks
from .average import RiskAverage, RiskFigures
from .config import ROSEConfig
from .masks import Ranking
from .scores import Facts, Scores


@dataclass(frozen=True)
class Decision:
    """What was decided for one step; it is recorded once the optimizer has stepped.

    Args:
        masks: What acts, float32 [U].
        stepped: Units that have a gradient, bool [U].
        first: The first-order ranking, or None without a new one.
        second: The second-order ranking, or None without one.
        risk: What the risk passes said, or None without any.
        average: The average of sampled passes after this step, or None where it stays.
        unmatched: Units with a gradient that second order has nothing to compare with, bool [U]; None without it.
    """

    masks: Tensor
    stepped: Tensor
    first: Ranking | None = None
    second: Ranking | None = None
    risk: RiskFigures | None = None
    average: RiskAverage | None = None
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
        average: The average of sampled passes after this step, or None where it stays.
        planned: The first-order ranking that was made before the step, or None.
    """

    facts: Facts
    first_norms: Sequence[Tensor]
    second_norms: Sequence[Tensor]
    risk: RiskFigures | None
    ungraded: Tensor
    last_first_mask: Tensor
    average: RiskAverage | None = None
    planned: Ranking | None = None


def risk_squares(
    config: ROSEConfig, average: RiskAverage, risk: RiskFigures | None
) -> tuple[Tensor | None, RiskAverage | None]:
    """The squared norms that first order ranks by.

    Args:
        config: The settings.
        average: That of sampled passes before this step.
        risk: What the risk passes of this step said, or None without any.

    Returns:
        float64 [U], or None while no finite pass is known; and the average after this step, None with paired passes.
    """
    finite = risk if risk is not None and risk.finite > 0 else None
    if not config.needs_risk_pass or config.risk_pass == "paired":
        return None if finite is None else finite.square_sum / finite.finite, None
    after = average if finite is None else average.after(finite, config.risk_smoothing)
    return after.squares(), after


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
        # Paired passes of which none was finite leave the last mask; the average of sampled ones always ranks anew.
        first_mask = first.mask if first is not None else gathered.last_first_mask
    if config.needs_momentum:
        values, unscored = scores.second_order.score(gathered.second_norms, facts)
        unmatched = unscored & ~gathered.ungraded  # a gradient, and no momentum to compare it with
        unscored = unscored | gathered.ungraded
        if not bool(unscored.all()):  # else it is the first step
            second = masks.rank(values, unscored, gathered.ungraded, *band)
        second_mask = second.mask if second is not None else torch.ones(len(facts.units), device="cpu")
    mask = masks.mix_or_either(first_mask, second_mask, config.gamma)
    if facts.steps < config.warmup_steps:
        mask = torch.ones_like(mask)
    return Decision(mask, ~gathered.ungraded, first, second, gathered.risk, gathered.average, unmatched)
