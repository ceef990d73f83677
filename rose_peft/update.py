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
from torch.distributed.tensor import DTensor

from .engines.seam import Group, Part
from .errors import UnsupportedOptimizerError
from .norms import local_part, wide_dtype
from .optimizers import MomentumRule, momentum_of, momentum_rule, readable_rule, restore_groups, split_groups
from .scores import Stepping


@dataclass(frozen=True)
class Masked:
    """One parameter with a gradient whose mask is below 1.

    Args:
        part: What this process steps of it.
        group: Its parameter group.
        share: Mask w of its unit, in [0, 1).
        rest: 1 - w, made in float32, as published.
        rule: How the optimizer keeps its momentum, or None where that cannot be read.
    """

    part: Part
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
    rules: dict[int, MomentumRule | None] = {}  # by group: read once for all of its parameters
    masked = []
    for entry in stepping:
        part = entry.part if shares[entry.index] < 1 else None
        if part is not None and not part.is_empty:
            if id(entry.group) not in rules:
                rules[id(entry.group)] = momentum_rule(entry.optimizer, entry.group)
            rule = readable_rule(entry.optimizer, part, rules[id(entry.group)])
            masked.append(Masked(part, entry.group, shares[entry.index], rests[entry.index], rule))
    return masked


@dataclass
class _Blended:
    """A gradient that was replaced for the step."""

    holder: Tensor
    grad: Tensor
    blended: Tensor
    version: int


@dataclass
class _Saved:
    """What is put right after a step that was let go on.

    Args:
        masked: The parameter.
        weights: They before the step.
        state: What of the optimizer's state is put right too, before the step; None where there was none.
        had_no_state: Whether the optimizer had none at all.
        results: What to write to and its value, once they are known.
    """

    masked: Masked
    weights: Tensor
    state: dict[str, Tensor | None]
    had_no_state: bool
    results: list[tuple[Tensor, Tensor]] = field(default_factory=list)


