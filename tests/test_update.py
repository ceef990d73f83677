"""How a mask acts on one step of an optimizer, through the real optimizer hooks."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.optimization import Adafactor

from rose_peft import ROSEConfig, UnsupportedOptimizerError, attach_rose
from rose_peft.decision import Decision
from rose_peft.scores import Scores, SecondOrder, Stepping
from rose_peft.selector import RoseSelector
from rose_peft.steered import Steered
from tests.helpers import reference
from tests.helpers.blocks import Blocks, set_gradients, weights
from tests.helpers.comparing import assert_same, everything
from tests.helpers.steps import train_step
from tests.helpers.tiny import batch, tiny_bert

SHARES = (0.0, 0.3, 0.5, 0.7, 1.0)


class Lion(torch.optim.Optimizer):
    """Lion, written without in-place operations on its state."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                m = state.get("exp_avg", torch.zeros_like(param))
                update = (beta1 * m + (1 - beta1) * param.grad).sign()
                state["exp_avg"] = beta2 * m + (1 - beta2) * param.grad
                param.copy_(param * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * update)


def steer(model: nn.Module, masks: Callable[[int], list[float]]) -> RoseSelector:
    """Attach ROSE, with masks that the test prescribes; everything else is real."""
    selector = attach_rose(model, ROSEConfig(strategy="second_order"))

    def decide(steered: Steered, stepping: Sequence[Stepping]) -> Decision:
        mask = torch.tensor(masks(int(selector.state.steps)), dtype=torch.float32)
        stepped = torch.zeros(len(mask), dtype=torch.bool)
        stepped[[entry.index for entry in stepping]] = True
        return Decision(mask, stepped)

    selector.gather = lambda steered, stepping, scale: stepping
    selector.decide = decide
    return selector


def mask_table(steps: int, units: int, seed: int = 0) -> list[list[float]]:
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(0, len(SHARES), (steps, units), generator=generator).tolist()
    return [[SHARES[pick] for pick in row] for row in picks]


# N steps against the twin -----------------------------------------------------------------------------------------

ADAM_SETTINGS = [
    {"cls": torch.optim.AdamW, "foreach": False},
    {"cls": torch.optim.AdamW, "foreach": True},
    {"cls": torch.optim.AdamW, "fused": True},
    {"cls": torch.optim.AdamW, "amsgrad": True, "foreach": True},
    {"cls": torch.optim.AdamW, "maximize": True, "foreach": False},
    {"cls": torch.optim.AdamW, "maximize": True, "fused": True},
    {"cls": torch.optim.Adam, "foreach": False},
    {"cls": torch.optim.Adam, "amsgrad": True, "foreach": False},
]
SGD_SETTINGS = [
    {"momentum": 0.9},
    {"momentum": 0.9, "foreach": True},
    {"momentum": 0.9, "nesterov": True},
    {"momentum": 0.8, "dampening": 0.5},
    {"momentum": 0.8, "dampening": 0.5, "foreach": True, "maximize": True},
    {"momentum": 0.9, "fused": True},
]


def label(options: dict) -> str:
    return "-".join(f"{getattr(value, '__name__', value)}" if key == "cls" else key for key, value in options.items())


