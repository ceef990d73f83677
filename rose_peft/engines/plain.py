"""Plain PyTorch, and DDP: the optimizer holds the parameters themselves, whole."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ..errors import UnsupportedEngineError
from ..optimizers import owned_groups
from .seam import Group, Part, Turn


class Plain:
    """
    The parameters are what is stepped.

    Args:
        host: The module whose forward call is observed.
    """

    splits = False
    gathers = False
    optimizer: Optimizer | None = None

    def __init__(self, host: nn.Module) -> None:
        self._host = host
        self.process_groups: list[dist.ProcessGroup] = []

    def groups(self, optimizer: Optimizer) -> dict[int, Group]:
        """As the optimizer has them."""
        return owned_groups(optimizer)

    def turn(self, optimizer: Optimizer) -> Turn:
        """One call is one step."""
        return Turn()

    def steps(self, param: Tensor) -> bool:
        """Those with a gradient."""
        return param.grad is not None

    def part(self, param: Tensor) -> Part:
        """All of it, or the shard that the optimizer holds."""
        return Part(param)

    def gradient(self, param: Tensor) -> Tensor:
        """The parameter's own."""
        assert param.grad is not None
        return param.grad

    def before_forward(self, parameters: Sequence[Tensor], paired: bool) -> None:
        """Look for DDP, which runs the module inside and leaves no mark on it but this one, for compilers."""
        ddp = getattr(DistributedDataParallel, "_active_ddp_module", None)
        if ddp is not None and not self.process_groups and any(module is self._host for module in ddp.modules()):
            self.process_groups = [ddp.process_group]
        elif ddp is None and not self.process_groups and _reduces_in_python():
            raise UnsupportedEngineError(
                "torch._dynamo.config.optimize_ddp='python_reducer' hides from ROSE which processes train the model. "
                "Leave it at its default (True)."
            )

    def require_whole(self, parameters: Sequence[Tensor]) -> None:
        """Accept: parameters are whole."""

    def whole_parameters(self) -> AbstractContextManager[None]:
        """Nothing to do: parameters are whole."""
        return nullcontext()

    def discarded(self) -> bool | None:
        """Users throw gradients away without a word."""
        return None

    def gradient_holders(self, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
        """The parameters."""
        return parameters

    @property
    def sees_backward(self) -> bool:
        """Users call it."""
        return False

    def close(self) -> None:
        """There is nothing on the model."""


def refuse_wrapped(host: nn.Module) -> None:
    """Refuse a model around which DDP is already: it is seen from inside only.

    Args:
        host: The module whose forward call is to be observed.

    Raises:
        UnsupportedEngineError: If one of its modules is DDP's.
    """
    if any(isinstance(module, DistributedDataParallel) for module in host.modules()):
        raise UnsupportedEngineError(
            "attach_rose got a model that DistributedDataParallel is around, where it cannot tell which processes "
            "train it. Attach ROSE to the model inside, attach_rose(model.module, config), or before "
            "accelerator.prepare."
        )


def _reduces_in_python() -> bool:
    """Whether DDP would call the module without a mark."""
    config = sys.modules.get("torch._dynamo.config")
    mode = str(getattr(config, "optimize_ddp", ""))
    return mode.startswith("python_reducer") and dist.is_initialized() and dist.get_world_size() > 1
