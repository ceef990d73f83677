"""Taken off and put on again, frozen and thawed, resumed: state starts anew or goes on, never from a stale copy."""

from __future__ import annotations

import copy
import gc
import pickle
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from rose_peft import ROSEConfig, RoseSelector, attach_rose, detach_rose, get_selector, plot_masks
from rose_peft.state import STATE_KEY
from tests.helpers.blocks import Blocks, set_gradients
from tests.helpers.held import held_tensors
from tests.helpers.tiny import tiny_bert
from tests.helpers.watching import backward, train_step, watched_step

STRATEGIES = ["first_order", "second_order", "ensemble"]


def config(**options) -> ROSEConfig:
    return ROSEConfig(**{"strategy": "first_order", "upper_quantile": 0.4, **options})


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


def go(model: nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> None:
    for seed in seeds:
        train_step(model, optimizer, seed)


def step_as_told(selector: RoseSelector, optimizer: torch.optim.Optimizer, seed: int) -> None:
    """One step, masked or not as the warm-up and the count say."""
    steps = selector.statistics().steps
    backward(selector.model, seed)
    if steps < selector.config.warmup_steps:
        optimizer.step()
        optimizer.zero_grad()
        assert set(selector.state.last_mask.tolist()) == {1.0}
        assert selector.statistics().steps == steps + 1
    else:
        watched_step(selector, optimizer.step, optimizer)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_other_targets_with_the_same_optimizer(strategy: str) -> None:
    """What the optimizer knows of other units is not taken for the state of these, nor for a broken checkpoint."""
    model = tiny_bert()
    optimizer = adamw(model)
    attach_rose(model, config(strategy=strategy, target_modules=["query", "key", "dense"]))
    go(model, optimizer, range(3))
    detach_rose(model)
    selector = attach_rose(model, config(strategy=strategy, target_modules=["value", "dense", "key"], warmup_steps=2))
    assert selector.statistics().steps == 0
    for seed in range(3, 8):
        step_as_told(selector, optimizer, seed)
    assert selector.statistics().steps == 5


@pytest.mark.parametrize("plain_steps", [0, 2])
def test_another_config_with_the_same_optimizer_starts_anew(plain_steps: int) -> None:
    """A selector of its own has statistics and a warm-up of its own; steps without ROSE in between count for none."""
    model = tiny_bert()
    optimizer = adamw(model)
    attach_rose(model, config())
    go(model, optimizer, range(3))
    detach_rose(model)
    go(model, optimizer, range(3, 3 + plain_steps))
    selector = attach_rose(model, config(upper_quantile=0.6, warmup_steps=2))
    for seed in range(10, 14):
        before = selector.statistics()
        step_as_told(selector, optimizer, seed)
        if before.steps:
            assert selector.statistics().steps == before.steps + 1
    assert selector.statistics().steps == 4
    assert selector.state.mask_history()[0][:2].tolist() == [[1.0] * len(selector.units)] * 2


def test_a_new_optimizer_then_the_old_one_again() -> None:
    """What lies in an optimizer that was put aside is out of date."""
    model = tiny_bert()
    old = adamw(model)
    attach_rose(model, config())
    go(model, old, range(3))
    detach_rose(model)
    selector = attach_rose(model, config(warmup_steps=1))
    new = adamw(model)
    go(model, new, range(3, 5))
    assert selector.statistics().steps == 2
    go(model, old, range(5, 6))
    assert selector.statistics().steps == 3
    step_as_told(selector, new, 6)
    assert selector.statistics().steps == 4


def test_a_new_optimizer_in_the_middle_goes_on() -> None:
    """The selector is the same, and so are its count and its warm-up."""
    model = tiny_bert()
    selector = attach_rose(model, config(warmup_steps=3))
    go(model, adamw(model), range(2))
    optimizer = adamw(model)
    for seed in range(2, 6):
        step_as_told(selector, optimizer, seed)
    assert selector.statistics().steps == 6


def by_block(model: nn.Module) -> torch.optim.Optimizer:
    """A group per block, as for learning rates that depend on depth; the rest comes last."""
    blocks = [list(block.parameters()) for block in model.bert.encoder.layer]
    inside = {id(param) for params in blocks for param in params}
    rest = [param for param in model.parameters() if id(param) not in inside]
    return torch.optim.AdamW([{"params": params} for params in (*blocks, rest)], lr=1e-2, weight_decay=0.1)


@pytest.mark.parametrize("first", [0, 1])
def test_a_block_frozen_after_resuming_and_thawed_again(first: int) -> None:
    """Which group the units lie in changes; the state is the one of all of them all the same."""

    def start() -> tuple[nn.Module, torch.optim.Optimizer, RoseSelector]:
        model = tiny_bert()
        return model, by_block(model), attach_rose(model, config(upper_quantile=0.5))

    def freeze(model: nn.Module, index: int, frozen: bool) -> None:
        model.bert.encoder.layer[index].requires_grad_(not frozen)

    def second_half(model: nn.Module, optimizer: torch.optim.Optimizer, selector: RoseSelector) -> None:
        freeze(model, first, True)
        go(model, optimizer, range(4, 6))
        assert selector.statistics().steps == 6
        freeze(model, first, False)
        for seed in range(6, 8):
            step_as_told(selector, optimizer, seed)
        assert selector.statistics().steps == 8

    model, optimizer, selector = start()
    go(model, optimizer, range(2))
    freeze(model, 1 - first, True)
    go(model, optimizer, range(2, 4))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    freeze(model, 1 - first, False)
    second_half(model, optimizer, selector)

    resumed, optimizer, again = start()
    resumed.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    second_half(resumed, optimizer, again)
    assert str(selector.statistics()) == str(again.statistics())
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), resumed.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_off_and_on_again_around_peft(kind: str) -> None:
    """`attach_rose` over the adapter that `get_peft_model` made, with a warm-up that starts there."""
    inner = LoraConfig(r=2, lora_alpha=8, target_modules=["query", "dense"]) if kind == "lora" else None
    model = get_peft_model(tiny_bert(), config(base_config=inner))
    optimizer = torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], lr=1e-2)
    go(model, optimizer, range(3))
    detach_rose(model)
    go(model, optimizer, range(3, 5))
    selector = attach_rose(model, config(warmup_steps=2))
    go(model, optimizer, range(5, 7))
    assert selector.statistics().steps == 2 and selector.statistics().kept_share == 1
    backward(model, 7)
    watched_step(selector, optimizer.step, optimizer)
    assert get_selector(model) is selector