def run_against_twin(model, optimizer, table, twin_step, read_momentum, tolerance) -> None:
    """Both run side by side on the same gradients; parameters and momenta agree after every step."""
    twin = {name: param.detach().clone() for name, param in model.named_parameters()}
    memories: dict[str, dict] = {name: {} for name in twin}
    selector = steer(model, lambda step: table[step])
    shares = {unit.name: index for index, unit in enumerate(selector.units)}
    for step, masks in enumerate(table):
        set_gradients(model, step)
        grads = {name: param.grad for name, param in model.named_parameters()}
        kept = {name: grad.clone() for name, grad in grads.items()}
        optimizer.step()
        for name, param in model.named_parameters():
            w = float(torch.tensor(masks[shares[name]])) if name in shares else 1.0
            before = twin[name]
            twin[name] = twin_step(before, kept[name], memories[name], w)
            assert param.grad is grads[name] and torch.equal(param.grad, kept[name])  # gradients are given back
            torch.testing.assert_close(param.detach(), twin[name], rtol=tolerance, atol=tolerance)
            momentum, wanted = read_momentum(param), memories[name].get("m")
            if momentum is None or wanted is None:
                assert (momentum is None or not momentum.any()) and (wanted is None or not wanted.any())
            else:
                torch.testing.assert_close(momentum, wanted, rtol=tolerance, atol=tolerance)
    selector.detach()


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("options", ADAM_SETTINGS, ids=label)
def test_100_steps_of_adam_equal_the_twin(options, decay):
    options = dict(options)
    cls = options.pop("cls")
    model = Blocks()
    optimizer = cls(model.parameters(), lr=0.01, betas=(0.9, 0.98), weight_decay=decay, **options)

    def twin_step(theta, g, memory, w):
        return reference.adamw_step(
            theta,
            g,
            memory,
            w,
            lr=0.01,
            betas=(0.9, 0.98),
            eps=1e-8,
            decay=decay,
            coupled=cls is torch.optim.Adam,
            amsgrad=options.get("amsgrad", False),
            maximize=options.get("maximize", False),
        )

    run_against_twin(
        model, optimizer, mask_table(100, 5), twin_step, lambda p: optimizer.state[p]["exp_avg"], tolerance=1e-10
    )


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("options", SGD_SETTINGS, ids=label)
def test_100_steps_of_sgd_equal_the_twin(options, decay):
    model = Blocks()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, weight_decay=decay, **options)
    explicit = {key: value for key, value in options.items() if key not in ("foreach", "fused")}

    def twin_step(theta, g, memory, w):
        return reference.sgd_step(theta, g, memory, w, lr=0.01, decay=decay, **explicit)

    run_against_twin(
        model,
        optimizer,
        mask_table(100, 5),
        twin_step,
        lambda p: optimizer.state.get(p, {}).get("momentum_buffer"),
        tolerance=1e-10,
    )


@settings(max_examples=60)
@given(
    st.lists(st.lists(st.sampled_from(SHARES), min_size=2, max_size=2), min_size=1, max_size=8),
    st.floats(0.0, 0.99),
    st.floats(0.5, 0.999),
    st.sampled_from([0.0, 0.01, 1.0]),
    st.booleans(),
    st.booleans(),
)
def test_any_masks_under_adamw_equal_the_twin(table, beta1, beta2, decay, amsgrad, foreach):
    model = Blocks(depth=2, width=2)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=0.01, betas=(beta1, beta2), weight_decay=decay, amsgrad=amsgrad, foreach=foreach
    )

    def twin_step(theta, g, memory, w):
        return reference.adamw_step(
            theta, g, memory, w, lr=0.01, betas=(beta1, beta2), eps=1e-8, decay=decay, amsgrad=amsgrad
        )

    run_against_twin(model, optimizer, table, twin_step, lambda p: optimizer.state[p]["exp_avg"], tolerance=1e-9)


@settings(max_examples=60)
@given(
    st.lists(st.lists(st.sampled_from(SHARES), min_size=2, max_size=2), min_size=1, max_size=8),
    st.floats(0.05, 0.99),
    st.floats(0, 0.9),
    st.sampled_from([0.0, 0.01, 1.0]),
    st.booleans(),
)
def test_any_masks_under_sgd_equal_the_twin(table, momentum, dampening, decay, maximize):
    model = Blocks(depth=2, width=2)
    options = {"momentum": momentum, "dampening": dampening, "maximize": maximize}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, weight_decay=decay, **options)

    def twin_step(theta, g, memory, w):
        return reference.sgd_step(theta, g, memory, w, lr=0.01, decay=decay, **options)

    def read(p):
        return optimizer.state.get(p, {}).get("momentum_buffer")

    run_against_twin(model, optimizer, table, twin_step, read, tolerance=1e-9)


# What holds for every optimizer -----------------------------------------------------------------------------------


def adafactor_with_momentum(params):
    return Adafactor(params, lr=0.01, relative_step=False, scale_parameter=False, beta1=0.9, weight_decay=0.1)


MOMENTUM_OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
    "adam-l2": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "adam-l2-amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1, amsgrad=True),
    "sgd-l2": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=0.1),
    "sgd-dampened": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, dampening=0.3, weight_decay=0.1),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01, weight_decay=0.1),
    "nadam-decoupled": lambda p: torch.optim.NAdam(p, lr=0.01, weight_decay=0.1, decoupled_weight_decay=True),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.01, weight_decay=0.1),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.01, weight_decay=0.1),
    "lion": lambda p: Lion(p, lr=0.01, weight_decay=0.1),
}
if hasattr(torch.optim, "Muon"):
    MOMENTUM_OPTIMIZERS["muon"] = lambda p: torch.optim.Muon(
        [param for param in p if param.dim() == 2], lr=0.01, weight_decay=0.1
    )

