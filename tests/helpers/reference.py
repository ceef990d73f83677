"""The plain, slow twin of the method: section 3 of the reference in our own words, to test the fast code against.

Nothing here imports rose_peft. Scores are Python lists of numpy scalars (so that float32 arithmetic stays float32),
tensors live in dictionaries by parameter name, and every rule is a loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy
import torch
from torch import Tensor

# Selection -----------------------------------------------------------------------------------------------------------


def quantile(scores: Sequence, level: float, kind: type = numpy.float64):
    """Linear interpolation between the two neighbours of rank level * (n - 1), in the arithmetic of `kind`.

    The form of the interpolation (from the nearer neighbour) is part of the definition: it decides rounding.
    """
    ordered = sorted(kind(score) for score in scores)
    rank = kind(level) * kind(len(ordered) - 1)
    below = math.floor(rank)
    above = math.ceil(rank)
    fraction = kind(rank - kind(below))
    low, high = ordered[below], ordered[above]
    if fraction < kind(0.5):
        return low + fraction * (high - low)
    return high - (high - low) * (kind(1) - fraction)


def published_band(scores: Sequence, lower: float, upper: float, kind: type = numpy.float64) -> tuple[list, tuple]:
    """The rule as published, accidents included: one NaN among the scores makes both thresholds NaN."""
    with numpy.errstate(invalid="ignore"):
        if any(math.isnan(score) for score in scores):
            low = high = kind("nan")
        else:
            low, high = quantile(scores, lower, kind), quantile(scores, upper, kind)
        return [1.0 if low <= kind(score) <= high else 0.0 for score in scores], (low, high)


def band(
    scores: Sequence, lower: float, upper: float, unranked: Sequence[bool] | None = None, kind: type = numpy.float64
) -> tuple[list, tuple]:
    """The mended rule: non-finite scores are frozen and do not take part, units that cannot be ranked are kept."""
    unranked = [False] * len(scores) if unranked is None else list(unranked)
    ranked = [score for score, left_out in zip(scores, unranked, strict=True) if not left_out and math.isfinite(score)]
    if not ranked:
        return [1.0 if left_out else 0.0 for left_out in unranked], (kind("nan"), kind("nan"))
    low, high = quantile(ranked, lower, kind), quantile(ranked, upper, kind)
    mask = []
    for score, left_out in zip(scores, unranked, strict=True):
        if left_out:
            mask.append(1.0)
        elif not math.isfinite(score):
            mask.append(0.0)
        else:
            mask.append(1.0 if low <= kind(score) <= high else 0.0)
    return mask, (low, high)


def second_order_score(grad_norm: float, momentum_norm: float, fresh: float = 0.1) -> float:
    """|fresh * norm(g) / norm(m) - 1| with the conventions of IEEE arithmetic for a zero momentum."""
    if momentum_norm == 0:
        return math.nan if grad_norm == 0 or math.isnan(grad_norm) else math.inf
    return abs(fresh * grad_norm / momentum_norm - 1)


def mix(first: Sequence[float], second: Sequence[float], gamma: float) -> list[float]:
    """gamma F + (1 - gamma) Z in float32; the weights have the float32 roundings."""
    weight = numpy.float32(gamma)
    values = {
        (0.0, 0.0): numpy.float32(0),
        (1.0, 0.0): weight,
        (0.0, 1.0): numpy.float32(1) - weight,
        (1.0, 1.0): numpy.float32(1),
    }
    return [float(values[pair]) for pair in zip(map(float, first), map(float, second), strict=True)]


# The optimizer -------------------------------------------------------------------------------------------------------


def rose_step(
    params: dict[str, Tensor],
    grads: dict[str, Tensor],
    state: dict[str, dict[str, Tensor]],
    masks: dict[str, float],
    *,
    step: int,
    lr: float,
    decay: dict[str, float],
    betas: tuple[float, float] = (0.9, 0.98),
    eps: float = 1e-8,
) -> None:
    """One optimizer step of section 3.3 item 5, to the letter, on dictionaries by name, in place.

    Args:
        params: Parameters.
        grads: Clipped task gradients.
        state: Adam moments "m" and "v" by parameter name; empty before the first step.
        masks: w of the selected parameters, float32 numbers; 1 for all others.
        step: t, from 1.
        lr: Learning rate of this step.
        decay: Weight decay of each parameter.
        betas: beta1 and beta2.
        eps: Added to the uncorrected root.
    """
    beta1, beta2 = betas
    for name, theta in params.items():
        moments = state.setdefault(name, {})
        m = moments.get("m", torch.zeros_like(theta))
        v = moments.get("v", torch.zeros_like(theta))
        w = numpy.float32(masks.get(name, 1.0))
        rest = float(numpy.float32(1) - w)
        w = float(w)
        g = w * grads[name] + rest * m if w > 0 else m
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        rate = lr * math.sqrt(1 - beta2**step) / (1 - beta1**step)
        moved = theta - rate * (w * m) / (v.sqrt() + eps)
        params[name] = moved - lr * decay.get(name, 0.0) * w * moved
        moments["m"], moments["v"] = m, v


class LetterAdamW(torch.optim.Optimizer):
    """The published optimizer without its masks: eps on the uncorrected root, decay after the move."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state.update(step=0, exp_avg=torch.zeros_like(param), exp_avg_sq=torch.zeros_like(param))
                state["step"] += 1
                m, v = state["exp_avg"], state["exp_avg_sq"]
                m.mul_(beta1).add_(param.grad, alpha=1 - beta1)
                v.mul_(beta2).addcmul_(param.grad, param.grad, value=1 - beta2)
                correction = math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"])
                param.sub_(group["lr"] * correction * m / (v.sqrt() + group["eps"]))
                param.sub_(group["lr"] * group["weight_decay"] * param)


