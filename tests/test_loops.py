"""The same model and data through every kind of training loop: each does to the last bit what the plain loop does.

Code of the loops is what their users write; only the order of the data and the draws of dropout are fixed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.data import DataLoader

from rose_peft import RoseCallback, ROSEConfig, UnsupportedOptimizerError, attach_rose, detach_rose
from rose_peft.selector import find_selector
from tests.helpers.loops import (
    ACCUMULATION,
    CLIP,
    PLAIN_SFT,
    SIZE,
    STEPS,
    InOrder,
    accelerate_loop,
    causal,
    classifier,
    fused_sft,
    lightning_loop,
    loader,
    next_tokens,
    optimizer_of,
    plain_loop,
    plain_sft_loop,
    risk_fields,
    sft_loop,
    sft_trainer,
    tiny_llama,
    trainer_loop,
)
from tests.helpers.tiny import tiny_bert

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
STRATEGIES = ("first_order", "second_order", "ensemble")
Loop = Callable[[nn.Module, Path], None]


def train(loop: Loop, model: nn.Module, folder: Path) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Train, check that masks do what they say at each step, and return them with the weights at the end."""
    selector = find_selector(model)
    masks: list[Tensor] = []
    before: list[list[Tensor]] = []
    passes = iter(range(10**6))

    def fix_draws(module: nn.Module, args: Any) -> None:
        # Loops draw from the global generator between the passes, each in its own way.
        if module.training and torch.is_grad_enabled():
            torch.manual_seed(next(passes))

    def remember(*_: Any) -> None:
        before[:] = [[param.detach().clone() for param in unit.parameters()] for unit in selector.units]

    def compare(*_: Any) -> None:
        masks.append(selector.state.last_mask.clone())
        for unit, share, old in zip(selector.units, masks[-1].tolist(), before, strict=True):
            same = [torch.equal(param, was) for param, was in zip(unit.parameters(), old, strict=True)]
            assert same and all(same) == (share == 0), f"{unit.name}: mask {share}, unmoved tensors {same}"

    handles = [model.register_forward_pre_hook(fix_draws)]
    if selector is not None:
        handles += [register_optimizer_step_pre_hook(remember), register_optimizer_step_post_hook(compare)]
    try:
        loop(model, folder)
    finally:
        for handle in handles:
            handle.remove()
    if selector is not None:
        assert len(masks) == STEPS == selector.statistics().steps
        assert all(((mask >= 0) & (mask <= 1)).all() for mask in masks)
        assert any((mask == 0).any() for mask in masks) and any((mask == 1).any() for mask in masks)
    return masks, {name: param.detach().clone() for name, param in model.named_parameters()}


def assert_same_training(one: tuple[list[Tensor], dict[str, Tensor]], two: tuple[list[Tensor], dict[str, Tensor]]):
    assert len(one[0]) == len(two[0]) and all(torch.equal(a, b) for a, b in zip(one[0], two[0], strict=True))
    assert one[1].keys() == two[1].keys()
    assert not [name for name in one[1] if not torch.equal(one[1][name], two[1][name])]


LOOPS = {"accelerate": accelerate_loop, "trainer": trainer_loop, "lightning": lightning_loop}


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("loop", LOOPS)
def test_a_loop_is_the_plain_loop(loop: str, strategy: str, lora: bool, tmp_path: Path) -> None:
    wanted = train(plain_loop, classifier(strategy, lora), tmp_path)
    assert_same_training(train(LOOPS[loop], classifier(strategy, lora), tmp_path), wanted)


@pytest.mark.parametrize("loop", LOOPS)
def test_without_rose_a_loop_is_plain_fine_tuning(loop: str, tmp_path: Path) -> None:
    """ROSE was taken off a wrapped model: one pass, no mask, and the weights of a model that never had it."""
    _, detached = train(LOOPS[loop], classifier(None), tmp_path)
    _, plain = train(plain_loop, tiny_bert(num_labels=2), tmp_path)
    wrappers = re.compile(r"^base_model\.model\.|\.(rose_copy|modules_to_save)\.default")
    copies = {wrappers.sub("", name): weight for name, weight in detached.items() if ".default." in name}
    assert copies.keys() == plain.keys()
    assert not [name for name in plain if not torch.equal(copies[name], plain[name])]