# These keep no momentum of gradients: no second-order score, but first-order masks act on them. Two of them keep a
# momentum of updates, which a frozen unit must not lose either.
OTHER_OPTIMIZERS = {
    "adafactor": lambda p: Adafactor(p, lr=0.01, relative_step=False, scale_parameter=False, weight_decay=0.1),
    "adafactor-momentum": adafactor_with_momentum,
    "torch-adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, weight_decay=0.1),
    "rmsprop-momentum": lambda p: torch.optim.RMSprop(p, lr=0.01, weight_decay=0.1, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, weight_decay=0.1),
    "sgd-plain": lambda p: torch.optim.SGD(p, lr=0.01, weight_decay=0.1),
}
ALL_OPTIMIZERS = {**MOMENTUM_OPTIMIZERS, **OTHER_OPTIMIZERS}


def momenta(optimizer: torch.optim.Optimizer, param: Tensor) -> dict[str, Tensor]:
    """Whatever the optimizer keeps as momentum of a parameter; a missing one is a zero one."""
    state = optimizer.state.get(param, {})
    found = {key: state.get(key) for key in ("exp_avg", "momentum_buffer")}
    return {key: torch.zeros_like(param) if value is None else value.clone() for key, value in found.items()}


def stepping(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    held = {id(param) for group in optimizer.param_groups for param in group["params"]}
    return [param for param in weights(model) if id(param) in held]


@pytest.mark.parametrize("frozen_from", [0, 3], ids=["from the start", "later"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ALL_OPTIMIZERS)
def test_mask_zero_leaves_weights_and_momentum_to_the_last_bit(name, dtype, frozen_from):
    if dtype == torch.bfloat16 and name in ("muon", "torch-adafactor"):
        pytest.skip("one data type is enough where the update itself casts")
    model = Blocks(dtype=dtype)
    optimizer = ALL_OPTIMIZERS[name](model.parameters())
    selector = steer(model, lambda step: [1, 0, 1, 0, 1] if step >= frozen_from else [1] * 5)
    others_moved = 0
    for step in range(frozen_from + 6):
        set_gradients(model, step)
        before = [(param.detach().clone(), momenta(optimizer, param)) for param in weights(model)]
        optimizer.step()
        for index, (param, (value, kept)) in enumerate(zip(weights(model), before, strict=True)):
            if index % 2 == 0 or step < frozen_from:
                others_moved += not torch.equal(param, value)
                continue
            assert torch.equal(param, value)
            for key, momentum in momenta(optimizer, param).items():
                assert torch.equal(momentum, kept[key]), key
    assert others_moved >= 3 * (frozen_from + 6) - 2  # bfloat16 may round one tiny move away
    selector.detach()


@pytest.mark.parametrize("name", ALL_OPTIMIZERS)
def test_mask_one_is_the_plain_step_to_the_last_bit(name):
    def run(steered: bool) -> list[Tensor]:
        model = Blocks(dtype=torch.float32)
        optimizer = ALL_OPTIMIZERS[name](model.parameters())
        selector = steer(model, lambda step: [1] * 5) if steered else None
        for step in range(8):
            set_gradients(model, step)
            optimizer.step()
        if selector is not None:
            assert selector.state.steps == 8
            selector.detach()
        return [param.detach() for param in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(run(True), run(False), strict=True))


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("name", MOMENTUM_OPTIMIZERS)
def test_the_stationary_gradient_is_one(name, maximize):
    """A fractional mask may not pull the momentum anywhere but towards the new gradient.

    With the gradient that leaves the momentum as it is, the mask must make no difference to the momentum: this
    checks factor and sign of `stationary` in the optimizer's own arithmetic, whatever they are.
    """
    if maximize and name in ("lion", "muon", "nadam-decoupled"):
        pytest.skip("has no maximize, or is covered by its twin")
    model = Blocks()
    optimizer = MOMENTUM_OPTIMIZERS[name](model.parameters())
    for group in optimizer.param_groups:
        group.update(weight_decay=0.0)
        if "maximize" in group:
            group["maximize"] = maximize
        elif maximize:
            pytest.skip("has no maximize")
    half = 0.5
    selector = steer(model, lambda step: [1] * 5 if step < 4 else [half] * 5)
    key = "momentum_buffer" if "momentum" in optimizer.param_groups[0] else "exp_avg"
    for step in range(4):
        set_gradients(model, step)
        optimizer.step()
    # Momentum is affine in the gradient: m(g) = a + c g. Half of a gradient of zero and half of g0 must leave m half
    # way between m and what the plain step would make of a zero gradient.
    plain = copy.deepcopy([optimizer.state[param][key] for param in stepping(model, optimizer)])
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    group = optimizer.param_groups[0]
    if key == "momentum_buffer":
        forgetting = group["momentum"]
    else:
        forgetting = group["betas"][1] if name == "lion" else group["betas"][0]
    for param, before in zip(stepping(model, optimizer), plain, strict=True):
        wanted = half * before + half * forgetting * before
        torch.testing.assert_close(optimizer.state[param][key], wanted, rtol=1e-12, atol=1e-15)
    selector.detach()


@pytest.mark.parametrize("name", ALL_OPTIMIZERS)
def test_a_fractional_mask_keeps_its_share_of_the_move(name):
    model = Blocks()
    optimizer = ALL_OPTIMIZERS[name](model.parameters())
    selector = steer(model, lambda step: [1] * 5 if step < 2 else [0.25] * 5)
    for step in range(2):
        set_gradients(model, step)
        optimizer.step()
    # The same step by hand: blend, plain step on a copy, a quarter of the move.
    rule_key = "momentum_buffer" if "momentum" in optimizer.param_groups[0] else "exp_avg"
    selector.detach()
    twin_model = copy.deepcopy(model)
    twin = ALL_OPTIMIZERS[name](twin_model.parameters())
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    selector = steer(model, lambda step: [0.25] * 5)
    set_gradients(model, 2)
    set_gradients(twin_model, 2)
    for param in stepping(twin_model, twin):
        g0 = torch.zeros_like(param)
        if name in MOMENTUM_OPTIMIZERS:
            g0 = twin.state[param][rule_key].clone()
        if name.startswith("sgd-"):
            group = twin.param_groups[0]
            g0 = g0 * (1 - group["momentum"]) / (1 - group["dampening"])
        param.grad = 0.25 * param.grad + 0.75 * g0
    starts = [param.detach().clone() for param in stepping(twin_model, twin)]
    optimizer.step()
    twin.step()
    for ours, start, theirs in zip(stepping(model, optimizer), starts, stepping(twin_model, twin), strict=True):
        torch.testing.assert_close(ours.detach(), start + 0.25 * (theirs.detach() - start), rtol=1e-9, atol=1e-12)
        assert not torch.equal(theirs, start)
    selector.detach()


def real_step(optimizer, model, strategy, steps=2):
    selector = attach_rose(model, ROSEConfig(strategy=strategy, upper_quantile=0.5))
    try:
        for step in range(steps):
            set_gradients(model, step)
            optimizer.step()
    finally:
        selector.detach()
    return selector


@pytest.mark.parametrize("name", OTHER_OPTIMIZERS)
def test_second_order_needs_a_momentum_of_gradients(name):
    model = Blocks()
    optimizer = OTHER_OPTIMIZERS[name](model.parameters())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UnsupportedOptimizerError, match=f"{type(optimizer).__name__}.*first_order"):
        real_step(optimizer, model, "second_order")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_second_order_refuses_sgd_that_never_takes_a_gradient_in():
    model = Blocks()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, dampening=1)
    with pytest.raises(UnsupportedOptimizerError, match="dampening < 1"):
        real_step(optimizer, model, "second_order")


