"""From scores to masks: score formulas, the quantile band, and the mix. Pure functions of small tensors.

U is the number of units everywhere. A mask is a float32 vector of U numbers in [0, 1]: 1 updates the unit fully,
0 leaves it as it is.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def second_order_scores(grad_norms: Tensor, momentum_norms: Tensor, fresh: Tensor) -> Tensor:
    """Score each unit by how far its new gradient is from being an average contribution to the momentum.

    |fresh * norm(g) / norm(m) - 1|, section 3.3 step 4 of the reference, where `fresh` is the factor with which the
    gradient enters the momentum: 1 - beta1 for Adam, which is the published 0.1 at beta1 = 0.9.

    Args:
        grad_norms: Norms of the clipped task gradients, float [U].
        momentum_norms: Norms of the momentum before the step, float [U].
        fresh: Factors, float [U].

    Returns:
        float [U]; infinite or NaN where the momentum is zero.
    """
    return (fresh * grad_norms / momentum_norms - 1).abs()


def quantile_band(scores: Tensor, lower: float, upper: float, unranked: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Keep the units whose score lies between two quantiles, both inclusive (section 3.3 step 3 of the reference).

    The arithmetic follows the dtype of the scores, as published: linear interpolation at rank q (n - 1) of the n
    ranked scores. Two published accidents are mended. A non-finite score is left out of the ranking and its unit is
    frozen, instead of making both thresholds NaN, which froze every unit. A unit that cannot be ranked because there
    is nothing to compare with yet (no momentum, no gradient) is kept, or it would never get any.

    Args:
        scores: Non-negative scores, float32 or float64 [U]; small means robust.
        lower: Quantile in [0, 1) of the lower bound.
        upper: Quantile in (0, 1] of the upper bound.
        unranked: Units to keep without ranking them, bool [U].

    Returns:
        The mask of zeros and ones, float32 [U], and the thresholds (low, high) in the dtype of the scores, [2]; NaN
        where nothing could be ranked.
    """
    if unranked is None:
        unranked = torch.zeros_like(scores, dtype=torch.bool)
    ranked = torch.isfinite(scores) & ~unranked
    candidates = scores[ranked]
    if candidates.numel() == 0:
        return unranked.float(), scores.new_full((2,), float("nan"))
    thresholds = torch.quantile(candidates, torch.tensor([lower, upper], dtype=scores.dtype, device=scores.device))
    inside = ranked & (scores >= thresholds[0]) & (scores <= thresholds[1])
    return (inside | unranked).float(), thresholds


def mix(first: Tensor, second: Tensor, gamma: float) -> Tensor:
    """Mix both masks: gamma * first + (1 - gamma) * second, in float32 (section 3.3 step 4 of the reference).

    Args:
        first: First-order mask, float32 [U].
        second: Second-order mask, float32 [U].
        gamma: Weight of the first-order mask, in [0, 1].

    Returns:
        float32 [U] with values in {0, gamma, 1 - gamma, 1}.
    """
    weight = torch.tensor(gamma, dtype=torch.float32, device="cpu")
    # Where both masks keep a unit the sum is exactly 1: the rounding of 1 - gamma is too small to show in it.
    return weight * first + (1 - weight) * second


class Ranking(NamedTuple):
    """One score, ranked.

    Args:
        scores: Float [U].
        thresholds: (low, high) of the band, [2]; NaN where nothing could be ranked.
        mask: float32 [U] of zeros and ones.
        unscored: Units whose scores mean nothing, bool [U].
    """

    scores: Tensor
    thresholds: Tensor
    mask: Tensor
    unscored: Tensor


def rank(scores: Tensor, unscored: Tensor, ungraded: Tensor, lower: float, upper: float) -> Ranking:
    """Rank the units by one score and keep those inside the band, and those that cannot be ranked.

    Args:
        scores: Non-negative scores, float [U].
        unscored: Units whose scores mean nothing, bool [U].
        ungraded: Units without a gradient in this step, bool [U].
        lower: Quantile of the lower bound.
        upper: Quantile of the upper bound.
    """
    mask, thresholds = quantile_band(scores, lower, upper, unscored | ungraded)
    return Ranking(scores, thresholds, mask, unscored)


def mix_or_either(first: Tensor | None, second: Tensor | None, gamma: float) -> Tensor:
    """The mask of a step (section 3.3 step 4 of the reference): one of both, or the mix.

    Args:
        first: First-order mask, float32 [U], or None where the strategy has none.
        second: Second-order mask, float32 [U], or None where the strategy has none.
        gamma: Weight of the first-order mask in the mix.
    """
    if first is not None and second is not None:
        return mix(first, second, gamma)
    mask = first if first is not None else second
    assert mask is not None  # every strategy has a score
    return mask