# The sampled risk pass -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loop", LOOPS)
def test_with_sampled_passes_too_a_loop_is_the_plain_loop(loop: str, tmp_path: Path) -> None:
    wanted = train(plain_loop, classifier(risk_pass="sampled"), tmp_path)
    assert_same_training(train(LOOPS[loop], classifier(risk_pass="sampled"), tmp_path), wanted)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("loop", ["plain", *LOOPS])
def test_sampled_passes_with_nothing_frozen_are_plain_fine_tuning(loop: str, lora: bool, tmp_path: Path) -> None:
    """Draws are not fixed here: they must be what they are without ROSE."""
    found = []
    for rose in (False, True):
        torch.manual_seed(0)
        model = classifier(lora=lora, risk_pass="sampled")
        selector = find_selector(model)
        if rose:
            selector.config.upper_quantile = 1.0
        else:
            detach_rose(model)
        torch.manual_seed(1)
        {"plain": plain_loop, **LOOPS}[loop](model, tmp_path)
        found.append({name: param.detach() for name, param in model.named_parameters()})
        found[-1]["draws"] = torch.get_rng_state()
    assert selector.statistics().steps == STEPS and selector.statistics().kept_share == 1
    assert (selector.state.risk_linear[0] > 0).all()
    assert not [name for name in found[0] if not torch.equal(found[0][name], found[1][name])]


def test_sampled_passes_are_resumed_by_accelerate(tmp_path: Path) -> None:
    """`save_state` and `load_state` and nothing else, at a step whose risk pass is due."""

    def start() -> tuple[Accelerator, nn.Module, torch.optim.Optimizer, Any]:
        accelerator = Accelerator(cpu=True)
        model = classifier(risk_pass="sampled").train()
        optimizer, _ = optimizer_of(model)
        return accelerator, *accelerator.prepare(model, optimizer, loader())

    def go_on(accelerator: Accelerator, model: nn.Module, optimizer: Any, batches: Any) -> None:
        for batch in batches:
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()

    torch.manual_seed(0)
    accelerator, model, optimizer, data = start()
    batches = list(data)
    go_on(accelerator, model, optimizer, batches[:4])
    accelerator.save_state(str(tmp_path))
    go_on(accelerator, model, optimizer, batches[4:])
    torch.manual_seed(99)
    again, other, resumed, _ = start()
    again.load_state(str(tmp_path))
    go_on(again, other, resumed, batches[4:])
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), other.parameters(), strict=True))
    states = [find_selector(each).state for each in (model, other)]
    assert int(states[0].steps) == len(batches) and torch.equal(states[0].risk_linear, states[1].risk_linear)
    assert torch.equal(states[0].mask_history()[0], states[1].mask_history()[0])


