"""How a mask acts on one step of any `torch.optim` optimizer: before it on the gradients, after it on the weights.

For a unit with mask w the optimizer sees w g + (1 - w) g0, where g0 is the gradient that leaves its momentum as it is,
and only the share w of its move is kept (section 3.3 step 5 of the reference). A unit with w = 1 is not touched at
all; with w = 0 weights and momentum are put back to the last bit, weight decay included.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import UnsupportedOptimizerError


@dataclass(frozen=True)
class MomentumRule:
    """How an optimizer accumulates its momentum.

    Args:
        key: Name of the momentum in the optimizer's state.
        fresh: Factor with which a new gradient enters the momentum.
        stationary: The gradient that leaves the momentum m as it is, as a multiple of m.
    """

    key: str
    fresh: float
    stationary: float


def momentum_rule(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> MomentumRule | None:
    """Read off an optimizer's class and settings how it keeps a momentum of gradients, or None where it keeps none.

    Args:
        optimizer: Any `torch.optim.Optimizer`. A class with `betas` and the state `exp_avg` counts as Adam-like.
        group: The parameter group whose settings hold.
    """
    name = type(optimizer).__name__
    if isinstance(optimizer, torch.optim.SGD):
        momentum, dampening = group["momentum"], group["dampening"]
        if momentum == 0 or dampening == 1:
            return None
        return MomentumRule("momentum_buffer", 1 - dampening, _sign(group) * (1 - momentum) / (1 - dampening))
    if name == "Muon":
        return MomentumRule("momentum_buffer", 1 - group["momentum"], _sign(group))
    betas = group.get("betas")
    if isinstance(betas, (tuple, list)) and len(betas) >= 2 and all(beta is not None for beta in betas[:2]):
        # Lion moves along a mix made with beta1, but keeps its momentum with beta2.
        rate = betas[1] if "lion" in name.lower() else betas[0]
        return MomentumRule("exp_avg", 1 - float(rate), _sign(group))
    return None


def _sign(group: dict[str, Any]) -> int:
    return -1 if group.get("maximize") else 1


def momentum_of(optimizer: torch.optim.Optimizer, param: Tensor, rule: MomentumRule) -> Tensor | None:
    """The momentum of one parameter before the step, or None where the optimizer has no state for it yet.

    Raises:
        UnsupportedOptimizerError: If the optimizer keeps its momentum in a form that cannot be read.
    """
    # `optimizer.state` is a defaultdict: indexing would create the entry and keep the optimizer from initializing it.
    state = optimizer.state.get(param, {})
    if not state:
        return None
    momentum = state.get(rule.key)
    if momentum is None and rule.key == "momentum_buffer":
        return None
    if not isinstance(momentum, Tensor) or momentum.shape != param.shape or not momentum.is_floating_point():
        raise UnsupportedOptimizerError(
            f"{type(optimizer).__name__} keeps no readable momentum under state[{rule.key!r}] (found "
            f"{', '.join(map(str, state))}); use torch.optim.AdamW or SGD with momentum, or strategy='first_order'."
        )
    return momentum


# Momenta of optimizers for which there is no rule (RMSprop, Adafactor): not readable as gradients, but to be kept.
_MOMENTUM_KEYS = ("momentum_buffer", "exp_avg")


@dataclass
class _Saved:
    param: Tensor
    grad: Tensor
    blended: Tensor
    version: int
    weights: Tensor
    share: float
    momenta: dict[str, Tensor | None]


class MaskedStep:
    """One optimizer step under a mask: `blend` before it, `finish` after it.

    Args:
        optimizer: The optimizer that is about to step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._saved: list[_Saved] = []

    def blend(self, param: Tensor, share: float, rest: float, rule: MomentumRule | None, loss_scale: float) -> None:
        """Replace the gradient of one parameter, and remember what `finish` has to put back.

        Args:
            param: Parameter with a gradient; does nothing for `share` 1.
            share: Mask w of its unit, in [0, 1].
            rest: 1 - w, as rounded by whoever made the mask.
            rule: How the optimizer keeps the momentum of this parameter, or None.
            loss_scale: Scale that the gradients still carry.
        """
        if share == 1:
            return
        grad = param.grad
        assert grad is not None
        momentum = momentum_of(self._optimizer, param, rule) if rule is not None else None
        # A frozen unit must not see its gradient at all: 0 * NaN is NaN.
        blended = grad * share if share > 0 else torch.zeros_like(grad)
        if rule is not None and momentum is not None:
            blended = blended + momentum.detach().to(grad.dtype) * (rest * rule.stationary * loss_scale)
        momenta: dict[str, Tensor | None] = {}
        if share == 0:
            state = self._optimizer.state.get(param, {})
            for key in _MOMENTUM_KEYS if rule is None else (rule.key,):
                value = state.get(key)
                momenta[key] = value.detach().clone() if isinstance(value, Tensor) else None
        weights = param.detach().clone()
        self._saved.append(_Saved(param, grad, blended, blended._version, weights, share, momenta))
        param.grad = blended

    @torch.no_grad()
    def finish(self) -> None:
        """Keep the share w of the move, put momenta of frozen units back, and give the gradients back."""
        for saved in self._saved:
            if saved.share == 0:
                saved.param.copy_(saved.weights)
                self._put_back(saved)
            else:
                saved.param.copy_(torch.lerp(saved.weights, saved.param, saved.share))
        self.give_back()

    def _put_back(self, saved: _Saved) -> None:
        state = self._optimizer.state.get(saved.param, {})
        for key, before in saved.momenta.items():
            now = state.get(key)
            if isinstance(now, Tensor):
                # Where there was none, weight decay in the gradient may have started one.
                now.zero_() if before is None else now.copy_(before)

    def give_back(self) -> None:
        """Give the gradients back without touching weights, as when the step itself raised.

        A gradient that is no longer the blended one (the user has computed new ones since) is left alone.
        """
        for saved in self._saved:
            if saved.param.grad is saved.blended and saved.blended._version == saved.version:
                saved.param.grad = saved.grad
        self._saved.clear()


def owned_groups(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Any]]:
    """Map the identity of each parameter of an optimizer to its group."""
    return {id(param): group for group in optimizer.param_groups for param in group["params"]}


def wide_dtype(device: torch.device) -> torch.dtype:
    """The dtype for sums of squares: float64, in which squares of float32 norms are exact; Apple GPUs have none."""
    return torch.float32 if device.type == "mps" else torch.float64


def square_norms(tensors: Iterable[Tensor]) -> Tensor:
    """Squared Frobenius norms, one kernel for all tensors and no host synchronisation.

    Args:
        tensors: Any shapes and float dtypes; at least one. They may lie on several devices.

    Returns:
        [number of tensors] on the first tensor's device, in its `wide_dtype`.
    """
    norms = torch._foreach_norm([t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for t in tensors])
    device = norms[0].device
    return torch.stack([norm.to(device, wide_dtype(device)) for norm in norms]).square()