class MaskedStep:
    """
    One optimizer step under a mask: `begin` before it, `finish` after it, `undo` where it was not taken.

    Args:
        optimizer: The optimizer that is about to step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._loss_scale = 1.0
        self._blended: list[_Blended] = []
        self._saved: list[_Saved] = []
        self._ageing: list[_Ageing] = []
        self._watched: list[tuple[Tensor, int]] = []

    def begin(self, masked: Sequence[Masked], moving: Sequence[Tensor], loss_scale: float) -> None:
        """Let the masks act on the gradients, and remember what has to be put right afterwards.

        Args:
            masked: The parameters whose update is held back, wholly or in part.
            moving: What the optimizer moves, by which it is told whether it has.
            loss_scale: Scale that the gradients still carry.
        """
        self._loss_scale = loss_scale
        native = [item for item in masked if _is_native(self._optimizer, item)]
        # Pieces have their holder in common; they are never native.
        known = {id(item.part.holder) for item in native}
        left_out = {id(item.part.holder) for item in native if item.share == 0}
        self._watched = [(tensor, tensor._version) for tensor in moving if id(tensor) not in left_out]
        for item in masked:
            if id(item.part.holder) not in known:
                self._saved.append(self._save(item))
        self._ageing = _ageing(self._optimizer, [item for item in native if item.share == 0])
        self._blend([item for item in masked if item.share > 0 or id(item.part.holder) not in known])
        if native:
            split_groups(self._optimizer, {id(item.part.holder): item.share for item in native})

    def taken(self) -> bool:
        """Whether the optimizer has moved everything that it moves, going by what was written to."""
        return bool(self._watched) and all(tensor._version != version for tensor, version in self._watched)

    def _save(self, item: Masked) -> _Saved:
        state = self._optimizer.state.get(item.part.holder, {})
        keys = [key for key, value in state.items() if _is_kept(key, value, item)]
        if item.rule is not None and item.share == 0:
            keys += [key for key in (item.rule.key, *item.rule.companions) if key not in keys]
        values = {key: self._copied(state.get(key), item.part) for key in keys}
        return _Saved(item, item.part.of(item.part.holder).detach().clone(), values, had_no_state=not state)

    def _copied(self, value: Any, part: Part) -> Tensor | None:
        return self._of(value, part).detach().clone() if isinstance(value, Tensor) else None

    def _of(self, value: Tensor, part: Part) -> Tensor:
        """What belongs to a part in a tensor of the state."""
        if part.place is not None and value.shape != part.holder.shape:
            raise UnsupportedOptimizerError(
                f"{type(self._optimizer).__name__} keeps state of shape {tuple(value.shape)} for a flat tensor of "
                f"{part.holder.numel()} elements, so what belongs to one unit cannot be told. Under DeepSpeed use "
                "torch.optim.AdamW or SGD with momentum."
            )
        return part.of(value)

    def _blend(self, items: Sequence[Masked]) -> None:
        """Replace gradients by w g + (1 - w) g0, in one kernel for all of one share and kind."""
        alike: dict[tuple[Any, ...], list[tuple[Masked, Tensor | None]]] = defaultdict(list)
        for item in items:
            momentum = momentum_of(self._optimizer, item.part, item.rule) if item.rule is not None else None
            alike[item.share, item.rest, item.rule, momentum is None].append((item, momentum))
        for (share, rest, rule, _), pairs in alike.items():
            gradients = [item.part.gradient for item, _ in pairs]
            blended = _blend_alike(gradients, [momentum for _, momentum in pairs], share, rest, self._pull(rule))
            for (item, _), grad, value in zip(pairs, gradients, blended, strict=True):
                if item.part.place is not None:
                    grad.copy_(value)  # the engine throws it away after the step
                    continue
                self._blended.append(_Blended(item.part.holder, grad, value, value._version))
                item.part.holder.grad = value

    def _pull(self, rule: MomentumRule | None) -> float:
        """What a momentum is multiplied with to be the gradient that leaves it as it is, scaled as gradients are."""
        return 0.0 if rule is None else rule.stationary * self._loss_scale

    @torch.no_grad()
    def finish(self) -> None:
        """Keep the share w of the move, leave frozen units as they were, and give the gradients back.

        Repeating it after an interruption does no harm: each part knows whether it is done.
        """
        restore_groups(self._optimizer)
        _age(self._ageing)
        self._ageing = []
        while self._saved:
            self._put_right(self._saved[-1])
            self._saved.pop()
        self.give_back()

    def _put_right(self, saved: _Saved) -> None:
        state = self._optimizer.state.get(saved.masked.part.holder, {})
        if saved.masked.share == 0:
            self._put_back(saved, state)
            return
        if not saved.results:  # made before anything is written, so that writing may be repeated
            saved.results = _partly_moved(saved, state)
        for now, result in saved.results:
            now.copy_(result)

    def _put_back(self, saved: _Saved, state: dict[str, Any]) -> None:
        """Leave a frozen parameter as it was, and what the optimizer keeps of it."""
        item, part = saved.masked, saved.masked.part
        part.of(part.holder).copy_(saved.weights)
        if saved.had_no_state and item.rule is None:
            self._forget_state(part)
            return
        for key, value in state.items():
            if saved.state.get(key) is None and _is_master(key, value, item):
                part.of(value).copy_(saved.weights)
            elif saved.state.get(key) is None and _is_owed(key, value, item):
                part.of(value).zero_()
        for key, before in saved.state.items():
            value = state.get(key)
            if isinstance(value, Tensor):
                # Where there was none, weight decay in the gradient may have started one.
                now = self._of(value, part)
                now.zero_() if before is None else now.copy_(before)

    def _forget_state(self, part: Part) -> None:
        """Let the optimizer's state be as if it had not stepped."""
        if part.place is None:
            self._optimizer.state.pop(part.holder, None)
            return
        for key, value in self._optimizer.state.get(part.holder, {}).items():
            if isinstance(value, Tensor) and key != "step":
                self._of(value, part).zero_()

    @torch.no_grad()
    def undo(self) -> None:
        """Give gradients and groups back, and put frozen units back where the optimizer raised in the middle."""
        moved = {id(tensor) for tensor, version in self._watched if tensor._version != version}
        for saved in self._saved:
            if saved.masked.share == 0 and id(saved.masked.part.holder) in moved:
                self._put_right(saved)
        self.give_back()

    def give_back(self) -> None:
        """Give gradients and groups back without touching weights.

        A gradient that is no longer the blended one (the user has computed new ones since) is left alone.
        """
        restore_groups(self._optimizer)
        for item in self._blended:
            if item.holder.grad is item.blended and item.blended._version == item.version:
                item.holder.grad = item.grad
        self._blended = []
        self._saved = []
        self._ageing = []
        self._watched = []


def _blend_alike(
    gradients: Sequence[Tensor], momenta: Sequence[Tensor | None], share: float, rest: float, pull: float
) -> list[Tensor]:
    """Make w g + (1 - w) c m of each gradient g and momentum m.

    Args:
        gradients: Of one share.
        momenta: One of the shape of each gradient, or None for all.
        share: w, in [0, 1).
        rest: 1 - w.
        pull: c.
    """
    known = [
        momentum.detach().to(grad.dtype)
        for momentum, grad in zip(momenta, gradients, strict=True)
        if momentum is not None
    ]
    # Adam's, and not a shard: the memory is gone through once in place of twice.
    if share > 0 and known and pull == 1 and not any(isinstance(grad, DTensor) for grad in gradients):
        return list(torch._foreach_lerp(known, list(gradients), share))
    if share > 0:
        blended = list(torch._foreach_mul(list(gradients), share))
    else:  # a frozen unit must not see its gradient at all: 0 * NaN is NaN
        blended = [torch.zeros_like(grad) for grad in gradients]
    if known:
        torch._foreach_add_(blended, known, alpha=rest * pull)
    return blended