# The method on recorded or computed gradients ------------------------------------------------------------------------


class Twin:
    """Selection and optimizer together, over recorded gradients.

    Args:
        params: Initial parameters by name.
        selected: Names that may be masked, in the order of the mask vectors.
        strategy: "first", "second" or "ensemble".
        lower: Lower quantile level.
        upper: Upper quantile level.
        gamma: Weight of the first-order mask.
        warmup_steps: Steps without masks.
        decay: Weight decay by name.
        betas: beta1 and beta2.
        eps: Epsilon.
        fresh: Constant of the second-order score; None for 1 - beta1.
    """

    def __init__(
        self, params, selected, strategy, lower, upper, gamma, warmup_steps, decay, betas, eps, fresh=None
    ) -> None:
        self.params = {name: value.clone() for name, value in params.items()}
        self.selected = list(selected)
        self.strategy = strategy
        self.levels = (lower, upper)
        self.gamma = gamma
        self.warmup_steps = warmup_steps
        self.decay, self.betas, self.eps = decay, betas, eps
        self.fresh = 1 - betas[0] if fresh is None else fresh
        self.state: dict[str, dict[str, Tensor]] = {}
        self.steps = 0
        self.kind = numpy.float64 if next(iter(params.values())).dtype == torch.float64 else numpy.float32

    def first_mask(self, risk: dict[str, Tensor]) -> list[float]:
        """F from divergence gradients."""
        return band([float(risk[name].norm()) for name in self.selected], *self.levels, kind=self.kind)[0]

    def second_mask(self, grads: dict[str, Tensor]) -> list[float]:
        """Z from clipped task gradients and the momentum before the step."""
        if not self.state:
            return [1.0] * len(self.selected)
        scores, zero = [], []
        for name in self.selected:
            norm = self.kind(float(self.state[name]["m"].norm()))
            zero.append(norm == 0)
            with numpy.errstate(all="ignore"):
                scores.append(abs(self.kind(self.fresh) * self.kind(float(grads[name].norm())) / norm - self.kind(1)))
        return band(scores, *self.levels, unranked=zero, kind=self.kind)[0]

    def step(self, risk: dict[str, Tensor] | None, grads: dict[str, Tensor], lr: float) -> dict[str, list[float]]:
        """Take one step; return the masks "first", "second" (where there are any), "final" and "applied"."""
        masks = {}
        if self.strategy != "second":
            assert risk is not None
            masks["first"] = self.first_mask(risk)
        if self.strategy != "first":
            masks["second"] = self.second_mask(grads)
        if self.strategy == "ensemble":
            masks["final"] = mix(masks["first"], masks["second"], self.gamma)
        else:
            masks["final"] = masks[self.strategy]
        warm = self.steps < self.warmup_steps
        masks["applied"] = [1.0] * len(self.selected) if warm else masks["final"]
        self.steps += 1
        rose_step(
            self.params,
            grads,
            self.state,
            dict(zip(self.selected, masks["applied"], strict=True)),
            step=self.steps,
            lr=lr,
            decay=self.decay,
            betas=self.betas,
            eps=self.eps,
        )
        return masks


# Other optimizers, one tensor at a time: what a mask means for them ------------------------------------------------


def adamw_step(theta, g, memory, w, *, lr, betas, eps, decay, coupled=False, amsgrad=False, maximize=False):
    """One step of stock Adam (`coupled`) or AdamW under a mask; returns the new parameter.

    The optimizer sees w g + (1 - w) g0, where g0 leaves the momentum as it is, and the share w of its move is kept.
    A frozen tensor keeps weights and momentum; its second moment goes on (quirk 5 of the reference).
    """
    sign = -1 if maximize else 1
    m, v, t = (
        memory.get("m", torch.zeros_like(theta)),
        memory.get("v", torch.zeros_like(theta)),
        memory.get("t", 0) + 1,
    )
    seen = w * g + (1 - w) * sign * m if w > 0 else sign * m
    seen = sign * seen
    if coupled:
        seen = seen + decay * theta
    m_new = betas[0] * m + (1 - betas[0]) * seen
    v = betas[1] * v + (1 - betas[1]) * seen * seen
    v_hat = v / (1 - betas[1] ** t)
    if amsgrad:
        memory["v_max"] = torch.maximum(memory.get("v_max", torch.zeros_like(v)), v)
        v_hat = memory["v_max"] / (1 - betas[1] ** t)
    start = theta if coupled else theta * (1 - lr * decay)
    stepped = start - lr * (m_new / (1 - betas[0] ** t)) / (v_hat.sqrt() + eps)
    memory.update(m=m_new if w > 0 else m, v=v, t=t)
    return theta + w * (stepped - theta)


def sgd_step(theta, g, memory, w, *, lr, momentum, dampening=0.0, nesterov=False, decay=0.0, maximize=False):
    """One step of stock SGD with momentum under a mask; returns the new parameter."""
    sign = -1 if maximize else 1
    buffer = memory.get("m")
    g0 = torch.zeros_like(g) if buffer is None else buffer * (1 - momentum) / (1 - dampening)
    seen = (w * sign * g if w > 0 else 0) + (1 - w) * g0 + decay * theta
    new = seen if buffer is None else momentum * buffer + (1 - dampening) * seen
    move = seen + momentum * new if nesterov else new
    if w > 0:
        memory["m"] = new
    elif buffer is None:  # a tensor frozen in its first step has a momentum of zero from then on
        memory["m"] = torch.zeros_like(theta)
    return theta + w * (-lr * move)
