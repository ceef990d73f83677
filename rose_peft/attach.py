"""Attaching ROSE to a model by hand, taking it off again, and finding it."""

from __future__ import annotations

from dataclasses import MISSING, fields

import torch.distributed as dist
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers
from torch import nn

from .config import ROSEConfig
from .errors import RoseConfigError, RoseError
from .scores import Scores
from .selector import RoseSelector, find_selector
from .tuner import ROSEModel, own_copy, refuse_quantized
from .units import find_units, has_other_tuner

# What a PEFT config notes of where an adapter comes from, and modules that are spelled out when it is made.
_NOTES = {"base_model_name_or_path", "inference_mode", "revision", "task_type", "peft_version", "target_modules"}


def attach_rose(
    model: nn.Module,
    config: ROSEConfig,
    scores: Scores | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> RoseSelector:
    """Let ROSE steer the training of a model that PEFT has already wrapped, or of a plain model.

    `get_peft_model(model, ROSEConfig(...))` does this by itself; use it for an adapter loaded with
    `is_trainable=True`, or for full fine-tuning without any wrapper.

    Args:
        model: A PeftModel with a trainable adapter, or any model. Must not be wrapped by DDP or FSDP yet.
        config: Settings. Over an adapter its modules are the units: `base_config` is not needed, and may say nothing
            else than the adapter's own config; `target_modules` and `exclude_modules` are refused. A plain model
            trains in place, with `target_modules` as units and `modules_to_save` left unmasked. Never written to.
        scores: What units are ranked by, in place of ROSE's own scores; see `Scores`.
        process_group: The processes that train this model, where no engine around it (DDP, FSDP2, ZeRO) tells.

    Returns:
        The selector, for `statistics()`.

    Raises:
        AlreadyAttachedError: If ROSE is attached to the model, to a part of it or to a whole around it.
        RoseConfigError: If a field cannot be followed here.
        TargetModulesError: If there is nothing to mask.
        UnsupportedEngineError: If DDP is around the model already, or ZeRO-3 has split it.
        UnsupportedModelError: If a model without an adapter is quantized.
    """
    over_adapter = has_other_tuner(model)
    _check_config(config, over_adapter)
    if config.base_config is not None:
        _check_base_config(model, config.base_config)
    copies = isinstance(model, PeftModel) and isinstance(model.base_model, ROSEModel)
    if config.original_weights != "keep" and not copies:
        raise RoseConfigError(
            f"original_weights={config.original_weights!r} has no effect in attach_rose, which trains the model as it "
            "is and copies no weights; leave it out, or use get_peft_model(model, config)."
        )
    config = own_copy(config)
    if not over_adapter:
        refuse_quantized(model)
    if isinstance(model, PeftModel):
        tuner = model.base_model
        base = model.get_base_model()
        _check_saved(model, config)
        host = base if isinstance(tuner, ROSEModel) else tuner
        return RoseSelector(host, base, config, scores, process_group)
    if not any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        config = _resolved(model, config)
    return RoseSelector(model, model, config, scores, process_group)


def _check_config(config: ROSEConfig, over_adapter: bool) -> None:
    if config.base_config is not None and not over_adapter:
        raise RoseConfigError(
            f"base_config={type(config.base_config).__name__} makes no adapter in attach_rose and the model has none: "
            "use get_peft_model(model, config), or leave base_config out to train the model itself."
        )
    for name in ("target_modules", "exclude_modules") if over_adapter else ("exclude_modules",):
        value = getattr(config, name)
        if value is not None:
            instead = "its adapter says which modules are units" if over_adapter else "freeze by requires_grad_(False)"
            raise RoseConfigError(
                f"{name}={value!r} has no effect in attach_rose on this model ({instead}); leave it out."
            )


def _check_base_config(model: nn.Module, wanted: PeftConfig) -> None:
    """Refuse a `base_config` that says something else than the adapter there, which stays as it is."""
    adapters = getattr(model, "peft_config", None)
    if not isinstance(adapters, dict):  # layers without a tuner around them: nothing tells what made them
        return
    for own in adapters.values():
        if type(own) is not type(wanted):
            differing = [f"{type(wanted).__name__} differs from the adapter's {type(own).__name__}"]
        else:
            # Of what was set. Modules are spelled out when an adapter is made, and PEFT writes notes of its own.
            differing = [
                f"{field.name}={value!r} differs from the adapter's {getattr(own, field.name)!r}"
                for field in fields(wanted)
                if field.name not in _NOTES
                and isinstance(value := getattr(wanted, field.name), (bool, int, float, str))
                and value != (None if field.default is MISSING else field.default)
                and value != getattr(own, field.name)
            ]
        if not differing:
            return
    raise RoseConfigError(
        f"base_config: {differing[0]}, and attach_rose leaves an adapter as it is; leave base_config out, "
        "or make the adapter by get_peft_model(model, config)."
    )


def _check_saved(model: PeftModel, config: ROSEConfig) -> None:
    """Refuse `modules_to_save` that the adapter does not have: only PEFT can wrap them, when it makes the adapter."""
    there = {name for own in model.peft_config.values() for name in getattr(own, "modules_to_save", None) or ()}
    missing = [name for name in config.modules_to_save or () if name not in there]
    if missing and any(name.rpartition(".")[2] in missing for name, _ in model.named_modules()):
        raise RoseConfigError(
            f"modules_to_save={missing!r} are not among those of the adapter ({sorted(there)}), and attach_rose makes "
            "none; set them on the config that the adapter is made with."
        )


def _resolved(model: nn.Module, config: ROSEConfig) -> ROSEConfig:
    """Spell out, for a plain model, what `target_modules` and `modules_to_save` mean: names of modules with units."""
    saved = config.modules_to_save or []
    _maybe_include_all_linear_layers(config, model)  # in place
    if not saved:
        return config
    for name in saved:
        found = [path for path, _ in model.named_parameters() if f".{name}." in f".{path}"]
        if not found and config.task_type is None:  # heads that PEFT knows of for the task need not exist
            raise RoseConfigError(
                f"modules_to_save={saved!r}: {name!r} matches no module with parameters; correct it."
            )
        if found and not any(model.get_parameter(path).requires_grad for path in found):
            raise RoseConfigError(
                f"modules_to_save={saved!r}: {name!r} is frozen, and attach_rose lets a model train as it is; call "
                "requires_grad_(True) on it, or leave it out."
            )
    wanted = [
        unit.name for unit in find_units(model, config) if not any(f".{name}." in f".{unit.name}." for name in saved)
    ]
    config.target_modules = {name.rpartition(".")[0] for name in wanted}
    if [unit.name for unit in find_units(model, config)] != wanted:
        raise RoseConfigError(
            f"modules_to_save={saved!r} lie inside modules whose own weights are units, and cannot be told from them; "
            "name the units by target_modules."
        )
    return config


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
        RoseError: If ROSE is not attached to it, or to several parts of it.
    """
    selector = find_selector(model)
    if selector is None:
        raise RoseError(
            f"ROSE is not attached to this {type(model).__name__}: use get_peft_model(model, ROSEConfig(...)) or "
            "attach_rose(model, config). Adapters loaded for inference, or saved over a base_config, come without it."
        )
    return selector
