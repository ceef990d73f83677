"""Whether an optimizer shows the momentum of what it has stepped for the first time, and whether that is one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .errors import UnsupportedOptimizerError
from .norms import local_part, norms_of, squares
from .optimizers import is_guessed, momentum_rule
from .scores import Stepping


@dataclass(frozen=True)
class Beginning:
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


def beginning(entries: Sequence[Stepping], loss_scale: float) -> Beginning:
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
    return Beginning(
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


def require_momentum(begun: Beginning) -> None:
    """Refuse an optimizer that has stepped parameters and shows no momentum of them, or none that averages gradients.

    Of the first nothing would ever be ranked; beside the other's, gradients say nothing.

    Args:
        begun: What a step that was just taken began with.

    Raises:
        UnsupportedOptimizerError: Naming where it was looked for.
    """
    way_out = "with register_momentum_rule, or use torch.optim.AdamW, or strategy='first_order'."
    for entry in begun.entries:
        if entry.momentum is None:
            raise UnsupportedOptimizerError(
                f"{type(entry.optimizer).__name__} has stepped and shows no momentum of what it has stepped under "
                f"state[parameter][{entry.rule.key!r}], so new gradients cannot be compared with it. Tell ROSE where "
                f"it is {way_out}"
            )
    guessed = _guessed(begun.entries)
    momenta = [momentum for entry in guessed if (momentum := entry.momentum) is not None]
    found = _norm(momenta, [1.0] * len(momenta))
    # Zero: it begins with a later step. What weight decay adds may be all of it.
    least, most = begun.entering / _FAR, _FAR * (begun.entering + begun.decaying)
    if found and math.isfinite(begun.entering) and (found < least or found > most):  # not finite: says nothing
        entry = guessed[0]
        raise UnsupportedOptimizerError(
            f"{type(entry.optimizer).__name__} does not average gradients under state[parameter][{entry.rule.key!r}]: "
            f"after the step that it begins with the norm there is {found:.3g}, where gradients would have made "
            f"{begun.entering:.3g}. Masks by second order and the ensemble would mean nothing. Tell ROSE how it "
            f"keeps its momentum {way_out}"
        )
