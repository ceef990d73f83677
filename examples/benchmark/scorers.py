"""Other scores in place of ROSE's own: a random baseline, and ideas that must prove themselves to become options.

What these found is in results/README.md.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rose_peft import get_selector
from rose_peft.selector import RoseSelector

Scored = list[tuple[int, Tensor, Tensor | None]]


class RandomScores(RoseSelector):
    """Keeps as many units as second order would, at random: does it matter which ones are frozen?"""

    seed = 0

    def second_order_scores(self, tensors: Scored, fresh: Tensor, loss_scale: float) -> tuple[Tensor, Tensor]:
        """Draw scores that depend on seed and step alone, so that all ranks and resumed runs draw the same."""
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + int(self.state.steps))
        scores = torch.rand(len(self.units), generator=generator)
        return scores.to(fresh.dtype), torch.zeros(len(self.units), dtype=torch.bool)


class MomentumChange(RoseSelector):
    """Scores a unit by the relative change of its momentum, norm(m_t - m_(t-1)) / norm(m_(t-1))."""

    def second_order_scores(self, tensors: Scored, fresh: Tensor, loss_scale: float) -> tuple[Tensor, Tensor]:
        """Compare whole tensors, not their norms: a gradient that turns around is a change too."""
        known = [(index, grad, momentum) for index, grad, momentum in tensors if momentum is not None]
        change, before = self.unit_norms(
            [(index, grad / loss_scale - momentum) for index, grad, momentum in known],
            [(index, momentum) for index, _, momentum in known],
        )
        return fresh * (change / before).to(fresh.dtype), before == 0


class SizeNormalised(RoseSelector):
    """Divides first-order scores by the square root of a unit's size, so that small tensors are not kept for ever."""

    def first_order_scores(self, square_sum: Tensor, passes: float) -> Tensor:
        """Score by the root mean square over elements instead of the norm."""
        sizes = torch.tensor([sum(param.numel() for param in unit.parameters()) for unit in self.units])
        return super().first_order_scores(square_sum, passes) / sizes.clamp(min=1).sqrt()


VARIANTS: dict[str, type[RoseSelector]] = {
    "random": RandomScores,
    "momentum_change": MomentumChange,
    "size_normalised": SizeNormalised,
}


def use_variant(model: nn.Module, name: str, seed: int) -> None:
    """Put a variant in the place of the selector that `get_peft_model` attached.

    Args:
        model: A model that ROSE is attached to.
        name: One of `VARIANTS`.
        seed: Seed of the run, for the variant that draws.
    """
    selector = get_selector(model)
    selector.detach()
    successor = VARIANTS[name](selector.host, selector.model, selector.config)
    if isinstance(successor, RandomScores):
        successor.seed = seed
