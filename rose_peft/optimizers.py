"""Reading a torch optimizer: its parameters, how it keeps a momentum, the scale its gradients carry, its closure."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .engines.seam import Group, Part
from .errors import UnsupportedOptimizerError


@dataclass(frozen=True)
class MomentumRule:
    """How an optimizer accumulates its momentum.

    Args:
        key: Name of the momentum in the optimizer's state.
        fresh: Factor with which a new gradient enters the momentum.
        stationary: The gradient that leaves the momentum m as it is, as a multiple of m.
        companions: Names of what else makes up the momentum in the state, as the scales of a quantized one.
        read: Makes the momentum, shaped like the parameter, of the state; None where it lies there as it is.
    """

    key: str
    fresh: float
    stationary: float
    companions: tuple[str, ...] = ()
    read: Callable[[dict[str, Any], Tensor], Tensor] | None = None


RuleReader = Callable[[torch.optim.Optimizer, Group], MomentumRule | None]


def _sign(group: Group) -> int:
    return -1 if group.get("maximize") else 1


def _sgd(optimizer: torch.optim.Optimizer, group: Group) -> MomentumRule | None:
    momentum, dampening = group["momentum"], group["dampening"]
    if momentum == 0 or dampening == 1:
        return None
    return MomentumRule("momentum_buffer", 1 - dampening, _sign(group) * (1 - momentum) / (1 - dampening))


def _muon(group: Group) -> MomentumRule | None:
    return MomentumRule("momentum_buffer", 1 - group["momentum"], _sign(group))


def _lion(group: Group) -> MomentumRule | None:
    # Lion moves along a mix made with beta1, but keeps its momentum with beta2.
    return MomentumRule("exp_avg", 1 - float(group["betas"][1]), _sign(group))


def _adam_like(group: Group) -> MomentumRule | None:
    betas = group.get("betas")
    if not isinstance(betas, (tuple, list)) or len(betas) < 2 or any(beta is None for beta in betas[:2]):
        return None
    return MomentumRule("exp_avg", 1 - float(betas[0]), _sign(group))


def _bitsandbytes(optimizer: torch.optim.Optimizer, group: Group) -> MomentumRule | None:
    """The momentum of bitsandbytes' optimizers: `state1`, of 8 bits per number in large parameters."""
    betas, name = group["betas"], getattr(optimizer, "optimizer_name", "")
    if name == "momentum" and betas[0]:
        fresh, stationary = 1.0, 1 - float(betas[0])
    elif name in ("adam", "lion"):
        fresh, stationary = 1 - float(betas[1 if name == "lion" else 0]), 1.0
    else:
        return None
    return MomentumRule("state1", fresh, stationary, ("absmax1",), _dequantized)


def _dequantized(state: dict[str, Any], param: Tensor) -> Tensor:
    momentum = state["state1"]
    if momentum.dtype != torch.uint8:
        return momentum
    from bitsandbytes.functional import dequantize_blockwise

    blocks = {"absmax": state["absmax1"], "code": state["qmap1"], "blocksize": _BLOCK}
    return dequantize_blockwise(momentum, **blocks).view_as(param)


# Numbers in one block of bitsandbytes' optimizer states, which have one scale in common.
_BLOCK = 256
_RULES: dict[type[torch.optim.Optimizer], RuleReader] = {torch.optim.SGD: _sgd}


def register_momentum_rule(cls: type[torch.optim.Optimizer], reader: RuleReader) -> None:
    """Tell ROSE how a further optimizer keeps its momentum; without a rule `betas` and `exp_avg` count as Adam-like.

    Args:
        cls: The optimizer class; its subclasses are read the same way.
        reader: Makes the rule from an optimizer and the settings of one of its parameter groups; None where they keep
            no momentum.
    """
    _RULES[cls] = reader


def momentum_rule(optimizer: torch.optim.Optimizer, group: Group) -> MomentumRule | None:
    """Read off an optimizer's class and settings how it keeps a momentum of gradients, or None where it keeps none.

    Args:
        optimizer: Any `torch.optim.Optimizer`. A class with `betas` and the state `exp_avg` counts as Adam-like.
        group: The parameter group whose settings hold.
    """
    for cls in type(optimizer).__mro__:
        if cls in _RULES:
            return _RULES[cls](optimizer, group)
        if cls.__module__ == "bitsandbytes.optim.optimizer" and cls.__name__ == "Optimizer8bit":
            return _bitsandbytes(optimizer, group)
    # Both come from several packages, with the same settings and state.
    name = type(optimizer).__name__
    if name == "Muon" and "momentum" in group:
        return _muon(group)
    rule = _adam_like(group)
    return _lion(group) if rule is not None and "lion" in name.lower() else rule


