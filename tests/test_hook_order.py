"""The user's own hooks: on gradients, and around the optimizer's step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rose_peft import ROSEConfig, RoseSelector, attach_rose
from tests.helpers.tiny import batch, tiny_bert
from tests.helpers.watching import backward, train_step, unit_weights

STRATEGIES = ["first_order", "second_order", "ensemble"]
STEPS = 4


def attach(model: nn.Module, strategy: str) -> RoseSelector:
    return attach_rose(model, ROSEConfig(strategy=strategy, upper_quantile=0.4))


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


# Hooks on gradients --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("post", [False, True])
def test_hooks_on_gradients_are_called_as_without_rose(post: bool, strategy: str) -> None:
    model = tiny_bert()
    calls: dict[str, int] = {}
    for name, param in model.named_parameters():

        def count(_: Tensor, name: str = name) -> None:
            calls[name] = calls.get(name, 0) + 1

        (param.register_post_accumulate_grad_hook if post else param.register_hook)(count)
    attach(model, strategy)
    optimizer = adamw(model)
    for seed in range(STEPS):
        train_step(model, optimizer, seed)
    assert set(calls.values()) == {STEPS}
    assert {name for name, param in model.named_parameters() if param.requires_grad} == set(calls)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_clamp_on_gradients_does_not_change_the_risk(when: str) -> None:
    """It acts on the gradients of the loss alone; before and after attaching."""

    def run(clamp: bool) -> tuple[RoseSelector, Tensor]:
        model = tiny_bert()
        param = model.bert.encoder.layer[0].attention.self.query.weight

        def hook(grad: Tensor) -> Tensor:
            return grad.clamp(-1e-6, 1e-6)

        if clamp and when == "before":
            param.register_hook(hook)
        selector = attach(model, "first_order")
        if clamp and when == "after":
            param.register_hook(hook)
        backward(model, 0)
        grad = param.grad.clone()
        adamw(model).step()
        return selector, grad

    (plain, grad), (clamped, small) = run(False), run(True)
    assert torch.equal(plain.state.first_scores, clamped.state.first_scores)
    assert torch.equal(plain.state.last_mask, clamped.state.last_mask)
    assert grad.abs().max() > 1e-6 >= small.abs().max() > 0  # the hook did its work where it was meant to


def test_hooks_that_the_user_removes_or_adds_meanwhile() -> None:
    """Between forward and backward he adds one, after it he takes it off: ours must not bring it back."""
    model = tiny_bert()
    selector = attach(model, "first_order")
    optimizer = adamw(model)
    param = model.bert.encoder.layer[0].attention.self.query.weight
    calls: list[int] = []
    for seed in range(3):
        torch.manual_seed(seed)
        loss = model(**batch(model, seed=seed)).loss
        handle = param.register_hook(lambda _, seed=seed: calls.append(seed))
        loss.backward()
        handle.remove()
        optimizer.step()
        optimizer.zero_grad()
    assert calls == [0, 1, 2] and selector.statistics().steps == 3


# Hooks around the step -----------------------------------------------------------------------------------------------


def shrink(optimizer: torch.optim.Optimizer) -> None:
    """What a clip by layer does: the gradients of every third parameter become a hundredth."""
    for group in optimizer.param_groups:
        for param in group["params"][::3]:
            if param.grad is not None:
                param.grad.mul_(0.01)


@pytest.mark.parametrize("strategy", ["second_order", "ensemble"])
@pytest.mark.parametrize("attached", ["before", "after"])
def test_pre_hooks_of_the_user_run_before_the_masks_are_made(attached: str, strategy: str) -> None:
    """His hook is the same as doing it by hand in front of the step."""

    def run(by_hook: bool) -> tuple[nn.Module, RoseSelector, list[Tensor]]:
        model = tiny_bert()
        selector = attach(model, strategy) if attached == "before" else None
        optimizer = adamw(model)
        if by_hook:
            optimizer.register_step_pre_hook(lambda own, args, kwargs: shrink(own))
        selector = selector or attach(model, strategy)
        for seed in range(STEPS):
            optimizer.zero_grad()
            backward(model, seed)
            if not by_hook:
                shrink(optimizer)
            optimizer.step()
        return model, selector, [param.grad.clone() for param in model.parameters()]

    (one, ours, grads), (two, theirs, same) = run(False), run(True)
    assert (ours.state.last_mask == 0).any()
    assert torch.equal(ours.state.mask_history()[0], theirs.state.mask_history()[0])
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(grads, same, strict=True))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("attached", ["before", "after"])
def test_post_hooks_of_the_user_see_the_step_finished(attached: str, strategy: str) -> None:
    """An average of weights must not take in what a frozen unit is about to lose again."""
    model = tiny_bert()
    selector = attach(model, strategy) if attached == "before" else None
    optimizer = adamw(model)
    seen: list[dict[str, Any]] = []

    def look(own: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        seen.append({name: param.detach().clone() for name, param in model.named_parameters()})
        seen[-1]["grads"] = {name: param.grad.clone() for name, param in model.named_parameters()}

    optimizer.register_step_post_hook(look)
    selector = selector or attach(model, strategy)
    for seed in range(STEPS):
        backward(model, seed)
        before = unit_weights(selector)
        grads = {name: param.grad.clone() for name, param in model.named_parameters()}
        optimizer.step()
        now = seen.pop()
        for name, mask in zip(before, selector.state.last_mask.tolist(), strict=True):
            assert torch.equal(now[name], before[name][0]) == (mask == 0), f"{name}, mask {mask}, step {seed}"
        for name, param in model.named_parameters():
            assert torch.equal(now[name], param)
            assert torch.equal(now["grads"][name], grads[name])
        optimizer.zero_grad()
    assert not seen and (selector.state.last_mask == 0).any()


@pytest.mark.parametrize("times", [1, 3])
def test_the_hooks_of_the_user_are_called_once_per_step_and_stay_his(times: int) -> None:
    model = tiny_bert()
    selector = attach(model, "first_order")
    optimizer = adamw(model)
    order: list[str] = []

    def note(what: str) -> Callable[..., None]:
        return lambda *args: order.append(what)

    handles = [optimizer.register_step_pre_hook(note("pre")), optimizer.register_step_post_hook(note("post"))]
    for seed in range(times):
        train_step(model, optimizer, seed)
    assert order == ["pre", "post"] * times
    assert len(optimizer._optimizer_step_pre_hooks) == len(optimizer._optimizer_step_post_hooks) == 1
    for handle in handles:
        handle.remove()
    train_step(model, optimizer, times)
    assert order == ["pre", "post"] * times
    assert selector.statistics().steps == times + 1
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
