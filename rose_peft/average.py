"""What the risk passes of a step said, and the smoothed average of sampled ones, as the whole batch would have it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RiskFigures:
    """What the risk passes of one step said, summed over all processes.

    Args:
        square_sum: Squared norms, float64 [U].
        gradient_sum: Gradients of units that are vectors, one after the other, float64 [V]; of sampled passes only.
        more_rows: Sum over the finite passes of how many times more rows the batch had, less one.
        finite: Number of passes whose gradient was finite.
        skipped: Number of passes whose gradient was not.
        equal: Number of passes whose outputs were equal, but for rounding where both were one call.
        whole: Number of sampled passes that took the whole batch.
        bypassed: Number of processes whose gradients come from calls that went past the hook.
    """

    square_sum: Tensor
    gradient_sum: Tensor
    more_rows: float = 0
    finite: float = 0
    skipped: float = 0
    equal: float = 0
    whole: float = 0
    bypassed: float = 0

    @property
    def passes(self) -> float:
        """Number of passes, finite or not."""
        return self.finite + self.skipped


def owners_of(vectors: Tensor, sizes: Tensor) -> Tensor:
    """The unit of each weight of the units that are vectors, int64 [V].

    Args:
        vectors: Whether a unit is one, bool [U].
        sizes: Number of weights of each unit, int64 [U].
    """
    return vectors.nonzero().flatten().repeat_interleave(sizes[vectors])


@dataclass(frozen=True)
class RiskAverage:
    """
    What the sampled passes of a training said so far, recent ones more; on the CPU, the same on all processes.

    Of a gradient over b rows, the part that all rows have in common is as large over any number of rows, and what they
    differ in has a square that falls as 1/b. Gradients of matrices are all of the second kind, so their norms over a
    few rows rank them as the whole batch would. Gradients of vectors, such as norm weights, are of both; how much of
    each shows in the inner products of gradients of different passes, so of vectors the gradients are kept too.

    Args:
        linear: Weighted sums over steps, float64 [3, U]: of mean squared norms, of weights, and of how many times more
            rows the batch has than a pass, less one.
        quadratic: Sums with squared weights, float64 [2, U]: of squared norms of mean gradients of vectors, and of
            weights.
        gradients: Weighted sums of the mean gradients of vectors, one after the other, float64 [V].
        owners: The unit that each entry of `gradients` belongs to, int64 [V].
    """

    linear: Tensor
    quadratic: Tensor
    gradients: Tensor
    owners: Tensor

    @staticmethod
    def empty(units: int, owners: Tensor) -> RiskAverage:
        """That of no pass.

        Args:
            units: Number of units U.
            owners: The unit of each weight of units that are vectors, int64 [V].
        """
        linear, quadratic, gradients = (
            torch.zeros(size, dtype=torch.float64, device="cpu") for size in ((3, units), (2, units), (len(owners),))
        )
        return RiskAverage(linear, quadratic, gradients, owners)

    def after(self, risk: RiskFigures, smoothing: float) -> RiskAverage:
        """The average after one more step; a unit that none of its passes has reached keeps its own.

        Args:
            risk: What the passes of the step said; it has one at least that was finite.
            smoothing: Weight of the past, in [0, 1).
        """
        mean, gradients = risk.square_sum / risk.finite, risk.gradient_sum / risk.finite
        ones = torch.ones_like(mean)
        linear = torch.stack([mean, ones, risk.more_rows / risk.finite * ones])
        quadratic = torch.stack([self._per_unit(gradients.square()), ones])
        reached, new = mean > 0, 1 - smoothing
        return RiskAverage(
            torch.where(reached, smoothing * self.linear + new * linear, self.linear),
            torch.where(reached, smoothing**2 * self.quadratic + new**2 * quadratic, self.quadratic),
            torch.where(reached[self.owners], smoothing * self.gradients + new * gradients, self.gradients),
            self.owners,
        )

    def squares(self) -> Tensor | None:
        """Squared norms as the whole batch would have them, all multiplied by how many times more rows that has.

        Returns:
            float64 [U], zero for units that no pass has reached yet; None where there is none.
        """
        sums, weights, more_rows = self.linear
        gradient_squares, weight_squares = self.quadratic
        if not bool(weights.any()):
            return None
        known = weights > 0
        mean = torch.where(known, sums / weights, 0)
        # Over pairs of passes i != j, with their weights w:  sum wi wj <gi, gj> = |sum w g|^2 - sum w^2 |g|^2, and
        # sum wi wj = (sum w)^2 - sum w^2. One pass alone has no pairs, but for rounding.
        products, pairs = self._per_unit(self.gradients.square()) - gradient_squares, weights**2 - weight_squares
        common = torch.where(pairs > 1e-9 * weights**2, products / pairs, 0)
        return mean + torch.where(known, more_rows / weights, 0) * torch.minimum(common.clamp(min=0), mean)

    def _per_unit(self, values: Tensor) -> Tensor:
        return torch.zeros_like(self.linear[0]).index_add(0, self.owners, values)