@pytest.mark.parametrize("name", MOMENTUM_OPTIMIZERS)
def test_second_order_works_with_a_momentum_of_gradients(name):
    model = Blocks()
    optimizer = MOMENTUM_OPTIMIZERS[name](model.parameters())
    selector = real_step(optimizer, model, "second_order")
    assert selector.state.steps == 2 and 0 < selector.state.last_mask.sum() < 5
    assert selector.state.second_scores.isfinite().all() and optimizer.state


def test_a_momentum_that_cannot_be_read_is_refused():
    class Hidden(torch.optim.AdamW):
        def step(self, closure=None):
            super().step()
            for state in self.state.values():
                state["state1"] = state.pop("exp_avg").to(torch.int8)  # as 8-bit optimizers do

    model = Blocks()
    with pytest.raises(UnsupportedOptimizerError, match=r"Hidden keeps no readable momentum.*exp_avg"):
        real_step(Hidden(model.parameters()), model, "second_order")


class MovedState(torch.optim.Optimizer):
    """Keeps its momenta by name, as PEFT's LoRA-FA does, or under a key of its own, as AdamW inside of Muon may."""

    def __init__(self, parameters, where: str) -> None:
        super().__init__(parameters, {"lr": 1e-3, "betas": (0.9, 0.999)})
        self.where = where

    @torch.no_grad()
    def step(self, closure=None):
        for number, param in enumerate(self.param_groups[0]["params"]):
            if param.grad is not None:
                state = self.state[f"layer{number}" if self.where == "by name" else param]
                momentum = state.setdefault("moment1", torch.zeros_like(param))
                param.sub_(momentum.lerp_(param.grad, 0.1), alpha=1e-3)