def test_a_checkpoint_of_the_first_selector_is_welcome_to_one_like_it(tmp_path) -> None:
    """Resuming is loading: the count goes on where the file says, not where this process was."""
    model = tiny_bert()
    optimizer = adamw(model)
    attach_rose(model, config(warmup_steps=4))
    go(model, optimizer, range(3))
    torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "at_3")
    go(model, optimizer, range(3, 6))
    detach_rose(model)
    selector = attach_rose(model, config(warmup_steps=4))
    weights, state = torch.load(tmp_path / "at_3")
    model.load_state_dict(weights)
    optimizer = adamw(model)
    optimizer.load_state_dict(state)
    go(model, optimizer, range(3, 4))  # the step finds what was loaded, and is still warm-up
    assert selector.statistics().steps == 4 and selector.statistics().kept_share == 1
    step_as_told(selector, optimizer, 4)
    assert selector.statistics().steps == 5 and selector.statistics().last_kept_share < 1


def test_attaching_over_and_over_keeps_nothing_of_the_past() -> None:
    model = tiny_bert()
    optimizer = adamw(model)
    sizes = []
    for round_ in range(6):
        attach_rose(model, config(upper_quantile=0.3 + 0.1 * (round_ % 3)))
        go(model, optimizer, range(2 * round_, 2 * round_ + 2))
        detach_rose(model)
        gc.collect()
        sizes.append(held_tensors()[1])
    assert len(set(sizes[1:])) == 1, sizes


def test_an_adapter_loaded_again_starts_with_what_the_optimizer_says(tmp_path) -> None:
    """A resumed adapter and a new optimizer: nothing is left of the first one's count."""
    lora = LoraConfig(r=2, lora_alpha=8, target_modules=["query", "dense"])
    model = get_peft_model(tiny_bert(), config(base_config=lora))
    go(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2), range(3))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_bert(), tmp_path, is_trainable=True)
    selector = attach_rose(loaded, config(warmup_steps=1))
    optimizer = torch.optim.AdamW([p for p in loaded.parameters() if p.requires_grad], lr=1e-2)
    assert selector.statistics().steps == 0
    go(loaded, optimizer, range(1))
    assert selector.statistics().kept_share == 1
    backward(loaded, 1)
    watched_step(selector, optimizer.step, optimizer)


def test_a_copy_goes_by_the_settings_that_overruled_those_of_the_adapter(tmp_path) -> None:
    get_peft_model(tiny_bert(), config(strategy="second_order", upper_quantile=0.9)).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny_bert(), tmp_path, is_trainable=True).train()
    detach_rose(model)
    attach_rose(model, config())
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert (get_selector(copied).config.strategy, get_selector(copied).config.upper_quantile) == (
            "first_order",
            0.4,
        )


def test_groups_that_come_later_leave_one_state_in_the_optimizer(tmp_path: Path) -> None:
    """As in gradual unfreezing from the top: the first unit that the optimizer holds is another one each time."""
    model = Blocks()
    selector = attach_rose(model, ROSEConfig(strategy="second_order"))
    optimizer = torch.optim.AdamW(model.layers[-1].parameters(), lr=1e-2)
    for layer in reversed(model.layers[:-1]):
        optimizer.add_param_group({"params": list(layer.parameters())})
        set_gradients(model, 0)
        optimizer.step()
    held = [key for group in optimizer.param_groups for key in group.get(STATE_KEY, {})]
    assert len(held) == 1 and selector.statistics().steps == 4
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    assert plot_masks(str(tmp_path / "optimizer.pt")) is not None
