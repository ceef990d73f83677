"""Masks that are known before the forward call: frozen units build no gradient, and everything else is as without."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from rose_peft import (
    FirstOrder,
    ROSEConfig,
    RoseConfigError,
    Scores,
    UnsupportedEngineError,
    attach_rose,
    detach_rose,
    get_selector,
)
from tests.helpers.steps import adamw
from tests.helpers.tiny import batch, tiny_bert
from tests.helpers.watching import assert_masks_acted


def skipping(**options) -> ROSEConfig:
    fields = {"strategy": "first_order", "risk_pass": "sampled", "upper_quantile": 0.5, "skip_frozen_gradients": True}
    return ROSEConfig(**{**fields, **options})


def forward_backward(model: nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    model(**batch(model, size=8, seed=seed)).loss.backward()


def test_frozen_units_have_no_gradient_and_do_not_move() -> None:
    model = tiny_bert()
    selector = attach_rose(model, skipping())
    optimizer = adamw(model, weight_decay=0.1)
    for step in range(8):
        forward_backward(model, step)
        without = {unit.name for unit in selector.units for param in unit.parameters() if param.grad is None}
        without |= {unit.name for unit in selector.units if not unit.parameters()}
        before = {unit.name: [m._parameters[n].detach().clone() for m, n in unit.slots] for unit in selector.units}
        optimizer.step()
        mask = dict(zip([unit.name for unit in selector.units], selector.state.last_mask.tolist(), strict=True))
        for unit in selector.units:
            same = all(
                torch.equal(m._parameters[n], old) for (m, n), old in zip(unit.slots, before[unit.name], strict=True)
            )
            assert same == (mask[unit.name] == 0)
        assert without == ({name for name, share in mask.items() if share == 0} if step else set())
        assert all(param.requires_grad for param in model.parameters())
        optimizer.zero_grad()
    statistics = selector.statistics()
    assert statistics.steps == 8 and 0.4 < statistics.kept_share < 0.7  # frozen units count as such
    assert int(selector.state.unit_steps.min()) == 8


def test_masks_follow_from_the_passes_before_the_step() -> None:
    """Each mask is the ranking by the average as the step before left it."""
    model = tiny_bert()
    selector = attach_rose(model, skipping(risk_interval=1))
    optimizer = adamw(model)
    average = None
    for step in range(6):
        forward_backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
        if average is not None:
            scores = (average[0] / average[1]).sqrt()
            kept = scores <= scores.float().quantile(0.5)
            assert torch.equal(selector.state.last_mask.bool(), kept)
        average = selector.state.risk_linear.clone()


def test_accumulation_keeps_one_plan_for_the_step() -> None:
    model = tiny_bert()
    selector = attach_rose(model, skipping(risk_interval=1))
    optimizer = adamw(model)
    for step in range(4):
        frozen: list[set[str]] = []
        for micro in range(3):
            forward_backward(model, 10 * step + micro)
            units = [(unit.name, param) for unit in selector.units for param in unit.parameters()]
            frozen.append({name for name, param in units if param.grad is None})
        assert frozen[0] == frozen[1] == frozen[2] and bool(frozen[0]) == (step > 0)
        optimizer.step()
        optimizer.zero_grad()


def test_gradients_of_the_others_are_those_of_plain_training() -> None:
    model, plain = tiny_bert(), tiny_bert()
    attach_rose(model, skipping())
    optimizer = adamw(model, lr=0.0)
    forward_backward(model, 0)
    optimizer.step()
    optimizer.zero_grad()
    forward_backward(model, 1)
    forward_backward(plain, 1)
    found = [(a.grad, b.grad) for a, b in zip(model.parameters(), plain.parameters(), strict=True)]
    assert any(a is None for a, _ in found)
    assert all(torch.equal(a, b) for a, b in found if a is not None)


def test_gradients_left_at_zero_do_not_move_frozen_units() -> None:
    model = tiny_bert()
    selector = attach_rose(model, skipping())
    optimizer = adamw(model, weight_decay=0.1)
    for step in range(4):
        forward_backward(model, step)
        before = [[m._parameters[n].detach().clone() for m, n in unit.slots] for unit in selector.units]
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        for unit, old, share in zip(selector.units, before, selector.state.last_mask.tolist(), strict=True):
            same = [torch.equal(m._parameters[n], o) for (m, n), o in zip(unit.slots, old, strict=True)]
            assert all(same) == (share == 0)


def test_detaching_between_forward_and_step_gives_the_gradients_back() -> None:
    model = tiny_bert()
    attach_rose(model, skipping())
    optimizer = adamw(model)
    forward_backward(model, 0)
    optimizer.step()
    optimizer.zero_grad()
    forward_backward(model, 1)
    assert not all(param.grad is not None for param in model.bert.encoder.parameters())
    detach_rose(model)
    optimizer.zero_grad()
    forward_backward(model, 2)
    assert all(param.grad is not None for param in model.bert.encoder.parameters())


def test_a_layer_that_the_user_froze_stays_frozen() -> None:
    model = tiny_bert()
    attach_rose(model, skipping())
    model.bert.encoder.layer[0].requires_grad_(False)
    optimizer = adamw(model)
    for step in range(3):
        forward_backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
        assert not any(param.requires_grad for param in model.bert.encoder.layer[0].parameters())


class Asking(FirstOrder):
    """Wants a norm of the step that has not begun."""

    def tensors(self, stepping):
        return ([(entry.index, entry.gradient) for entry in stepping],)


def test_a_score_that_asks_for_norms_of_the_step_is_refused() -> None:
    model = tiny_bert()
    attach_rose(model, skipping(), scores=Scores(first_order=Asking()))
    optimizer = adamw(model)
    forward_backward(model, 0)
    optimizer.step()
    with pytest.raises(RoseConfigError, match=r"skip_frozen_gradients=True.*Asking"):
        forward_backward(model, 1)


@pytest.mark.parametrize("options", [{"strategy": "ensemble"}, {"risk_pass": "paired"}])
def test_strategies_that_need_every_gradient_are_refused(options: dict[str, str]) -> None:
    with pytest.raises(RoseConfigError, match=r"skip_frozen_gradients=True.*first_order.*sampled"):
        skipping(**options)


def test_a_forward_call_that_raises_leaves_everything_training() -> None:
    model = tiny_bert()
    attach_rose(model, skipping())
    optimizer = adamw(model)
    forward_backward(model, 0)
    optimizer.step()

    def out_of_memory(*args: object) -> None:
        held_back.append(any(not param.requires_grad for param in model.parameters()))
        raise torch.OutOfMemoryError

    held_back: list[bool] = []
    handle = model.classifier.register_forward_pre_hook(out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        forward_backward(model, 1)
    handle.remove()
    assert held_back == [True]
    assert all(param.requires_grad for param in model.parameters())


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_interrupt_is_told_of_at_the_next_call(where: str) -> None:
    """torch runs no hook then; whoever makes an optimizer from what requires gradients would leave units out."""
    model = tiny_bert()
    attach_rose(model, skipping())
    optimizer = adamw(model)
    forward_backward(model, 0)
    optimizer.step()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    block = model.bert.encoder.layer[1].output
    if where == "forward":
        handle = block.register_forward_pre_hook(interrupt)
    else:
        handle = block.register_forward_hook(lambda module, args, output: output.register_hook(interrupt) and None)
    with pytest.raises(KeyboardInterrupt):
        forward_backward(model, 1)
    handle.remove()
    assert not all(param.requires_grad for param in model.parameters())
    with torch.no_grad(), pytest.warns(UserWarning, match="interrupted while frozen units were held back"):
        model(**batch(model, size=8, seed=1))
    assert all(param.requires_grad for param in model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        forward_backward(model, 1)


def test_where_everything_is_frozen_gradients_are_built_all_the_same() -> None:
    """Over an adapter nothing else trains, and a loss without a graph would have no backward pass."""
    over = LoraConfig(r=2, target_modules=["query"])
    model = get_peft_model(tiny_bert(), skipping(base_config=over, lower_quantile=0.4, upper_quantile=0.6))
    model.train()
    optimizer = torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], lr=1e-2)
    for step in range(4):
        forward_backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
    assert get_selector(model).state.last_mask.sum() == 0  # two units, and none lies between the quantiles


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def compiled_in_part(model: nn.Module) -> nn.Module:
    model.bert.encoder.layer[0].compile(backend="eager")
    return model


def compiled_from_outside(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize("compiled", [compiled_in_place, compiled_in_part, compiled_from_outside])
def test_compiled_models_are_refused(compiled: Callable[[nn.Module], nn.Module]) -> None:
    model = tiny_bert()
    attach_rose(model, skipping())
    model = compiled(model)
    with pytest.raises(UnsupportedEngineError, match=r"skip_frozen_gradients=True.*compiled"):
        model(**batch(model))


def test_models_compiled_before_get_peft_model_are_refused() -> None:
    model = get_peft_model(torch.compile(tiny_bert(), backend="eager"), skipping())
    with pytest.raises(UnsupportedEngineError, match=r"skip_frozen_gradients=True.*compiled"):
        model(**batch(model))


def test_models_that_are_not_compiled_train_beside_compiled_ones() -> None:
    torch.compile(nn.Linear(2, 2), backend="eager")(torch.ones(1, 2))
    model = tiny_bert()
    attach_rose(model, skipping())
    forward_backward(model, 0)


def test_resumed_equals_uninterrupted_once_the_state_is_restored() -> None:
    def run(steps: range, saved: tuple[dict, dict] | None = None) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = tiny_bert()
        selector = attach_rose(model, skipping())
        optimizer = adamw(model)
        if saved is not None:
            model.load_state_dict(saved[0])
            optimizer.load_state_dict(copy.deepcopy(saved[1]))
            selector.restore(optimizer)
        for step in steps:
            forward_backward(model, step)
            optimizer.step()
            optimizer.zero_grad()
        return model, optimizer

    whole, _ = run(range(7))
    half, optimizer = run(range(3))
    resumed, _ = run(range(3, 7), (half.state_dict(), optimizer.state_dict()))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


@pytest.mark.parametrize("lora", [True, False])
def test_a_reference_pass_before_a_backward_that_computes_again(lora: bool) -> None:
    """PEFT lets everything train when the adapter is back; checkpoints must find what they left."""
    inner = LoraConfig(r=2, target_modules=["query", "value"]) if lora else None
    model = get_peft_model(tiny_bert(), skipping(base_config=inner)).train()
    base = model.base_model.model
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], lr=1e-2)
    selector = get_selector(model)
    for step in range(3):
        torch.manual_seed(step)
        loss = model(**batch(base, size=8, seed=step)).loss
        with torch.no_grad(), model.disable_adapter():
            model(**batch(base, size=8, seed=step))
        loss.backward()
        before = {unit.name: [m._parameters[n].detach().clone() for m, n in unit.slots] for unit in selector.units}
        optimizer.step()
        optimizer.zero_grad()
        if step:
            assert_masks_acted(selector, before)


def with_a_leftover() -> tuple[nn.Module, torch.optim.Optimizer, list[torch.Tensor]]:
    """A model after three steps and one micro-batch more, its optimizer, and what was held back in that one."""
    model = tiny_bert()
    selector = attach_rose(model, skipping())
    optimizer = adamw(model)
    for step in range(3):
        forward_backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
    forward_backward(model, 3)
    return model, optimizer, [p for unit in selector.units for p in unit.parameters() if p.grad is None]


def test_between_calls_parameters_say_whether_they_train() -> None:
    """A loop that ends on a leftover micro-batch makes its next optimizer from what requires a gradient."""
    model, _, held_back = with_a_leftover()
    assert held_back and all(param.requires_grad for param in model.parameters())


def test_what_the_user_freezes_stays_frozen() -> None:
    model, optimizer, (frozen, *_) = with_a_leftover()
    frozen.requires_grad_(False)
    before = frozen.detach().clone()
    for step in range(4, 8):
        forward_backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
    assert not frozen.requires_grad and torch.equal(frozen, before)