@pytest.mark.parametrize("strategy", ["second_order", "ensemble"])
@pytest.mark.parametrize("where", ["by name", "other keys"])
def test_a_momentum_that_lies_elsewhere_is_refused_after_the_first_step(where, strategy):
    """No unit would ever have anything to be compared with, so all would be kept for good."""
    model = tiny_bert()
    attach_rose(model, ROSEConfig(strategy=strategy, upper_quantile=0.5))
    optimizer = MovedState(model.parameters(), where)
    with pytest.raises(
        UnsupportedOptimizerError, match=r"MovedState (has stepped and shows|keeps no readable).*exp_avg"
    ):
        train_step(model, optimizer, 0)


def test_a_score_that_needs_no_momentum_goes_with_an_optimizer_that_has_none():
    class ByGradient(SecondOrder):
        def tensors(self, stepping):
            return [[(entry.index, entry.gradient) for entry in stepping]]

        def score(self, norms, facts):
            return norms[0].to(facts.dtype), torch.arange(len(facts.units)) == 0  # one that cannot be ranked

    model = tiny_bert()
    config = ROSEConfig(strategy="second_order", upper_quantile=0.5)
    selector = attach_rose(model, config, scores=Scores(second_order=ByGradient()))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for step in range(2):
        train_step(model, optimizer, step)
    assert selector.statistics().steps == 2


def test_a_momentum_that_lies_elsewhere_does_not_matter_to_first_order():
    model = tiny_bert()
    selector = attach_rose(model, ROSEConfig(strategy="first_order", upper_quantile=0.5))
    optimizer = MovedState(model.parameters(), "by name")
    for step in range(3):
        train_step(model, optimizer, step)
    assert selector.statistics().steps == 3


def test_lion_is_scored_by_the_rate_that_its_momentum_has():
    model = Blocks()
    optimizer = Lion(model.parameters(), betas=(0.9, 0.75))
    selector = attach_rose(model, ROSEConfig(strategy="second_order"))
    set_gradients(model, 0)
    optimizer.step()
    momenta_before = [optimizer.state[param]["exp_avg"].norm() for param in weights(model)]
    set_gradients(model, 1)
    optimizer.step()
    scores = [abs(0.25 * float(p.grad.norm() / m) - 1) for p, m in zip(weights(model), momenta_before, strict=True)]
    assert selector.state.second_scores.tolist() == pytest.approx(scores, rel=1e-12)
    selector.detach()


# The way a step is called -----------------------------------------------------------------------------------------


def test_parameter_groups_have_their_own_rules():
    model = Blocks(depth=4)
    first, second = weights(model)[:2], weights(model)[2:]
    rest = [param for param in model.parameters() if all(param is not w for w in weights(model))]
    optimizer = torch.optim.AdamW(
        [
            {"params": first, "betas": (0.9, 0.98), "lr": 0.01, "weight_decay": 0.1},
            {"params": second, "betas": (0.5, 0.9), "lr": 0.05, "weight_decay": 0.0},
            {"params": rest, "lr": 0.001},
        ]
    )
    selector = attach_rose(model, ROSEConfig(strategy="second_order", upper_quantile=0.5))
    for step in range(2):
        moments = [optimizer.state[p]["exp_avg"].norm() if step else None for p in weights(model)]
        set_gradients(model, step)
        optimizer.step()
    rates = [0.1, 0.1, 0.5, 0.5]
    scores = [
        abs(rate * float(p.grad.norm() / m) - 1) for rate, p, m in zip(rates, weights(model), moments, strict=True)
    ]
    assert selector.state.second_scores.tolist() == pytest.approx(scores, rel=1e-12)
    selector.detach()

    # The blend follows each group's rule too.
    model = Blocks(depth=4)
    optimizer = torch.optim.AdamW(
        [{"params": weights(model)[:2], "betas": (0.9, 0.98)}, {"params": weights(model)[2:], "betas": (0.5, 0.9)}],
        lr=0.01,
    )
    twin = [param.detach().clone() for param in weights(model)]
    memories: list[dict] = [{} for _ in twin]
    selector = steer(model, lambda step: [0.3, 1.0, 0.7, 0.0])
    for step in range(10):
        set_gradients(model, step)
        optimizer.step()
        for index, share in enumerate([0.3, 1.0, 0.7, 0.0]):
            share = float(torch.tensor(share))
            betas = (0.9, 0.98) if index < 2 else (0.5, 0.9)
            grad = weights(model)[index].grad
            twin[index] = reference.adamw_step(
                twin[index], grad, memories[index], share, lr=0.01, betas=betas, eps=1e-8, decay=0.01
            )
    for param, wanted in zip(weights(model), twin, strict=True):
        torch.testing.assert_close(param.detach(), wanted, rtol=1e-10, atol=1e-12)
    selector.detach()


