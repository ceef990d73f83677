"""Two models at a time: in one optimizer, in one parameter group, in one process group."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from rose_peft import ROSEConfig, attach_rose, get_selector
from tests.distributed import processes
from tests.helpers import independent
from tests.helpers.tiny import tiny_bert
from tests.helpers.watching import assert_masks_acted, backward, unit_weights

STRATEGIES = ["first_order", "second_order", "ensemble"]
# Which of the two models has gradients in each step; the second one has fewer steps, and its turns come late.
TURNS = [(0,), (0, 1), (0,), (1,), (0, 1), (0, 1)]


def models(kind: str, strategy: str) -> list[nn.Module]:
    """Two models that differ in nothing but their weights, steered with different bands."""
    made = []
    for seed, upper in enumerate((0.3, 0.6)):
        config = ROSEConfig(strategy=strategy, upper_quantile=upper, warmup_steps=1)
        if kind == "attach":
            made.append(tiny_bert(seed=seed))
            attach_rose(made[-1], config)
        else:
            lora = LoraConfig(r=2, lora_alpha=8, target_modules=["query", "dense"])
            torch.manual_seed(seed)
            config.base_config = lora if kind == "lora" else None
            made.append(get_peft_model(tiny_bert(seed=seed), config))
    return made


def optimizer_of(pair: list[nn.Module], layout: str) -> torch.optim.Optimizer:
    trained = [[param for param in model.parameters() if param.requires_grad] for model in pair]
    if layout == "one group":
        trained = [[param for params in trained for param in params]]
    groups = [{"params": params} for params in trained]
    return torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1)


def go(pair: list[nn.Module], optimizer: torch.optim.Optimizer, turns: range) -> None:
    """Take those steps, and check the masks of each model that had gradients."""
    for step in turns:
        for index in TURNS[step]:
            backward(pair[index], step)
        before = {index: unit_weights(get_selector(pair[index])) for index in TURNS[step]}
        counts = {index: get_selector(pair[index]).statistics().steps for index in TURNS[step]}
        optimizer.step()
        optimizer.zero_grad()
        for index, count in counts.items():
            selector = get_selector(pair[index])
            assert selector.statistics().steps == count + 1
            if count >= (2 if selector.config.strategy == "second_order" else 1):
                assert_masks_acted(selector, before[index])


def alone(kind: str, strategy: str, index: int) -> nn.Module:
    """The same training of one of the models, with an optimizer of its own."""
    model = models(kind, strategy)[index]
    optimizer = optimizer_of([model], "one group")
    for step, turn in enumerate(TURNS):
        if index in turn:
            backward(model, step)
            optimizer.step()
            optimizer.zero_grad()
    return model


def assert_same(one: nn.Module, other: nn.Module) -> None:
    assert str(get_selector(one).statistics()) == str(get_selector(other).statistics())
    assert torch.equal(get_selector(one).state.mask_history()[0], get_selector(other).state.mask_history()[0])
    for name, param in one.named_parameters():
        assert torch.equal(param, dict(other.named_parameters())[name]), name


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("layout", ["one group", "two groups"])
@pytest.mark.parametrize("kind", ["attach", "full", "lora"])
def test_two_models_in_one_optimizer_are_as_each_by_itself(kind: str, layout: str, strategy: str) -> None:
    pair = models(kind, strategy)
    go(pair, optimizer_of(pair, layout), range(len(TURNS)))
    assert [get_selector(model).statistics().steps for model in pair] == [5, 4]
    for index, model in enumerate(pair):
        assert_same(model, alone(kind, strategy, index))


@pytest.mark.parametrize("at", [1, 3, 5])
@pytest.mark.parametrize("layout", ["one group", "two groups"])
@pytest.mark.parametrize("kind", ["attach", "lora"])
def test_two_models_in_one_optimizer_are_resumed(kind: str, layout: str, at: int) -> None:
    """From a file, into models and an optimizer that were made in the same order."""
    whole = models(kind, "ensemble")
    optimizer = optimizer_of(whole, layout)
    go(whole, optimizer, range(at))
    file = io.BytesIO()
    torch.save([[model.state_dict() for model in whole], optimizer.state_dict()], file)
    go(whole, optimizer, range(at, len(TURNS)))
    file.seek(0)
    weights, state = torch.load(file)
    resumed = models(kind, "ensemble")
    for model, own in zip(resumed, weights, strict=True):
        model.load_state_dict(own)
    optimizer = optimizer_of(resumed, layout)
    optimizer.load_state_dict(copy.deepcopy(state))
    for model in resumed:
        get_selector(model).restore(optimizer)
    go(resumed, optimizer, range(at, len(TURNS)))
    for one, other in zip(whole, resumed, strict=True):
        assert_same(one, other)


# One process group ---------------------------------------------------------------------------------------------------


def masks_of(ranks: int, way: str, folder: Path) -> list[Tensor]:
    """Run that many processes and return the masks of each."""
    output = folder / "out"
    codes = processes.wait(processes.start(ranks, ["-m", "tests.helpers.independent", way, str(output)], output), 120)
    said = [Path(f"{output}.{rank}").read_text()[-2000:] for rank in range(ranks)]
    assert codes == [0] * ranks, "\n".join(said)
    return [torch.load(f"{output}.masks.{rank}") for rank in range(ranks)]


@pytest.mark.distributed
def test_a_model_per_process_is_not_mixed_with_the_others(tmp_path: Path) -> None:
    """With different weights, data and numbers of steps; nobody waits for anybody."""
    for rank, masks in enumerate(masks_of(2, "alone", tmp_path)):
        expected = independent.train(tiny_bert(seed=rank), [rank], independent.STEPS + rank)
        assert torch.equal(masks, expected), f"rank {rank}"


@pytest.mark.distributed
def test_processes_that_train_one_model_by_hand_can_be_given(tmp_path: Path) -> None:
    expected = independent.train(tiny_bert(), [0, 1])
    for rank, masks in enumerate(masks_of(2, "given", tmp_path)):
        assert torch.equal(masks, expected), f"rank {rank}"


@pytest.mark.distributed
def test_sums_run_over_the_group_of_the_engine_only(tmp_path: Path) -> None:
    """Two of three processes share a model under DDP, the third has its own."""
    together = independent.train(tiny_bert(), [0, 1])
    single = independent.train(tiny_bert(seed=2), [2], independent.STEPS + 1)
    for masks, expected in zip(masks_of(3, "ddp", tmp_path), (together, together, single), strict=True):
        assert torch.equal(masks, expected)
