"""What ROSE asks of an engine: which part of a parameter this process steps, where it lies, and whose turn it is."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

Group = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """What this process steps of one parameter.

    Args:
        holder: What the optimizer holds: it bears the gradient, and is the key of the optimizer's state.
        place: (start, number of elements) in the flattened holder; None where the holder is the parameter itself.
    """

    holder: Tensor
    place: tuple[int, int] | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """This part of a tensor that is shaped like the holder, without a copy.

        Args:
            tensor: The holder, its gradient, or a state of it.
        """
        return tensor if self.place is None else tensor.detach().view(-1).narrow(0, *self.place)

    @property
    def is_empty(self) -> bool:
        """Whether this process steps none of it."""
        return self.place is not None and self.place[1] == 0

    @property
    def gradient(self) -> Tensor:
        """The gradient as the optimizer gets it."""
        assert self.holder.grad is not None
        return self.of(self.holder.grad)


@dataclass(frozen=True)
class Turn:
    """One call of an optimizer's `step` within the step of an engine, which may make one for each parameter group.

    Args:
        first: Whether it is the first.
        last: Whether it is the last.
    """

    first: bool = True
    last: bool = True


class Engine(Protocol):
    """How one engine shows what ROSE reads and writes."""

    @property
    def splits(self) -> bool:
        """Whether parts are pieces that do not show it, so that their norms add up over processes."""
        ...

    @property
    def gathers(self) -> bool:
        """Whether a call of the model puts parameters together, so that all processes must call it equally often."""
        ...

    @property
    def process_groups(self) -> list[dist.ProcessGroup]:
        """The processes that train the model, as groups over which sums run one after the other."""
        ...

    @property
    def optimizer(self) -> Optimizer | None:
        """The torch optimizer inside the engine; None where users have their own in hand."""
        ...

    # Steps ----------------------------------------------------------------------------------------------------------

    def groups(self, optimizer: Optimizer) -> dict[int, Group]:
        """Map the identity of each parameter that an optimizer steps for the model to its group, in a fixed order."""
        ...

    def turn(self, optimizer: Optimizer) -> Turn:
        """Which of the calls of one step this is; asked as it begins."""
        ...

    def steps(self, param: Tensor) -> bool:
        """Whether the coming step moves a parameter."""
        ...

    def part(self, param: Tensor) -> Part:
        """What this process steps of a parameter; a part of no elements where that is nothing."""
        ...

    def gradient(self, param: Tensor) -> Tensor:
        """The gradient of this process's part as the step will get it, in the first turn for later ones too."""
        ...

    # Forward passes -------------------------------------------------------------------------------------------------

    def before_forward(self, parameters: Sequence[Tensor], paired: bool) -> None:
        """Get ready for a training pass.

        Args:
            parameters: The unit parameters as the modules show them now.
            paired: Whether paired risk passes are made in it.
        """
        ...

    def require_whole(self, parameters: Sequence[Tensor]) -> None:
        """Refuse a paired risk pass if parameters are not whole during the forward pass."""
        ...

    def whole_parameters(self) -> AbstractContextManager[None]:
        """A context in which a small pass beside the user's own sees whole parameters."""
        ...

    def discarded(self) -> bool | None:
        """Whether the gradients since the last step were thrown away; None where only the gradients tell."""
        ...

    def gradient_holders(self, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
        """Where gradients gather between a backward pass and the step."""
        ...

    @property
    def sees_backward(self) -> bool:
        """Whether the engine notes backward passes itself."""
        ...

    def close(self) -> None:
        """Take off what it has put on the model."""
        ...
