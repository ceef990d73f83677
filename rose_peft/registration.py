"""Making ROSE known to PEFT: the member `PeftType.ROSE`, the method, and the composed model's true type."""

from __future__ import annotations

from typing import Any

from peft import PeftModel, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook


def add_peft_type() -> None:
    """Add the member `PeftType.ROSE`; PEFT has no plug-in mechanism and accepts members of this enum only."""
    if "ROSE" in PeftType.__members__:
        return
    member = str.__new__(PeftType, "ROSE")
    member._name_, member._value_ = "ROSE", "ROSE"
    PeftType._member_names_.append("ROSE")
    PeftType._member_map_["ROSE"] = member
    PeftType._value2member_map_["ROSE"] = member
    # From Python 3.12 on members are looked up as class attributes; Enum forbids setting one the ordinary way.
    type.__setattr__(PeftType, "ROSE", member)


def register(config_cls: type, model_cls: type) -> None:
    """Register ROSE with PEFT, once.

    Args:
        config_cls: `ROSEConfig`.
        model_cls: `ROSEModel`.

    Raises:
        ImportError: If another package has registered a method of that name.
    """
    known: Any = PEFT_TYPE_TO_CONFIG_MAPPING.get(PeftType("ROSE"))
    if known is config_cls:
        return
    if known is not None:
        raise ImportError(
            f"peft already has a method ROSE, from {known.__module__}; use that one, or import rose_peft before it."
        )
    register_peft_method(name="rose", config_cls=config_cls, model_cls=model_cls, prefix="rose_")
    register_module_module_registration_hook(_correct_peft_type)


def _correct_peft_type(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
    """Give a PeftModel that was asked for ROSE over another method that method's type.

    `PeftModel.__init__` takes the type from the ROSEConfig before the tuner exists; adding further adapters and the
    model status go by it.
    """
    if name == "base_model" and isinstance(module, PeftModel) and getattr(module, "peft_type", None) == "ROSE":
        configs = getattr(submodule, "peft_config", None) or {}
        for config in configs.values():
            module.peft_type = config.peft_type