class Failing(torch.optim.AdamW):
    fail = False

    def _init_group(self, *args, **kwargs):
        if self.fail:
            raise MemoryError("out of memory")
        return super()._init_group(*args, **kwargs)


def test_a_step_that_raises_leaves_nothing_behind():
    def run(failing_step: int | None) -> Blocks:
        model = Blocks()
        optimizer = Failing(model.parameters(), lr=0.01)
        selector = steer(model, lambda step: [0, 0.5, 1, 0, 0.3])
        for step in range(4):
            set_gradients(model, step)
            if step == failing_step:
                optimizer.fail = True
                with pytest.raises(MemoryError):
                    optimizer.step()
                optimizer.fail = False
            optimizer.step()  # again with the same gradients
        assert selector.state.steps == 4
        selector.detach()
        return model

    for ours, plain in zip(run(2).parameters(), run(None).parameters(), strict=True):
        assert torch.equal(ours, plain)


def test_new_gradients_after_a_step_that_raised_are_used():
    def run(failing: bool) -> Blocks:
        model = Blocks()
        optimizer = Failing(model.parameters(), lr=0.01)
        selector = steer(model, lambda step: [0, 0.5, 1, 0, 0.3])
        set_gradients(model, 0)
        optimizer.step()
        if failing:
            set_gradients(model, 7)
            optimizer.fail = True
            with pytest.raises(MemoryError):
                optimizer.step()
            optimizer.fail = False
        optimizer.zero_grad()
        set_gradients(model, 1)
        wanted = [param.grad for param in model.parameters()]
        optimizer.step()
        assert all(param.grad is grad for param, grad in zip(model.parameters(), wanted, strict=True))
        selector.detach()
        return model

    for ours, plain in zip(run(True).parameters(), run(False).parameters(), strict=True):
        assert torch.equal(ours, plain)


def test_gradients_added_after_a_step_that_raised_are_not_lost():
    """Without zero_grad a backward pass adds to what is there, which is the blended gradient by then."""
    model = Blocks()
    optimizer = Failing(model.parameters(), lr=0.01)
    selector = steer(model, lambda step: [0.5] * 5)
    set_gradients(model, 0)
    optimizer.fail = True
    with pytest.raises(MemoryError):
        optimizer.step()
    optimizer.fail = False
    blended = [param.grad.clone() for param in weights(model)]
    for param in weights(model):
        param.grad.add_(1000.0)
    optimizer.step()
    for param, grad in zip(weights(model), blended, strict=True):
        assert torch.equal(param.grad, grad + 1000.0)
    selector.detach()


def test_detach_after_a_step_that_raised_gives_the_gradients_back():
    model = Blocks()
    optimizer = Failing(model.parameters(), lr=0.01)
    selector = steer(model, lambda step: [0.5] * 5)
    set_gradients(model, 0)
    grads = [param.grad for param in model.parameters()]
    optimizer.fail = True
    with pytest.raises(MemoryError):
        optimizer.step()
    selector.detach()
    assert all(param.grad is grad for param, grad in zip(model.parameters(), grads, strict=True))


def test_an_error_of_ours_leaves_the_gradients_alone():
    """The momentum of one unit cannot be read."""
    model = Blocks()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    selector = attach_rose(model, ROSEConfig(strategy="second_order"))
    set_gradients(model, 0)
    optimizer.step()
    optimizer.state[weights(model)[3]]["exp_avg"] = torch.zeros(2, dtype=torch.int8)
    set_gradients(model, 1)
    grads = [param.grad for param in model.parameters()]
    with pytest.raises(UnsupportedOptimizerError):
        optimizer.step()
    assert all(param.grad is grad for param, grad in zip(model.parameters(), grads, strict=True))
    selector.detach()


@pytest.mark.parametrize("how", ["positional", "keyword"])
def test_a_closure_is_refused_before_anything_happens(how):
    model = Blocks()
    optimizer = torch.optim.AdamW(model.parameters())
    selector = attach_rose(model, ROSEConfig(strategy="second_order"))
    set_gradients(model, 0)
    before = copy.deepcopy(model.state_dict())

    def closure():
        raise AssertionError("must not be called")

    with pytest.raises(UnsupportedOptimizerError, match=r"step\(closure\).*without a closure"):
        optimizer.step(closure) if how == "positional" else optimizer.step(closure=closure)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    optimizer.step(None)
    optimizer.step(closure=None)
    assert selector.state.steps == 2
    selector.detach()


