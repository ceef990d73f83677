"""Whatever interrupts a step: gradients, weights and state are as they were before it, or as they are after it."""

from __future__ import annotations

import inspect
import sys
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rose_peft import ROSEConfig, RoseSelector, UnsupportedOptimizerError, attach_rose
from rose_peft.hooks import observers, unwatch_steps
from tests.helpers.interrupting import calls_of, differences, everything, interrupt_at
from tests.helpers.tiny import batch, tiny_bert
from tests.helpers.watching import assert_masks_acted, backward, train_step, unit_weights

STRATEGIES = ["first_order", "second_order", "ensemble"]
STEPS = 1  # ordinary one, after which there is momentum, before the step that is interrupted
Training = tuple[nn.Module, RoseSelector, torch.optim.Optimizer]


class Failing(torch.optim.SGD):
    """Momentum SGD that raises in its step when it is told to."""

    fails_at = ""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            for number, param in enumerate(params):
                if (self.fails_at, number) in {("start", 0), ("middle", len(params) // 2)}:
                    self.fails_at = ""
                    raise ZeroDivisionError
                momentum = self.state[param].setdefault("momentum_buffer", torch.zeros_like(param))
                momentum.mul_(group["momentum"]).add_(param.grad)
                param.add_(momentum, alpha=-group["lr"])


def start(strategy: str, cls: type[torch.optim.Optimizer] = torch.optim.AdamW) -> Training:
    """A training that has taken its first step and has the gradients of the next one, and the steps to itself."""
    for observer in observers():  # one that was collected between counting and interrupting would change the count
        unwatch_steps(observer)
    model = tiny_bert()
    selector = attach_rose(model, ROSEConfig(strategy=strategy, upper_quantile=0.4))
    options: dict[str, Any] = {"weight_decay": 0.1} if cls is torch.optim.AdamW else {"momentum": 0.9}
    optimizer = cls(model.parameters(), lr=1e-2, **options)
    for seed in range(STEPS):
        train_step(model, optimizer, seed)
    backward(model, STEPS)
    return model, selector, optimizer


def finish(training: Training) -> dict[str, Tensor]:
    """The step that was interrupted, and two more."""
    model, selector, optimizer = training
    optimizer.step()
    assert selector.statistics().steps == STEPS + 1
    optimizer.zero_grad()
    for seed in range(STEPS + 1, STEPS + 3):
        backward(model, seed)
        before = unit_weights(selector)
        optimizer.step()
        assert_masks_acted(selector, before)
        optimizer.zero_grad()
    return everything(*training)


def before_and_after(strategy: str, cls: type[torch.optim.Optimizer] = torch.optim.AdamW) -> tuple[Any, Any]:
    training = start(strategy, cls)
    before = everything(*training)
    training[2].step()
    return before, everything(*training)


def points() -> list[tuple[str, int]]:
    """The first and the last call of every function of the library during one step."""
    training = start("ensemble")
    found = calls_of(training[2].step)
    last = dict(found)
    return sorted({(name, number) for name, number in found if number in (1, last[name])})


def test_an_interrupt_anywhere_in_a_step_leaves_it_undone_or_done() -> None:
    """Between any two verbs, and within them: at the start of every function that takes part."""
    before, after = before_and_after("ensemble")
    assert len(differences(before, after)) > 20
    odd = []
    for point in points():
        training = start("ensemble")
        with pytest.raises(KeyboardInterrupt):
            interrupt_at(point, training[2].step)
        now = everything(*training)
        undone, done = differences(now, before), differences(now, after)
        if undone and done:
            odd.append(f"{point}: {len(undone)} not as before ({undone[:2]}), {len(done)} not as after ({done[:2]})")
    assert not odd, "\n".join(odd)


def test_the_step_can_be_taken_again_after_an_interrupt() -> None:
    """Where it was undone, taking it again is as if nothing had been; a sample of the same points."""
    before, _ = before_and_after("ensemble")
    expected = finish(start("ensemble"))
    tried = 0
    for point in points()[::10]:
        training = start("ensemble")
        with pytest.raises(KeyboardInterrupt):
            interrupt_at(point, training[2].step)
        if not differences(everything(*training), before):
            tried += 1
            assert not differences(finish(training), expected), point
    assert tried > 0


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_pre_hook_of_the_user_that_raises(strategy: str) -> None:
    """A clip that finds something: nothing has happened yet."""
    before, _ = before_and_after(strategy)
    expected = finish(start(strategy))
    training = start(strategy)

    def refuse(*_: object) -> None:
        raise ZeroDivisionError

    handle = training[2].register_step_pre_hook(refuse)
    with pytest.raises(ZeroDivisionError):
        training[2].step()
    assert not differences(everything(*training), before)
    handle.remove()
    assert not differences(finish(training), expected)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_post_hook_of_the_user_that_raises(strategy: str) -> None:
    """A schedule at its end: the step is taken, and counted."""
    _, after = before_and_after(strategy)
    training = start(strategy)

    def refuse(*_: object) -> None:
        raise ZeroDivisionError

    training[2].register_step_post_hook(refuse)
    with pytest.raises(ZeroDivisionError):
        training[2].step()
    assert not differences(everything(*training), after)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_optimizer_that_raises_before_it_moves_anything(strategy: str) -> None:
    before, _ = before_and_after(strategy, Failing)
    expected = finish(start(strategy, Failing))
    training = start(strategy, Failing)
    training[2].fails_at = "start"
    with pytest.raises(ZeroDivisionError):
        training[2].step()
    assert not differences(everything(*training), before)
    assert not differences(finish(training), expected)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_zero_grad_after_a_step_that_raised_reaches_what_was_frozen(
    strategy: str, set_to_none: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's own AdamW steps without the frozen parameters: they are in none of its groups while it does."""
    expected = finish(start(strategy))
    training = start(strategy)
    model, _, optimizer = training

    def out_of_memory(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patched, pytest.raises(torch.OutOfMemoryError):
        patched.setattr(sys.modules["torch.optim.adam"], "adam", out_of_memory)
        optimizer.step()
    assert "set_to_none" in inspect.signature(optimizer.zero_grad).parameters  # Accelerate asks for it
    optimizer.zero_grad(set_to_none)
    assert not [name for name, param in model.named_parameters() if param.grad is not None and param.grad.any()]
    backward(model, STEPS)
    assert not differences(finish(training), expected)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_optimizer_that_lets_go_of_gradients_in_the_middle_of_its_step(strategy: str) -> None:
    """It is no step that raised: the masks act on what it moves afterwards as well."""

    class Tidy(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            moves = []
            for group in self.param_groups:
                for param in group["params"]:
                    if param.grad is not None:
                        momentum = self.state[param].setdefault("momentum_buffer", torch.zeros_like(param))
                        moves.append((param, momentum.mul_(group["momentum"]).add_(param.grad)))
            self.zero_grad()
            self.state_dict()
            with torch.no_grad():
                for param, move in moves:
                    param.sub_(move, alpha=group["lr"])

    _, selector, optimizer = start(strategy, Tidy)
    before = unit_weights(selector)
    optimizer.step()
    assert_masks_acted(selector, before)
    assert selector.steps_taken == STEPS + 1


def test_a_zero_grad_of_the_users_own_stays() -> None:
    training = start("second_order")
    optimizer, calls = training[2], []
    optimizer.zero_grad = lambda set_to_none=True: calls.append(set_to_none)
    optimizer.step()
    optimizer.zero_grad(False)
    assert calls == [False]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_optimizer_that_raises_in_the_middle(strategy: str) -> None:
    """What it has moved is its own affair; frozen units, gradients and the count are ours."""
    before, after = before_and_after(strategy, Failing)
    training = start(strategy, Failing)
    model, selector, optimizer = training
    optimizer.fails_at = "middle"
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    now = everything(*training)
    assert not [name for name in differences(now, before) if name.startswith(("gradient", "steps", "history"))]
    frozen = [unit.name for unit, mask in zip(selector.units, after["history"][-1], strict=True) if mask == 0]
    assert frozen
    for name in frozen:
        assert torch.equal(now[f"weight {name}"], before[f"weight {name}"]), name
    moved = [name for name in now if name.startswith("weight") and not torch.equal(now[name], before[name])]
    assert moved
    optimizer.zero_grad()
    train_step(model, optimizer, STEPS)
    assert selector.statistics().steps == STEPS + 1


@pytest.mark.parametrize("strategy", ["second_order", "ensemble"])
def test_a_refusal_leaves_everything_as_it_was(strategy: str) -> None:
    training = start(strategy)
    before = everything(*training)
    with pytest.raises(UnsupportedOptimizerError):
        training[2].step(lambda: torch.zeros(()))
    assert not differences(everything(*training), before)
    plain = torch.optim.SGD(training[0].parameters(), lr=0.1)
    with pytest.raises(UnsupportedOptimizerError):
        plain.step()
    assert not differences(everything(*training), before)
    assert not differences(finish(training), finish(start(strategy)))


@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("strategy", ["first_order", "ensemble"])
def test_an_interrupt_in_the_passes_of_the_model(strategy: str, at: int) -> None:
    """In the user's pass or in the one of ours: the next batch has both again, and only its own scores count."""

    def run(interrupted: bool) -> dict[str, Tensor]:
        training = start(strategy)
        model, _, optimizer = training
        optimizer.step()
        optimizer.zero_grad()
        calls = 0

        def interrupt(*_: object) -> None:
            nonlocal calls
            calls += 1
            if calls == at:
                raise KeyboardInterrupt

        if interrupted:
            handle = model.bert.encoder.layer[1].register_forward_hook(interrupt)
            with pytest.raises(KeyboardInterrupt):
                for seed in range(100, 104):  # the number of passes per call is our affair
                    torch.manual_seed(seed)
                    model(**batch(model, seed=seed))
            handle.remove()
            model(**batch(model, seed=99)).loss.backward()  # thrown away, as a loop does with a batch that failed
            optimizer.zero_grad()
        train_step(model, optimizer, STEPS + 1)
        return everything(*training)

    plain, interrupted = run(False), run(True)
    assert not [name for name in differences(plain, interrupted) if not name.startswith("gradient")]


@pytest.mark.parametrize("look", ["evaluate", "save", "save the optimizer"])
def test_whoever_looks_from_another_thread_takes_no_step_for_an_interrupted_one(
    look: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an evaluation or a checkpoint in the background does, in the middle of a step."""
    model = tiny_bert()
    selector = attach_rose(model, ROSEConfig(strategy="first_order", upper_quantile=0.3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    actions = {"evaluate": lambda: model(**batch(model)), "save": model.state_dict, "save the optimizer": None}
    action = actions[look] or optimizer.state_dict
    seen = []

    def other() -> None:
        with torch.no_grad():
            action()
        seen.append(True)

    functional = sys.modules["torch.optim.sgd"]
    original = functional.sgd

    def sgd(*args: Any, **kwargs: Any) -> None:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        original(*args, **kwargs)

    monkeypatch.setattr(functional, "sgd", sgd)
    for step in range(3):
        before = unit_weights(selector)
        train_step(model, optimizer, step)
        assert 0 in assert_masks_acted(selector, before).values()
    assert selector.statistics().steps == 3 and len(seen) >= 3