class Pattern(nn.Module):
    """Dropout with a fixed pattern per pass, the same in every row: what is left of it does not depend on batches."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * (torch.arange(x.shape[-1]) % 5 != self.calls % 2)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_accumulation_over_4_is_one_batch_of_four_times_the_size(strategy: str) -> None:
    """Norms of unequal parts do not add up to that of the whole: only in second order may the parts differ."""
    distinct = 16 if strategy == "second_order" else 4
    batches = [
        {key: value.repeat(16 // distinct, *[1] * (value.dim() - 1)) for key, value in batch.items()}
        for batch in list(DataLoader(InOrder(), batch_size=distinct))[:3]
    ]

    def run(parts: int) -> tuple[list[Tensor], dict[str, Tensor]]:
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=parts)
        model = tiny_bert(num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        model.dropout = pattern = Pattern()
        selector = attach_rose(model, ROSEConfig(strategy=strategy, upper_quantile=0.6))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-6)
        model, optimizer = accelerator.prepare(model, optimizer)
        masks = []
        for batch in batches:
            for part in range(parts):
                pattern.calls = 0
                with accelerator.accumulate(model):
                    accelerator.backward(model(**{key: value.chunk(parts)[part] for key, value in batch.items()}).loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), CLIP)
                    optimizer.step()
                    optimizer.zero_grad()
            masks.append(selector.state.last_mask.clone())
        return masks, {name: param.detach() for name, param in model.named_parameters()}

    (whole_masks, whole), (part_masks, parts) = run(1), run(4)
    assert all(torch.equal(one, two) for one, two in zip(whole_masks, part_masks, strict=True))
    assert all(0 < mask.mean() < 1 for mask in whole_masks[1:])
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)


def test_lightning_steps_with_a_closure_are_refused(tmp_path: Path) -> None:
    """Automatic optimization makes the gradients inside the step: that must not pass in silence."""
    with pytest.raises(UnsupportedOptimizerError, match="closure"):
        lightning_loop(classifier(), tmp_path, manual=False)


# TRL's SFTTrainer --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_sft_is_the_plain_loop(strategy: str, lora: bool, tmp_path: Path) -> None:
    wanted = train(plain_sft_loop, causal(strategy, lora), tmp_path)
    assert_same_training(train(sft_loop, causal(strategy, lora), tmp_path), wanted)


def test_sft_as_it_comes(tmp_path: Path) -> None:
    """TRL makes the adapter itself, with its defaults: bf16 and gradient checkpointing."""
    config = ROSEConfig(dropout=0.1, upper_quantile=0.4, base_config=LoraConfig(r=4, task_type="CAUSAL_LM"))
    trainer = sft_trainer(tiny_llama(), tmp_path, config)
    trainer.add_callback(RoseCallback())
    train(lambda model, folder: trainer.train(), trainer.model, tmp_path)


def test_sampled_passes_see_the_logits_that_sft_leaves_out(tmp_path: Path) -> None:
    """Small passes over some rows, every second step; the user's own pass stays the only one over all."""
    model = causal(risk_pass="sampled")
    trainer = sft_trainer(model, tmp_path, **PLAIN_SFT)
    sizes: list[int] = []
    layer = next(module for name, module in model.named_modules() if name.endswith("layers.0"))
    layer.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    trainer.train()
    statistics = find_selector(model).statistics()
    assert statistics.steps == STEPS and 0 < statistics.kept_share < 1 and statistics.whole_risk_passes == 0
    assert sizes.count(SIZE) == STEPS * ACCUMULATION
    assert sizes.count(2) == 3 * ACCUMULATION  # a row twice for each micro-batch of steps 0, 2 and 4
    assert sizes.count(1) == 2 * ACCUMULATION  # a closer look in step 0
    assert {*sizes} == {SIZE, 2, 1}


def test_sampled_passes_with_nothing_frozen_are_plain_sft(tmp_path: Path) -> None:
    inner = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)
    fields = {"upper_quantile": 1.0, "base_config": inner, **risk_fields("sampled")}
    found = []
    for rose in (False, True):
        model = get_peft_model(tiny_llama(), ROSEConfig(task_type="CAUSAL_LM", **fields))
        if not rose:
            detach_rose(model)
        torch.manual_seed(1)
        sft_trainer(model, tmp_path, **PLAIN_SFT).train()
        found.append(dict(model.named_parameters()))
    assert find_selector(model).statistics().steps == STEPS
    assert not [name for name in found[0] if not torch.equal(found[0][name], found[1][name])]


def test_a_pass_without_logits_is_ranked_by_two_more(tmp_path: Path) -> None:
    """As if its draws had been made before: the scores are those of the next two passes, which have logits."""

    def scores(fused: bool) -> Tensor:
        model = causal("first_order")
        sft_trainer(model, tmp_path)
        batch = next_tokens(next(iter(loader())))
        torch.manual_seed(0)
        if fused:
            (-model(**batch, fused_lm_head=True).log_probs.sum()).backward()
        else:
            with torch.no_grad():
                model(**batch)
            model(**batch).loss.backward()
        torch.optim.AdamW(model.parameters()).step()
        return find_selector(model).state.first_scores

    if not fused_sft():
        pytest.skip("this TRL has no head for log-probabilities")
    assert torch.equal(scores(fused=True), scores(fused=False)) and scores(fused=True).isfinite().all()