def test_lbfgs_cannot_be_used():
    model = Blocks()
    selector = attach_rose(model, ROSEConfig(strategy="second_order"))
    with pytest.raises(UnsupportedOptimizerError, match="closure"):
        torch.optim.LBFGS(model.parameters()).step(lambda: torch.zeros(()))
    selector.detach()


def test_units_spread_over_two_optimizers_are_refused():
    model = Blocks()
    one = torch.optim.AdamW(weights(model)[:2])
    two = torch.optim.SGD(weights(model)[2:], lr=0.1, momentum=0.9)
    selector = attach_rose(model, ROSEConfig(strategy="second_order"))
    set_gradients(model, 0)
    one.step()
    with pytest.raises(UnsupportedOptimizerError, match=r"spread over two optimizers.*AdamW.*SGD"):
        two.step()
    selector.detach()


def test_an_optimizer_without_units_is_left_alone():
    model = Blocks()
    ours = torch.optim.AdamW(weights(model), lr=0.01)
    other = torch.optim.SGD(model.head.parameters(), lr=0.1)
    selector = steer(model, lambda step: [0] * 5)
    head = model.head.weight.detach().clone()
    steps = 25
    for step in range(steps):
        set_gradients(model, step)
        other.step()
        ours.step()
    assert selector.state.steps == steps and not torch.equal(model.head.weight, head)
    assert "rose" not in other.param_groups[0] and "rose" in ours.param_groups[0]
    selector.detach()


def test_an_optimizer_may_be_replaced():
    model = Blocks()
    selector = attach_rose(model, ROSEConfig(strategy="second_order", upper_quantile=0.5))
    for lr in (0.01, 0.02):
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
        for step in range(2):
            set_gradients(model, step)
            optimizer.step()
    assert selector.state.steps == 4
    selector.detach()


def test_clipping_comes_before_the_masks():
    model = Blocks()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    selector = attach_rose(model, ROSEConfig(strategy="second_order", upper_quantile=0.5))
    set_gradients(model, 0)
    optimizer.step()
    momenta_before = [optimizer.state[param]["exp_avg"].norm() for param in weights(model)]
    set_gradients(model, 1, scale=50.0)
    unclipped = [param.grad.norm() for param in weights(model)]
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    clipped = [param.grad.norm() for param in weights(model)]
    optimizer.step()
    scores = [abs(0.1 * float(g / m) - 1) for g, m in zip(clipped, momenta_before, strict=True)]
    assert selector.state.second_scores.tolist() == pytest.approx(scores, rel=1e-12)
    assert float(unclipped[0]) > 100 * float(clipped[0])
    selector.detach()


def test_a_unit_without_gradient_is_left_out_of_the_ranking():
    model = Blocks()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.5)
    selector = attach_rose(model, ROSEConfig(strategy="second_order", upper_quantile=0.5))
    set_gradients(model, 0)
    optimizer.step()
    set_gradients(model, 1)
    weights(model)[2].grad = None
    before = weights(model)[2].detach().clone()
    norms = {
        i: abs(0.1 * float(p.grad.norm() / optimizer.state[p]["exp_avg"].norm()) - 1)
        for i, p in enumerate(weights(model))
        if p.grad is not None
    }
    optimizer.step()
    expected, _ = reference.band(list(norms.values()), 0.0, 0.5)
    masks = selector.state.last_mask.tolist()
    assert [masks[i] for i in norms] == expected
    assert torch.equal(weights(model)[2], before)
    selector.detach()


# GradScaler -------------------------------------------------------------------------------------------------------


def scaled_run(fused: bool, strategy: str, overflow_at: int | None, scaler_on: bool = True, unscale: bool = False):
    """Five steps of a real model, with a scaler, and one more step in between whose gradients overflow."""
    model = tiny_bert()
    selector = attach_rose(model, ROSEConfig(strategy=strategy, upper_quantile=0.5))
    # Gradients of key biases are rounding errors (softmax does not see what is added to all keys), of some 1e-9: with
    # the usual eps they would move weights by a tenth of the learning rate, in a direction that the last bit decides.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), eps=1e-5, fused=fused, foreach=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaler_on)
    for step in range(5):
        for overflow in [True, False] if step == overflow_at else [False]:
            torch.manual_seed(100 + step)
            loss = model(**batch(model, seed=step)).loss
            scaler.scale(loss).backward()
            if overflow:
                model.classifier.weight.grad[0, 0] = math.inf
                before = copy.deepcopy(everything(model, selector, optimizer))
                started = bool(optimizer.state)
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            if overflow:
                after = everything(model, selector, optimizer)
                # A fused optimizer sets its state up even when it skips its first step.
                assert_same(after if started else after[:2], before if started else before[:2])
            optimizer.zero_grad()
    assert (scaler.get_scale() < 2.0**10) == (overflow_at is not None) or not scaler_on
    selector.detach()
    return everything(model, selector, optimizer)


