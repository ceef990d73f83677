"""Optimizers that ROSE takes for Adam's kind by the names of their settings: what they keep is looked at once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rose_peft import ROSEConfig, UnsupportedOptimizerError, attach_rose
from rose_peft.optimizers import MomentumRule, register_momentum_rule
from tests.helpers.tiny import tiny_bert
from tests.helpers.watching import backward

BETA = 0.9
Kept = Callable[[Tensor, Tensor, int], Tensor]  # of a gradient, the weights and the number of the step


class ByName(torch.optim.Optimizer):
    """Keeps under `exp_avg` an average of what it is told to keep."""

    kept: Kept

    def __init__(self, params, kept: Kept, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": 1e-3, "betas": (BETA, 0.99), "weight_decay": weight_decay})
        self.kept = kept

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    state = self.state[param]
                    state["step"] = state.get("step", 0) + 1
                    momentum = state.setdefault("exp_avg", torch.zeros_like(param))
                    momentum.lerp_(self.kept(param.grad, param, state["step"]), 1 - BETA)
                    param.add_(momentum.sign(), alpha=-group["lr"])


def as_it_is(grad: Tensor, param: Tensor, step: int) -> Tensor:
    return grad


def times(factor: float) -> Kept:
    """Prodigy multiplies with its estimate of the distance, which begins at 1e-6."""
    return lambda grad, param, step: factor * grad


def normalised(grad: Tensor, param: Tensor, step: int) -> Tensor:
    """CAME averages updates, which are about one for each weight."""
    return grad / (grad.square().mean().sqrt() + 1e-30)


def decayed(grad: Tensor, param: Tensor, step: int) -> Tensor:
    """Weight decay as part of the gradient, many times what the gradient is."""
    return grad + param


def watching_first(grad: Tensor, param: Tensor, step: int) -> Tensor:
    """SOAP looks at the first gradients only to choose its axes."""
    return torch.zeros_like(grad) if step == 1 else grad


def normalised_later(grad: Tensor, param: Tensor, step: int) -> Tensor:
    """ADOPT takes the first gradients to scale the next ones by, and averages updates from then on."""
    return torch.zeros_like(grad) if step == 1 else normalised(grad, param, step)


def take_steps(kept: Kept, strategy: str, steps: int = 3, **options: float) -> None:
    model = tiny_bert()
    attach_rose(model, ROSEConfig(strategy=strategy, upper_quantile=0.5))
    optimizer = ByName(model.parameters(), kept, **options)
    for seed in range(steps):
        backward(model, seed)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("strategy", ["second_order", "ensemble"])
@pytest.mark.parametrize("kept", [times(1e-6), times(1e3), normalised])
def test_what_does_not_average_gradients_is_refused_after_its_first_step(kept: Kept, strategy: str) -> None:
    """The error names the optimizer, where it was looked for and the ways out."""
    with pytest.raises(UnsupportedOptimizerError, match=r"ByName does not average.*exp_avg.*register_momentum_rule"):
        take_steps(kept, strategy, steps=1)


def test_what_begins_later_is_looked_at_when_it_begins() -> None:
    take_steps(normalised_later, "second_order", steps=1)
    with pytest.raises(UnsupportedOptimizerError, match="ByName does not average"):
        take_steps(normalised_later, "second_order", steps=2)


@pytest.mark.parametrize("strategy", ["second_order", "ensemble"])
@pytest.mark.parametrize("kept", [as_it_is, times(0.3), watching_first])
def test_what_averages_gradients_trains_on(kept: Kept, strategy: str) -> None:
    """Gradients may be clipped inside, and the first ones only looked at."""
    take_steps(kept, strategy)


def test_weight_decay_in_the_gradient_may_be_most_of_it() -> None:
    """It is part of the momentum of Adam as torch has it, too; and without its setting it would be refused."""
    take_steps(decayed, "second_order", weight_decay=1.0)
    with pytest.raises(UnsupportedOptimizerError, match="does not average"):
        take_steps(lambda grad, param, step: grad + 100 * param, "second_order")


def test_gradients_that_are_not_finite_say_nothing() -> None:
    """Training is lost then, or about to be skipped, but not by how the optimizer averages."""
    model = tiny_bert()
    attach_rose(model, ROSEConfig(strategy="second_order"))
    optimizer = ByName(model.parameters(), as_it_is)
    backward(model, 0)
    for param in model.parameters():
        if param.grad is not None:
            param.grad.fill_(float("nan"))
    optimizer.step()


def test_weight_decay_may_be_none() -> None:
    """As some optimizers have it that can do without."""
    model = tiny_bert()
    attach_rose(model, ROSEConfig(strategy="second_order"))
    optimizer = ByName(model.parameters(), as_it_is)
    optimizer.param_groups[0]["weight_decay"] = None
    backward(model, 0)
    optimizer.step()


def test_first_order_needs_no_momentum() -> None:
    """So it does not look at one."""
    take_steps(times(1e-6), "first_order")


def test_a_registered_rule_is_believed() -> None:
    """And with it the masks are those of the gradients, as Prodigy's d goes in and out of the rule."""

    class Scaled(ByName):
        pass

    register_momentum_rule(Scaled, lambda optimizer, group: MomentumRule("exp_avg", 1e-6 * (1 - BETA), 1e6))
    masks = []
    for make in (lambda params: Scaled(params, times(1e-6)), lambda params: ByName(params, as_it_is)):
        model = tiny_bert()
        selector = attach_rose(model, ROSEConfig(strategy="second_order", upper_quantile=0.5))
        optimizer = make(model.parameters())
        for seed in range(3):
            backward(model, seed)
            optimizer.step()
            optimizer.zero_grad()
        masks.append(selector.state.last_mask.clone())
    assert 0 < float((masks[0] == 0).float().mean()) < 1
    torch.testing.assert_close(masks[0], masks[1])
