"""Where a selector is noted on what it observes, and the refusal of a second one."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import nn

from .errors import AlreadyAttachedError
from .hooks import observers

# The attribute of a host under which its selector lies.
SELECTOR = "_rose_selector"


@runtime_checkable
class Attached(Protocol):
    """What steers a model."""

    host: nn.Module
    model: nn.Module

    def follow(self) -> None:
        """Keep up with the model, and let go of one whose adapter was merged or unloaded."""


def refuse_overlap(host: nn.Module, model: nn.Module) -> None:
    """Refuse a model of which a selector steers the whole, a part, or a whole around it.

    Args:
        host: Module whose forward call is to be observed.
        model: Base model, whose parameters are to be steered.

    Raises:
        AlreadyAttachedError: If there is one.
    """
    for observer in observers():
        if isinstance(observer, Attached):
            observer.follow()
            same = observer.model is model or observer.host is host
            inside = any(module is model for module in observer.model.modules())
            around = any(module is observer.model for module in model.modules())
            if SELECTOR in observer.host.__dict__ and (same or inside or around):
                raise AlreadyAttachedError(
                    f"ROSE is already attached to this {type(observer.model).__name__}"
                    f"{'' if same else ' (a part of the other model)'}; call detach_rose(model) before attaching it "
                    "again."
                )