@pytest.mark.parametrize("strategy", ["first_order", "second_order", "ensemble"])
@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
def test_an_overflow_step_leaves_no_trace(fused, strategy):
    plain = scaled_run(fused, strategy, None)
    for at in (0, 2):
        assert_same(scaled_run(fused, strategy, at), plain)


@pytest.mark.parametrize("strategy", ["second_order", "ensemble"])
@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
def test_scaled_gradients_give_the_same_masks_and_weights(fused, unscale, strategy):
    """Fused optimizers unscale inside the step, so gradients and their blend still carry the scale in our hook."""
    plain_weights, plain_state, _ = scaled_run(fused, strategy, None, scaler_on=False)
    weights_, state, _ = scaled_run(fused, strategy, None, unscale=unscale)
    assert torch.equal(state["mask_sum"], plain_state["mask_sum"])
    assert torch.equal(state["last_mask"], plain_state["last_mask"])
    torch.testing.assert_close(state["second_scores"], plain_state["second_scores"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weights_, plain_weights, rtol=1e-5, atol=1e-6)


class Compensated(torch.optim.Optimizer):
    """Adam that keeps what rounding has kept from the weights, for later steps to pay out (Kahan)."""

    def __init__(self, params, lr=1e-3):
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.999)})

    @torch.no_grad()
    def step(self, closure=None):
        for param in (param for group in self.param_groups for param in group["params"] if param.grad is not None):
            state = self.state[param]
            if not state:
                state |= {key: torch.zeros_like(param) for key in ("exp_avg", "exp_avg_sq", "kahan_comp")}
                state["compute_time"] = torch.zeros(())  # is none
            state["exp_avg"].mul_(0.9).add_(param.grad, alpha=0.1)
            state["exp_avg_sq"].mul_(0.999).addcmul_(param.grad, param.grad, value=0.001)
            owed = state["kahan_comp"].add_(state["exp_avg"] / state["exp_avg_sq"].sqrt().add_(1e-8), alpha=-1e-3)
            before = param.detach().clone()
            param.add_(owed)
            owed.add_(before - param)


@pytest.mark.parametrize("frozen_from", [0, 3], ids=["from the start", "later"])
def test_what_rounding_has_kept_back_is_masked_too(frozen_from):
    """It belongs to the weights: of a frozen unit it stays, of a unit with half a mask half of what came in does."""
    model = Blocks(dtype=torch.bfloat16)
    optimizer = Compensated(model.parameters())
    selector = steer(model, lambda step: [1, 0, 1, 0, 0.5] if step >= frozen_from else [1] * 5)

    def exact(param: Tensor) -> Tensor:
        owed = optimizer.state[param]["kahan_comp"] if param in optimizer.state else torch.zeros_like(param)
        return param.detach().double() + owed.double()

    def half_a_step(param: Tensor) -> Tensor:
        """Half of what a plain step with the blended gradient would do."""
        twin = param.detach().clone().requires_grad_()
        plain = Compensated([twin])
        plain.state[twin] = {key: value.clone() for key, value in optimizer.state.get(param, {}).items()}
        momentum = plain.state[twin].get("exp_avg", torch.zeros_like(param))
        twin.grad = torch.lerp(momentum, param.grad, 0.5)
        plain.step()
        return (twin.detach().double() + plain.state[twin]["kahan_comp"].double() + exact(param)) / 2

    for step in range(frozen_from + 6):
        set_gradients(model, step)
        before, half = [exact(param) for param in weights(model)], half_a_step(weights(model)[4])
        optimizer.step()
        after = [exact(param) for param in weights(model)]
        assert not torch.equal(after[0], before[0]) and not torch.equal(after[2], before[2])
        if step >= frozen_from:
            assert torch.equal(after[1], before[1]) and torch.equal(after[3], before[3])
            torch.testing.assert_close(after[4], half, rtol=0, atol=3e-5)
            assert float((half - before[4]).abs().max()) > 1e-3
    assert any(optimizer.state[param]["kahan_comp"].any() for param in weights(model))
    selector.detach()