def _is_native(optimizer: torch.optim.Optimizer, item: Masked) -> bool:
    """Whether this is a step of torch's Adam or AdamW, whose move is linear in the learning rate."""
    group = item.group
    if item.part.place is not None:  # what several units lie in cannot be left out for one
        return False
    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW) or group.get("differentiable"):
        return False
    if item.share > 0:
        return True
    decoupled = isinstance(optimizer, torch.optim.AdamW) or group.get("decoupled_weight_decay", False)
    known = "exp_avg" in optimizer.state.get(item.part.holder, {})
    return known and not group.get("amsgrad") and (decoupled or group["weight_decay"] == 0)


@dataclass(frozen=True)
class _Ageing:
    """The second moment of a frozen unit, and the versions before it ages: whatever is done already shows in them."""

    beta: float
    momentum: Tensor
    square: Tensor
    square_version: int
    step: Tensor
    step_version: int


def _ageing(optimizer: torch.optim.Optimizer, items: Iterable[Masked]) -> list[_Ageing]:
    found = []
    for item in items:
        state = optimizer.state[item.part.holder]
        square, step = local_part(state["exp_avg_sq"]), state["step"]
        beta = float(item.group["betas"][1])
        momentum = local_part(state["exp_avg"])
        found.append(_Ageing(beta, momentum, square, square._version, step, step._version))
    return found


def _age(items: Sequence[_Ageing]) -> None:
    """Let the second moments of frozen units drift to the squared momentum, as published, and their steps count.

    v <- beta2 v + (1 - beta2) m^2: what a step with the stationary gradient m does (section 3.3 of the reference).
    """
    for beta in {item.beta for item in items}:
        alike = [item for item in items if item.beta == beta]
        unscaled = [item.square for item in alike if item.square._version == item.square_version]
        if unscaled:
            torch._foreach_mul_(unscaled, beta)
        scaled = [item for item in alike if item.square._version == item.square_version + 1]
        if scaled:
            momenta = [item.momentum for item in scaled]
            torch._foreach_addcmul_([item.square for item in scaled], momenta, momenta, value=1 - beta)
    steps = [item.step for item in items if item.step._version == item.step_version]
    if steps:
        torch._foreach_add_(steps, 1)


# Where the weights themselves live in an optimizer that keeps them in a wider dtype.
_MASTER_MARKS = ("master", "fp32")


def _is_master(key: str, value: Any, item: Masked) -> bool:
    marked = any(mark in str(key).lower() for mark in _MASTER_MARKS)
    return marked and isinstance(value, Tensor) and value.is_floating_point() and value.shape == item.part.holder.shape


# What rounding has kept from the weights so far, for later steps to pay out: Kahan's compensation.
_OWED = ("comp", "compensation", "kahan_comp", "kahan_compensation")
# Momenta with a longer memory beside the one that is known.
_SLOW_MARK = "slow"


def _partly_moved(saved: _Saved, state: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    """Keep the share w of the move, in wider copies of the weights too.

    Args:
        saved: What was there before the step.
        state: What the optimizer keeps of the parameter after it.

    Returns:
        (what to write to, its value).
    """
    item, share, part = saved.masked, saved.masked.share, saved.masked.part
    weights, results = part.of(part.holder), []
    for key, value in state.items():
        if _is_master(key, value, item):
            now, before = part.of(value), saved.state.get(key)
            before = saved.weights.to(now.dtype) if before is None else before
            results.append((now, torch.lerp(before, now, share)))
    results.append((weights, results[0][1] if results else torch.lerp(saved.weights, weights, share)))
    for key, value in state.items():
        if _is_owed(key, value, item):
            results += _masked_with_owed(saved, key, weights, part.of(value))
    return results


def _masked_with_owed(saved: _Saved, key: str, weights: Tensor, owed: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Keep the share of the move of weights together with what rounding owes them: alone they would be rounded anew.

    Args:
        saved: What was there before the step.
        key: Under which the debt lies in the state.
        weights: As they are after the step.
        owed: The debt after the step.

    Returns:
        (what to write to, its value).
    """
    before = saved.state.get(key)
    wide = wide_dtype(weights.device)
    start, end = saved.weights.to(wide), weights.to(wide) + owed.to(wide)
    exact = torch.lerp(start if before is None else start + before.to(wide), end, saved.masked.share)
    rounded = exact.to(weights.dtype)
    return [(weights, rounded), (owed, (exact - rounded.to(wide)).to(owed.dtype))]


def _is_owed(key: str, value: Any, item: Masked) -> bool:
    known = str(key).lower() in _OWED and isinstance(value, Tensor) and value.is_floating_point()
    return known and value.shape == item.part.holder.shape


def _is_kept(key: str, value: Any, item: Masked) -> bool:
    """Whether a tensor of the optimizer's state must not move with a masked parameter."""
    if _is_master(key, value, item) or _is_owed(key, value, item):
        return True
    if not isinstance(value, Tensor) or item.share > 0:
        return False
    if item.rule is not None:
        return key == item.rule.key or key in item.rule.companions or _SLOW_MARK in str(key).lower()
    return key != "step"
