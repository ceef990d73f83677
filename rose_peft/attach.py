"""Attaching ROSE to a model by hand, taking it off again, and finding it."""

from __future__ import annotations

from peft import PeftModel
from torch import nn

from .config import ROSEConfig
from .errors import RoseError
from .selector import RoseSelector, find_selector
from .tuner import ROSEModel


def attach_rose(model: nn.Module, config: ROSEConfig) -> RoseSelector:
    """Let ROSE steer the training of a model that PEFT has already wrapped, or of a plain model.

    `get_peft_model(model, ROSEConfig(...))` does this by itself; use it for an adapter loaded with
    `is_trainable=True`, or for full fine-tuning without any wrapper.

    Args:
        model: A PeftModel with a trainable adapter, or any model. Must not be wrapped by DDP or FSDP yet.
        config: Settings; `base_config` is not needed, the adapter is there already.

    Returns:
        The selector, for `statistics()`.

    Raises:
        AlreadyAttachedError: If ROSE is attached.
        TargetModulesError: If there is nothing to mask.
    """
    if isinstance(model, PeftModel):
        tuner = model.base_model
        base = model.get_base_model()
        return RoseSelector(base if isinstance(tuner, ROSEModel) else tuner, base, config)
    return RoseSelector(model, model, config)


def detach_rose(model: nn.Module) -> None:
    """Take every hook of ROSE off a model; weights, adapters and requires_grad stay as they are.

    Args:
        model: A model that ROSE is attached to, wrapped or not.

    Raises:
        RoseError: If it is not.
    """
    get_selector(model).detach()


def get_selector(model: nn.Module) -> RoseSelector:
    """Find the selector that steers a model.

    Args:
        model: The model, wrapped or not.

    Raises:
        RoseError: If ROSE is not attached to it.
    """
    selector = find_selector(model)
    if selector is None:
        raise RoseError(
            f"ROSE is not attached to this {type(model).__name__}: use get_peft_model(model, ROSEConfig(...)) or "
            "attach_rose(model, config). Adapters loaded for inference, or saved over a base_config, come without it."
        )
    return selector
