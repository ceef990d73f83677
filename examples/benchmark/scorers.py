"""Other scores in place of ROSE's own: a random baseline, and ideas that must prove themselves to become options.

What these found is in results/README.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from rose_peft import Facts, FirstOrder, Scores, Stepping, get_selector
from rose_peft.scores import fresh_factors


class RandomScores:
    """Keeps as many units as second order would, at random: does it matter which ones are frozen?

    Args:
        seed: Seed of the run; scores depend on it and on the step alone, so that all ranks and resumed runs draw the
            same.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def tensors(self, stepping: Sequence[Stepping]) -> Sequence[Sequence[tuple[int, Tensor]]]:
        """None."""
        return ()

    def score(self, norms: Sequence[Tensor], facts: Facts) -> tuple[Tensor, Tensor]:
        """Draw; second order cannot rank anything in its first step, and this neither."""
        generator = torch.Generator().manual_seed(1_000_003 * self._seed + facts.steps)
        scores = torch.rand(len(facts.units), generator=generator)
        return scores.to(facts.dtype), torch.full((len(facts.units),), facts.steps == 0)


class MomentumChange:
    """Scores a unit by the relative change of its momentum, norm(m_t - m_(t-1)) / norm(m_(t-1))."""

    def tensors(self, stepping: Sequence[Stepping]) -> Sequence[Sequence[tuple[int, Tensor]]]:
        """Whole differences, not differences of norms: a gradient that turns around is a change too."""
        known = [(entry, entry.momentum) for entry in stepping]
        return (
            [(entry.index, entry.gradient - momentum) for entry, momentum in known if momentum is not None],
            [(entry.index, momentum) for entry, momentum in known if momentum is not None],
        )

    def score(self, norms: Sequence[Tensor], facts: Facts) -> tuple[Tensor, Tensor]:
        """Compare the change with the momentum before."""
        change, before = norms
        return fresh_factors(facts) * (change / before).to(facts.dtype), before == 0


class SizeNormalised(FirstOrder):
    """Divides first-order scores by the square root of a unit's size, so that small tensors are not kept for ever."""

    def score(self, norms: Sequence[Tensor], facts: Facts) -> tuple[Tensor, Tensor]:
        """Score by the root mean square over elements instead of the norm."""
        scores, unranked = super().score(norms, facts)
        return scores / facts.sizes.clamp(min=1).sqrt().to(facts.dtype), unranked


VARIANTS: dict[str, Callable[[int], Scores]] = {
    "random": lambda seed: Scores(second_order=RandomScores(seed)),
    "momentum_change": lambda seed: Scores(second_order=MomentumChange()),
    "size_normalised": lambda seed: Scores(first_order=SizeNormalised()),
}


def use_variant(model: nn.Module, name: str, seed: int) -> None:
    """Let the selector that `get_peft_model` attached rank by a variant.

    Args:
        model: A model that ROSE is attached to.
        name: One of `VARIANTS`.
        seed: Seed of the run, for the variant that draws.
    """
    get_selector(model).scores = VARIANTS[name](seed)
