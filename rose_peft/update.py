"""How a mask acts on one step of any `torch.optim` optimizer: before it on the gradients, after it on the weights.

For a unit with mask w the optimizer sees w g + (1 - w) g0, where g0 is the gradient that leaves its momentum as it is,
and only the share w of its move is kept (section 3.3 step 5 of the reference). A unit with w = 1 is not touched at
all; with w = 0 weights and momentum stay the same to the last bit, weight decay included.

There are two ways. Every optimizer can be let go on and put right afterwards: weights and momenta are copied before
the step. torch's own Adam and AdamW can be kept from moving in the first place, which needs no copies: frozen weights
are left out of the step's parameter groups, and a share of the move is a share of the learning rate.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .norms import local_part
from .optimizers import Group, MomentumRule, momentum_of, momentum_rule, readable_rule, restore_groups, split_groups
from .scores import Stepping


@dataclass(frozen=True)
class Masked:
    """One parameter with a gradient whose mask is below 1.

    Args:
        param: The parameter.
        group: Its parameter group.
        share: Mask w of its unit, in [0, 1).
        rest: 1 - w, as rounded by whoever made the mask.
        rule: How the optimizer keeps its momentum, or None where that cannot be read.
    """

    param: Tensor
    group: Group
    share: float
    rest: float
    rule: MomentumRule | None


def masked_parameters(mask: Tensor, stepping: Sequence[Stepping]) -> list[Masked]:
    """Say for each parameter that is stepped how much of its update is held back; those with mask 1 are left out.

    Args:
        mask: float32 [U].
        stepping: The parameters with a gradient.
    """
    shares, rests = mask.tolist(), (1 - mask).tolist()
    held = [entry for entry in stepping if shares[entry.index] < 1]
    of_group = {id(entry.group): entry for entry in held}
    rules = {key: momentum_rule(entry.optimizer, entry.group) for key, entry in of_group.items()}
    return [
        Masked(
            entry.param,
            entry.group,
            shares[entry.index],
            rests[entry.index],
            readable_rule(entry.optimizer, entry.param, rules[id(entry.group)]),
        )
        for entry in held
    ]


@dataclass
class _Blended:
    """A gradient that was replaced for the step."""

    param: Tensor
    grad: Tensor
    blended: Tensor
    version: int


@dataclass
class _Saved:
    """What is put right after a step that was let go on."""

    masked: Masked
    weights: Tensor
    state: dict[str, Tensor | None]
    fresh_state: bool
    results: list[tuple[Tensor, Tensor]] = field(default_factory=list)


class MaskedStep:
    """
    One optimizer step under a mask, from its construction before the step to `finish` after it.

    Args:
        optimizer: The optimizer that is about to step.
        masked: The parameters whose update is held back, wholly or in part.
        loss_scale: Scale that the gradients still carry.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, masked: Sequence[Masked], loss_scale: float) -> None:
        self._optimizer = optimizer
        self._loss_scale = loss_scale
        self._blended: list[_Blended] = []
        self._saved: list[_Saved] = []
        self._left_out: list[Masked] = []
        native = [item for item in masked if _is_native(optimizer, item)]
        known = {id(item.param) for item in native}
        try:
            for item in masked:
                if id(item.param) not in known:
                    self._saved.append(self._save(item))
            self._left_out = [item for item in native if item.share == 0]
            self._blend([item for item in masked if item.share > 0 or id(item.param) not in known])
            if native:
                split_groups(optimizer, {id(item.param): item.share for item in native})
        except BaseException:
            self.give_back()
            raise

    def _save(self, item: Masked) -> _Saved:
        state = self._optimizer.state.get(item.param, {})
        keys = [key for key, value in state.items() if _is_kept(key, value, item)]
        if item.rule is not None and item.share == 0 and item.rule.key not in keys:
            keys.append(item.rule.key)
        values = {key: _copied(state.get(key)) for key in keys}
        return _Saved(item, item.param.detach().clone(), values, fresh_state=not state)

    def _blend(self, items: Sequence[Masked]) -> None:
        """Replace gradients by w g + (1 - w) g0, in one kernel for all of one share and kind."""
        alike: dict[tuple[Any, ...], list[tuple[Masked, Tensor | None]]] = defaultdict(list)
        for item in items:
            momentum = momentum_of(self._optimizer, item.param, item.rule) if item.rule is not None else None
            assert item.param.grad is not None
            alike[item.share, item.rest, item.rule, momentum is None].append((item, momentum))
        for (share, rest, rule, _), pairs in alike.items():
            gradients = [item.param.grad for item, _ in pairs if item.param.grad is not None]
            # A frozen unit must not see its gradient at all: 0 * NaN is NaN.
            blended = [torch.zeros_like(grad) for grad in gradients]
            if share > 0:
                blended = list(torch._foreach_mul(gradients, share))
            momenta = [m.detach().to(b.dtype) for (_, m), b in zip(pairs, blended, strict=True) if m is not None]
            if rule is not None and momenta:
                torch._foreach_add_(blended, momenta, alpha=rest * rule.stationary * self._loss_scale)
            for (item, _), grad, value in zip(pairs, gradients, blended, strict=True):
                self._blended.append(_Blended(item.param, grad, value, value._version))
                item.param.grad = value

    @torch.no_grad()
    def finish(self) -> None:
        """Keep the share w of the move, leave frozen units as they were, and give the gradients back.

        Repeating it after an interruption does no harm: each part knows whether it is done.
        """
        restore_groups(self._optimizer)
        while self._left_out:
            _age_second_moments(self._optimizer, self._left_out)
            self._left_out = []
        while self._saved:
            self._put_right(self._saved[-1])
            self._saved.pop()
        self.give_back()

    def _put_right(self, saved: _Saved) -> None:
        item, share = saved.masked, saved.masked.share
        state = self._optimizer.state.get(item.param, {})
        masters = {key: value for key, value in state.items() if _is_master(key, value, item)}
        if share > 0:
            if not saved.results:  # made before anything is written, so that writing may be repeated
                for key, now in masters.items():
                    before = saved.state.get(key)
                    before = saved.weights.to(now.dtype) if before is None else before
                    saved.results.append((now, torch.lerp(before, now, share)))
                weights = saved.results[0][1] if masters else torch.lerp(saved.weights, item.param, share)
                saved.results.append((item.param, weights))
            for now, result in saved.results:
                now.copy_(result)
            return
        item.param.copy_(saved.weights)
        if saved.fresh_state and item.rule is None:
            self._optimizer.state.pop(item.param, None)  # as if it had not stepped
            return
        for key, now in masters.items():
            if saved.state.get(key) is None:
                now.copy_(saved.weights)
        for key, before in saved.state.items():
            now = state.get(key)
            if isinstance(now, Tensor):
                # Where there was none, weight decay in the gradient may have started one.
                now.zero_() if before is None else now.copy_(before)

    def give_back(self) -> None:
        """Give gradients and groups back without touching weights, as when the step itself raised.

        A gradient that is no longer the blended one (the user has computed new ones since) is left alone.
        """
        restore_groups(self._optimizer)
        for item in self._blended:
            if item.param.grad is item.blended and item.blended._version == item.version:
                item.param.grad = item.grad
        self._blended = []
        self._saved = []
        self._left_out = []


