"""Adapters that take turns: each has its own state and window, whoever looks in between does no harm."""

from __future__ import annotations

import copy
import gc
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from rose_peft import ROSEConfig, RoseSelector, attach_rose, get_selector
from tests.helpers.held import held_tensors
from tests.helpers.tiny import batch, tiny_bert
from tests.helpers.watching import assert_masks_acted, backward, train_step, unit_weights, watched_step

KINDS = ["lora", "full"]
WARMUP = 2


def two_adapters(kind: str, **options) -> PeftModel:
    """Adapters "default" (active) and "other", steered alike."""

    def config() -> ROSEConfig:
        inner = LoraConfig(r=2, lora_alpha=8, target_modules=["query", "dense"]) if kind == "lora" else None
        return ROSEConfig(**{"upper_quantile": 0.5, "strategy": "first_order", "base_config": inner, **options})

    model = get_peft_model(tiny_bert(), config())
    # Over an inner config PEFT knows adapters of that method only.
    further = LoraConfig(r=2, lora_alpha=8, target_modules=["query", "dense"]) if kind == "lora" else config()
    torch.manual_seed(1)
    model.add_adapter("other", further)
    model.set_adapter("default")
    return model


def optimizer_of(model: PeftModel) -> torch.optim.Optimizer:
    """One for both adapters; PEFT lets only the active one train, so each is asked for in turn."""
    params: dict[int, Tensor] = {}
    for name in ("other", "default"):
        model.set_adapter(name)
        params |= {id(param): param for param in model.parameters() if param.requires_grad}
    return torch.optim.AdamW(params.values(), lr=1e-2, weight_decay=0.1)


def select(model: PeftModel, name: str) -> RoseSelector:
    model.set_adapter(name)
    return get_selector(model)


