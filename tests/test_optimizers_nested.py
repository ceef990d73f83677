"""Optimizers whose steps overlap: one inside another, one in each of two threads."""

from __future__ import annotations

import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from rose_peft import ROSEConfig, RoseSelector, UnsupportedOptimizerError, attach_rose
from rose_peft.decision import Decision
from rose_peft.engines.seam import Turn
from rose_peft.flights import Flight, Flights
from tests.helpers.optimizers import Announced, Derived, Lookahead, Muon
from tests.helpers.tiny import tiny_bert
from tests.helpers.watching import backward, train_step, watched_step

STRATEGIES = ["first_order", "second_order", "ensemble"]
MATRICES = ["query", "key", "value", "dense"]
STEPS = 4


def attach(model: nn.Module, strategy: str, **options) -> RoseSelector:
    """A band so narrow that the ensemble has masks of 0 too."""
    return attach_rose(model, ROSEConfig(strategy=strategy, upper_quantile=0.3, **options))


def muon(model: nn.Module, selector: RoseSelector, inner: str, of_units: bool) -> Muon:
    """With `of_units` the inner optimizer holds units too: norm weights."""
    units = {id(param) for unit in selector.units for param in unit.parameters()}
    own = [p for p in model.parameters() if (p.dim() == 2 if of_units else id(p) in units)]
    kept = {id(param) for param in own}
    return Muon(own, [p for p in model.parameters() if id(p) not in kept], inner)


def masked_or_refused(model: nn.Module, selector: RoseSelector, optimizer: torch.optim.Optimizer, name: str) -> None:
    """Masks act at every step, or an error names the optimizer; the first step of second order masks nothing."""
    for seed in range(STEPS):
        backward(model, seed)
        try:
            if seed == 0 and selector.config.strategy == "second_order":
                optimizer.step()
                optimizer.zero_grad()
            else:
                watched_step(selector, optimizer.step, optimizer)
        except UnsupportedOptimizerError as error:
            assert name in str(error)
            return
    assert (selector.state.last_mask == 0).any()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("inner", ["before", "after"])
def test_an_inner_optimizer_of_what_is_no_unit_takes_no_masks_away(inner: str, strategy: str) -> None:
    model = tiny_bert()
    selector = attach(model, strategy, target_modules=MATRICES)
    masked_or_refused(model, selector, muon(model, selector, inner, of_units=False), "Muon")


@pytest.mark.parametrize("inner", ["before", "after"])
def test_an_inner_optimizer_of_units_is_masked_too_or_refused(inner: str) -> None:
    model = tiny_bert()
    selector = attach(model, "first_order")
    masked_or_refused(model, selector, muon(model, selector, inner, of_units=True), "Muon")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_optimizer_around_another_one_of_the_same_parameters(strategy: str) -> None:
    model = tiny_bert()
    selector = attach(model, strategy)
    optimizer = Lookahead(torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1))
    masked_or_refused(model, selector, optimizer, "Lookahead")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_derived_class_that_calls_the_step_of_its_parent(strategy: str) -> None:
    """The step of a class is hooked once an optimizer of that class was made, so both steps are.

    torch's own AdamW takes a share of a move as a share of its rate, a derived class has it blended: rounding apart,
    which Adam makes visible in the weights of the ensemble.
    """
    torch.optim.AdamW([nn.Parameter(torch.zeros(1))])
    runs = []
    for cls in (torch.optim.AdamW, Derived):
        model = tiny_bert()
        selector = attach(model, strategy)
        optimizer = cls(model.parameters(), lr=1e-2, weight_decay=0.1)
        for seed in range(STEPS):
            train_step(model, optimizer, seed)
        assert selector.statistics().steps == STEPS
        assert (selector.state.last_mask == 0).any()
        runs.append([*model.parameters(), selector.state.mask_sum])
    assert torch.equal(runs[0][-1], runs[1][-1])
    if strategy != "ensemble":
        assert all(torch.equal(one, two) for one, two in zip(*runs, strict=True))


def test_two_models_in_two_threads() -> None:
    """Each step waits in its middle until the other one is there too."""
    barrier = threading.Barrier(2, timeout=60)

    def train(seed: int) -> list[dict[str, float]]:
        model = tiny_bert(seed=seed)
        selector = attach(model, "first_order")
        optimizer = Announced(model.parameters(), barrier.wait)
        masks = []
        try:
            for step in range(STEPS):
                backward(model, step)
                masks.append(watched_step(selector, optimizer.step, optimizer))
        except BaseException:
            barrier.abort()
            raise
        return masks

    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(train, seed) for seed in range(2)]
    errors = [error for future in futures if (error := future.exception()) is not None]
    own = [error for error in errors if not isinstance(error, threading.BrokenBarrierError)]
    assert not own, own
    assert all(len(future.result()) == STEPS for future in futures)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_another_optimizer_that_steps_in_the_middle_of_ours(strategy: str) -> None:
    """A hook of the user steps a little optimizer of his own, as meta-learned learning rates do."""
    model, rate = tiny_bert(), nn.Parameter(torch.ones(1))
    selector = attach(model, strategy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    other = torch.optim.SGD([rate], lr=0.1)

    def meanwhile(*_: object) -> None:
        rate.grad = torch.ones(1)
        other.step()

    optimizer.register_step_pre_hook(meanwhile)
    masked_or_refused(model, selector, optimizer, "AdamW")
    assert float(rate.detach()) == pytest.approx(1 - 0.1 * STEPS)


def test_a_step_left_unfinished_refuses_no_optimizer_once_its_own_is_gone() -> None:
    """An engine may make a step in several calls, and be thrown away between two of them."""
    model = tiny_bert()
    selector = attach(model, "ensemble")
    index, param = selector.live.parameters(selector.current.name)[0]
    mask = torch.ones(len(selector.units))
    gone, other = torch.optim.SGD([param], lr=0.1), torch.optim.SGD([param], lr=0.1)
    decision = Decision(mask, mask.bool())
    flights = Flights()
    flight = Flight(weakref.ref(gone), [], 1.0, [(selector.current, decision, [(index, param)])])
    flights.start(flight, gone, Turn(last=False))
    flights.land(gone)
    with pytest.raises(UnsupportedOptimizerError, match="inside the step of SGD"):
        flights.refuse_nested(other, {id(param)})
    del gone
    assert flight.optimizer() is None
    flights.refuse_nested(other, {id(param)})
