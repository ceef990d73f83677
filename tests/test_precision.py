"""Every precision ranks as float64 does and freezes to the last bit, and a step that overflows leaves no trace."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from rose_peft import ROSEConfig, attach_rose, get_selector
from tests.helpers.comparing import assert_same, everything
from tests.helpers.tiny import batch, tiny_bert
from tests.helpers.training import train_watched

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
STRATEGIES = ("first_order", "second_order", "ensemble")


@dataclass(frozen=True)
class Precision:
    """How a model is kept and computed, and how far its scores may be from those of float64."""

    weights: torch.dtype
    autocast: torch.dtype | None = None
    tolerance: float = 0.0

    def computed(self) -> Any:
        return torch.autocast("cpu", dtype=self.autocast) if self.autocast else nullcontext()


PRECISIONS = {
    "float64": Precision(torch.float64),
    "float32": Precision(torch.float32, tolerance=1e-5),
    "bf16 autocast": Precision(torch.float32, torch.bfloat16, tolerance=0.1),
    "fp16 autocast": Precision(torch.float32, torch.float16, tolerance=0.01),
    "bf16 weights": Precision(torch.bfloat16, tolerance=0.1),
    "fp16 weights": Precision(torch.float16, tolerance=0.02),
}


def base(dtype: torch.dtype = torch.float32) -> nn.Module:
    """The same weights in every dtype."""
    return tiny_bert(num_labels=2).to(torch.bfloat16).to(torch.float16).to(dtype)


def scores(precision: Precision) -> tuple[Tensor, Tensor]:
    """First-order scores of the first step and second-order scores of the second, from the same draws."""
    model = base(precision.weights)
    selector = attach_rose(model, ROSEConfig(strategy="ensemble"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, eps=1e-4)  # the usual eps is zero in float16
    first = []
    for step in range(2):
        torch.manual_seed(step)
        with precision.computed():
            loss = model(**batch(model, seed=step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        first.append(selector.state.first_scores.double())
    assert selector.statistics().skipped_risk_passes == 0
    return first[0], selector.state.second_scores.double()


@pytest.mark.parametrize("name", PRECISIONS)
def test_scores_are_those_of_float64(name: str) -> None:
    for ours, exact in zip(scores(PRECISIONS[name]), scores(PRECISIONS["float64"]), strict=True):
        torch.testing.assert_close(ours, exact, rtol=PRECISIONS[name].tolerance, atol=0)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", PRECISIONS)
def test_masks_act_in_every_precision(name: str, strategy: str, lora: bool) -> None:
    inner = LoraConfig(r=4, target_modules=["query", "value", "dense"]) if lora else None
    precision = PRECISIONS[name]
    config = ROSEConfig(task_type="SEQ_CLS", base_config=inner, strategy=strategy, upper_quantile=0.6)
    model = get_peft_model(base(precision.weights), config)
    with precision.computed():
        masks = train_watched(model, batch(model), steps=4)
    assert any((mask == 0).any() for mask in masks) and any((mask > 0).any() for mask in masks)
    # The first scale may be too large for weights in float16, which is noticed and halved.
    assert get_selector(model).statistics().skipped_risk_passes <= (precision.weights == torch.float16)


# Through Accelerate ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_bf16_of_accelerate_is_autocast(strategy: str) -> None:
    def run(accelerate: bool) -> Any:
        model = base()
        selector = attach_rose(model, ROSEConfig(strategy=strategy, upper_quantile=0.6))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        network, stepper = model, optimizer
        if accelerate:
            accelerator = Accelerator(cpu=True, mixed_precision="bf16")
            network, stepper = accelerator.prepare(model, optimizer)
        for step in range(4):
            torch.manual_seed(step)
            # Accelerate goes in and out of autocast for each pass, so casts of weights are never shared by two.
            around = torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False)
            with nullcontext() if accelerate else around:
                output = network(**batch(model, seed=step))
            assert output.logits.dtype == (torch.float32 if accelerate else torch.bfloat16)
            accelerator.backward(output.loss) if accelerate else output.loss.backward()
            stepper.step()
            stepper.zero_grad()
        assert 0 < selector.statistics().kept_share < 1
        return everything(model, selector, optimizer)

    assert_same(run(True), run(False))


# Steps that overflow -----------------------------------------------------------------------------------------------


Try = tuple[float, int]


def overflowing_run(strategy: str, accelerate: bool, tries: list[Try]) -> tuple[Any, list[Try], int]:
    """One step per loss scale and seed in fp16 autocast, tried again with the next seed where it overflows."""
    model = base()
    selector = attach_rose(model, ROSEConfig(strategy=strategy, upper_quantile=0.6))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu")
    network, stepper = model, optimizer
    if accelerate:
        accelerator = Accelerator(cpu=True)
        accelerator.scaler = scaler  # Accelerate itself makes one on a GPU only
        network, stepper = accelerator.prepare(model, optimizer)
    taken, overflows = [], 0
    for step, (scale, seed) in enumerate(tries):
        scaler.scale(torch.zeros(()))  # has the scaler set itself up
        scaler.update(scale)
        while len(taken) == step:
            torch.manual_seed(seed)
            with torch.autocast("cpu", dtype=torch.float16):
                loss = network(**batch(model, seed=seed)).loss
            before, tried = copy.deepcopy(everything(model, selector, optimizer)), scaler.get_scale()
            if accelerate:
                accelerator.backward(loss)
                stepper.step()
            else:
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
            if scaler.get_scale() < tried:
                overflows, seed = overflows + 1, seed + 1
                assert_same(everything(model, selector, optimizer), before)
            else:
                taken.append((tried, seed))
            stepper.zero_grad()
    assert selector.statistics().steps == len(tries)
    return everything(model, selector, optimizer), taken, overflows


@pytest.mark.parametrize("accelerate", [False, True], ids=["loop", "accelerate"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_step_that_overflows_in_fp16_leaves_no_trace(strategy: str, accelerate: bool) -> None:
    tries = [(2.0**20, 0), (2.0**8, 100), (2.0**20, 200), (2.0**8, 300)]
    result, taken, overflows = overflowing_run(strategy, accelerate, tries)
    assert overflows >= 2 and taken[0][0] < 2.0**20 and taken[2][0] < 2.0**20
    undisturbed, _, none = overflowing_run(strategy, accelerate, taken)
    assert none == 0
    assert_same(result, undisturbed)


# Optimizers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_fused_foreach_and_loop_optimizers_agree(strategy: str) -> None:
    def run(**implementation: bool) -> tuple[list[Tensor], dict[str, Tensor]]:
        model = base()
        selector = attach_rose(model, ROSEConfig(strategy=strategy, upper_quantile=0.6))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, **implementation)
        masks = []
        for step in range(6):
            torch.manual_seed(step)
            model(**batch(model, seed=step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            masks.append(selector.state.last_mask.clone())
        # Softmax cancels key biases: their gradient is rounding noise, of which Adam makes full steps.
        return masks, {name: param.detach() for name, param in model.named_parameters() if "key.bias" not in name}

    masks, weights = run(foreach=False)
    assert any((mask == 0).any() for mask in masks)
    for implementation in ("foreach", "fused"):
        other_masks, other_weights = run(**{implementation: True})
        assert all(torch.equal(one, two) for one, two in zip(masks, other_masks, strict=True)), implementation
        torch.testing.assert_close(other_weights, weights, rtol=1e-4, atol=1e-6)