def _is_native(optimizer: torch.optim.Optimizer, item: Masked) -> bool:
    """Whether this is a step of torch's Adam or AdamW, whose move is linear in the learning rate."""
    group = item.group
    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW) or group.get("differentiable"):
        return False
    if item.share > 0:
        return True
    decoupled = isinstance(optimizer, torch.optim.AdamW) or group.get("decoupled_weight_decay", False)
    known = "exp_avg" in optimizer.state.get(item.param, {})
    return known and not group.get("amsgrad") and (decoupled or group["weight_decay"] == 0)


def _age_second_moments(optimizer: torch.optim.Optimizer, items: Iterable[Masked]) -> None:
    """Let the second moments of frozen units drift to the squared momentum, as published, and their steps count.

    v <- beta2 v + (1 - beta2) m^2: what a step with the stationary gradient m does (section 3.3 of the reference).
    """
    by_beta: dict[float, list[dict[str, Tensor]]] = defaultdict(list)
    for item in items:
        by_beta[float(item.group["betas"][1])].append(optimizer.state[item.param])
    for beta, states in by_beta.items():
        momenta = [local_part(state["exp_avg"]) for state in states]
        squares = [local_part(state["exp_avg_sq"]) for state in states]
        torch._foreach_mul_(squares, beta)
        torch._foreach_addcmul_(squares, momenta, momenta, value=1 - beta)
        torch._foreach_add_([state["step"] for state in states], 1)


# Where the weights themselves live in an optimizer that keeps them in a wider dtype.
_MASTER_MARKS = ("master", "fp32")


def _is_master(key: str, value: Any, item: Masked) -> bool:
    marked = any(mark in str(key).lower() for mark in _MASTER_MARKS)
    return marked and isinstance(value, Tensor) and value.is_floating_point() and value.shape == item.param.shape


def _is_kept(key: str, value: Any, item: Masked) -> bool:
    """Whether a tensor of the optimizer's state must not move with a masked parameter."""
    if _is_master(key, value, item):
        return True
    if not isinstance(value, Tensor) or item.share > 0:
        return False
    if item.rule is not None:
        return key == item.rule.key
    return value.numel() > 1 or value.shape == item.param.shape


def _copied(value: Any) -> Tensor | None:
    return value.detach().clone() if isinstance(value, Tensor) else None