def is_guessed(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the rule of an optimizer is read off the names of its settings and state alone.

    Args:
        optimizer: Any; those of torch, of bitsandbytes and with a registered rule are known by their class.
    """
    known = ("torch.optim", "bitsandbytes.optim")
    return not any(
        cls in _RULES or (cls is not torch.optim.Optimizer and cls.__module__.startswith(known))
        for cls in type(optimizer).__mro__
    )


def momentum_of(optimizer: torch.optim.Optimizer, part: Part, rule: MomentumRule) -> Tensor | None:
    """The momentum of a part of one parameter before the step, or None where the optimizer has no state for it yet.

    Raises:
        UnsupportedOptimizerError: If the optimizer keeps its momentum in a form that cannot be read.
    """
    # `optimizer.state` is a defaultdict: indexing would create the entry and keep the optimizer from initializing it.
    state = optimizer.state.get(part.holder, {})
    if not state:
        return None
    if rule.read is not None:
        return part.of(rule.read(state, part.holder))
    momentum = state.get(rule.key)
    if momentum is None and rule.key == "momentum_buffer":
        return None
    if not isinstance(momentum, Tensor) or momentum.shape != part.holder.shape or not momentum.is_floating_point():
        raise UnsupportedOptimizerError(
            f"{type(optimizer).__name__} keeps no readable momentum under state[{rule.key!r}] (found "
            f"{', '.join(map(str, state))}); use torch.optim.AdamW or SGD with momentum, or strategy='first_order'."
        )
    return part.of(momentum)


def readable_rule(optimizer: torch.optim.Optimizer, part: Part, rule: MomentumRule | None) -> MomentumRule | None:
    """The momentum rule of a part's group, or None where there is none or what it names cannot be read."""
    if rule is None:
        return None
    try:
        momentum_of(optimizer, part, rule)
    except UnsupportedOptimizerError:
        return None
    return rule


def no_momentum(optimizer: torch.optim.Optimizer, group: Group) -> UnsupportedOptimizerError:
    """The error for scores that need a momentum where the optimizer keeps none."""
    setting = "momentum=0" if group.get("momentum") == 0 else "no momentum of gradients"
    return UnsupportedOptimizerError(
        f"strategy='second_order' and strategy='ensemble' compare gradients with the momentum, but "
        f"{type(optimizer).__name__} has {setting}. Use torch.optim.AdamW, SGD with momentum > 0 and dampening < 1, "
        "or strategy='first_order'."
    )


def owned_groups(optimizer: torch.optim.Optimizer) -> dict[int, Group]:
    """Map the identity of each parameter of an optimizer to its group, in the optimizer's order."""
    return {id(param): group for group in whole_groups(optimizer) for param in group["params"]}


# The parameter groups of optimizers that are in the middle of a step with others.
_whole: weakref.WeakKeyDictionary[torch.optim.Optimizer, list[Group]] = weakref.WeakKeyDictionary()


def whole_groups(optimizer: torch.optim.Optimizer) -> list[Group]:
    """The parameter groups as the user made them, in the middle of a step too.

    Args:
        optimizer: Any.
    """
    return _whole.get(optimizer, optimizer.param_groups)


def split_groups(optimizer: torch.optim.Optimizer, shares: dict[int, float]) -> None:
    """Give an optimizer parameter groups for one step; models that share it may each do so.

    Args:
        optimizer: Whose move is linear in the learning rate.
        shares: For identities of parameters the share of their move, in [0, 1); those with 0 are left out.
    """
    _whole.setdefault(optimizer, optimizer.param_groups)
    found = []
    for group in optimizer.param_groups:
        by_share: dict[float, list[Tensor]] = defaultdict(list)
        for param in group["params"]:
            by_share[shares.get(id(param), 1.0)].append(param)
        for share, params in by_share.items():
            if share == 1:
                found.append({**group, "params": params})
            elif share > 0:
                found.append({**group, "params": params, "lr": group["lr"] * share})
    optimizer.param_groups = found


def restore_groups(optimizer: torch.optim.Optimizer) -> None:
    """Give an optimizer its own parameter groups back; does nothing for one that has them.

    Args:
        optimizer: Any.
    """
    groups = _whole.pop(optimizer, None)
    if groups is not None:
        optimizer.param_groups = groups


def loss_scale(optimizer: torch.optim.Optimizer) -> float | None:
    """Scale that gradients still carry (fused optimizers unscale inside the step), or None in an overflow step."""
    found = getattr(optimizer, "found_inf", None)
    if isinstance(found, Tensor) and float(found) > 0:
        return None
    scale = getattr(optimizer, "grad_scale", None)
    if scale is None:
        return 1.0
    return float(scale) if isinstance(scale, Tensor) else float(scale.get_scale())


def only_makes_state(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step moves nothing and is an optimizer's first.

    torch.distributed.checkpoint takes one, at a learning rate of zero, to have a state that it can load into.

    Args:
        optimizer: About to step.
    """
    return not optimizer.state and all(float(group["lr"]) == 0 for group in optimizer.param_groups)


def refuse_closure(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse a step whose gradients are made inside it.

    Args:
        args: Positional arguments of the patched `step`, the optimizer itself first.
        kwargs: Keyword arguments.

    Raises:
        UnsupportedOptimizerError: If there is a closure.
    """
    if any(callable(argument) for argument in (*args[1:], kwargs.get("closure"))):
        raise UnsupportedOptimizerError(
            "optimizer.step(closure) makes the gradients inside the step, after the masks are due. Compute loss "
            "and gradients first and call optimizer.step() without a closure."
        )