@pytest.mark.parametrize("strategy", ["first_order", "second_order"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_that_are_set_to_zero_belong_to_no_step(kind: str, strategy: str) -> None:
    """The adapter whose turn it is not keeps gradients of zero, and is no adapter without a risk pass."""
    model = two_adapters(kind, strategy=strategy)
    optimizer = optimizer_of(model)
    for seed in range(6):
        selector = select(model, ("default", "other")[seed % 2])
        optimizer.zero_grad(set_to_none=False)
        backward(model, seed)
        before = unit_weights(selector)
        optimizer.step()
        if seed > 1:  # after the first step of each there is momentum
            assert_masks_acted(selector, before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_switch_between_backward_and_step(kind: str) -> None:
    """Zeros that the other adapter's last step left on it come from no pass that went past ROSE."""
    model = two_adapters(kind)
    optimizer = optimizer_of(model)
    for seed, name in enumerate(("other", "default")):
        selector = select(model, name)
        backward(model, seed)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    backward(model, 2)
    before = unit_weights(selector)
    model.set_adapter("other")
    optimizer.step()
    model.set_adapter("default")
    assert_masks_acted(selector, before)


@pytest.mark.parametrize("kind", KINDS)
def test_warm_up_ends_for_each_adapter_after_its_own_steps(kind: str) -> None:
    """Alternating tasks: warm-up is counted by adapter, and masks act from then on."""
    model = two_adapters(kind, warmup_steps=WARMUP)
    optimizer = optimizer_of(model)
    for seed in range(8):
        selector = select(model, ("default", "other")[seed % 2])
        backward(model, seed)
        if seed // 2 < WARMUP:
            optimizer.step()
            optimizer.zero_grad()
            assert selector.state.last_mask.tolist() == [1.0] * len(selector.units), f"step {seed} is still warm-up"
        else:
            watched_step(selector, optimizer.step, optimizer)
        assert get_selector(model).statistics().steps == seed // 2 + 1


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_that_starts_late_has_a_warm_up_of_its_own(kind: str) -> None:
    model = two_adapters(kind, warmup_steps=WARMUP)
    optimizer = optimizer_of(model)
    for seed in range(4):
        train_step(model, optimizer, seed)
    assert get_selector(model).statistics().steps == 4
    selector = select(model, "other")
    train_step(model, optimizer, 4)
    assert (selector.statistics().steps, selector.statistics().kept_share) == (1, 1.0)
    assert select(model, "default").statistics().steps == 4


@pytest.mark.parametrize("strategy", ["first_order", "second_order", "ensemble"])
@pytest.mark.parametrize("kind", KINDS)
def test_taking_turns_is_training_one_after_the_other(kind: str, strategy: str) -> None:
    """Steps of one adapter leave the other's weights, masks and statistics as they would be without them."""

    def run(order: list[tuple[str, int]]) -> tuple[PeftModel, dict[str, tuple[int, Tensor]]]:
        model = two_adapters(kind, strategy=strategy, warmup_steps=1)
        optimizer = optimizer_of(model)
        for name, seed in order:
            model.set_adapter(name)
            train_step(model, optimizer, seed)
        seen = {}
        for name in ("default", "other"):
            selector = select(model, name)
            seen[name] = selector.statistics().steps, selector.state.mask_history()[0]
        return model, seen

    alone = [(name, seed) for name in ("default", "other") for seed in range(4)]
    one, seen_one = run(alone)
    two, seen_two = run(sorted(alone, key=lambda turn: turn[1]))
    for name, param in one.named_parameters():
        assert torch.equal(param, dict(two.named_parameters())[name]), name
    for name, (steps, history) in seen_one.items():
        assert seen_two[name][0] == steps == 4
        assert torch.equal(seen_two[name][1], history)
        assert (history[1:] < 1).any()


@pytest.mark.parametrize("kind", KINDS)
def test_turns_are_resumed_from_a_checkpoint(kind: str) -> None:
    """Which of the two saved states is whose must not depend on who is active when they are loaded."""

    def start() -> tuple[PeftModel, torch.optim.Optimizer]:
        model = two_adapters(kind, warmup_steps=1)
        return model, optimizer_of(model)

    def go(model: PeftModel, optimizer: torch.optim.Optimizer, turns: list[str], first: int) -> None:
        for seed, name in enumerate(turns, first):
            model.set_adapter(name)
            train_step(model, optimizer, seed)

    before, after = ["default", "default", "other", "default"], ["other", "default", "other"]
    whole, optimizer = start()
    go(whole, optimizer, before, 0)
    saved = copy.deepcopy((whole.state_dict(), optimizer.state_dict()))
    go(whole, optimizer, after, len(before))
    resumed, optimizer = start()
    resumed.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    go(resumed, optimizer, after, len(before))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
    for name, steps in (("default", 4), ("other", 3)):
        # By what they look like: scores that are not known yet are NaN, which equals nothing.
        assert str(select(whole, name).statistics()) == str(select(resumed, name).statistics())
        assert select(resumed, name).statistics().steps == steps


@pytest.mark.parametrize("kind", KINDS)
def test_switching_leaks_nothing(kind: str) -> None:
    model = two_adapters(kind)
    optimizer = optimizer_of(model)
    held = []
    for seed in range(40):
        model.set_adapter(("default", "other")[seed % 2])
        train_step(model, optimizer, seed)
        if seed % 10 == 9:
            gc.collect()
            held.append(held_tensors())
    assert len(set(held[1:])) == 1, held


def reference(model: PeftModel, way: str) -> AbstractContextManager[object]:
    """Make another adapter, or none, speak for a while."""
    if way == "disabled":
        return model.disable_adapter()
    if way == "other":
        model.set_adapter("other")
    return nullcontext()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("way", ["other", "disabled"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_reference_pass_between_forward_and_backward_is_harmless(kind: str, way: str, training: bool) -> None:
    """As for preference losses: the answers of a frozen adapter, or of the base model, without gradients."""

    def run(with_reference: bool) -> PeftModel:
        model = two_adapters(kind)
        optimizer = optimizer_of(model)
        selector = get_selector(model)
        for seed in range(4):
            torch.manual_seed(seed)
            loss = model(**batch(model, seed=seed)).loss
            if with_reference:
                model.train(training)
                with torch.random.fork_rng(), torch.no_grad(), reference(model, way):
                    model(**batch(model, seed=100 + seed))
                model.set_adapter("default")
                model.train()
            loss.backward()
            selector = get_selector(model)
            watched_step(selector, optimizer.step, optimizer)
        assert selector.statistics().steps == 4
        return model

    plain, watched = run(False), run(True)
    for name, param in plain.named_parameters():
        assert torch.equal(param, dict(watched.named_parameters())[name]), name
    assert str(get_selector(plain).statistics()) == str(get_selector(watched).statistics())


class Towers(torch.nn.Module):
    """Two LoRA models side by side, both with an adapter called "default"."""

    def __init__(self) -> None:
        super().__init__()
        lora = LoraConfig(r=2, lora_alpha=8, target_modules=["query", "dense"], init_lora_weights=False)
        self.a, self.b = (get_peft_model(tiny_bert(seed), lora) for seed in (0, 1))

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        outputs = self.a(**inputs), self.b(**inputs)
        return {"loss": outputs[0].loss + outputs[1].loss, "logits": outputs[0].logits + outputs[1].logits}


@pytest.mark.parametrize("resting", ["a", "b"])
def test_one_tower_trains_while_the_other_ones_adapter_rests(resting: str) -> None:
    model = Towers().train()
    selector = attach_rose(model, ROSEConfig(upper_quantile=0.5))
    optimizer = torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], lr=1e-2)
    getattr(model, resting).merge_adapter()
    for step in range(2):
        model(**batch(model.a, seed=step))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = selector.state.unit_steps > 0
    assert selector.statistics().steps == 2
    assert [unit.name.startswith(f"{resting}.") for unit in selector.units] == (~trained).tolist()
