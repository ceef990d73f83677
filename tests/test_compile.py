"""A compiled model is steered like the model itself, and compiled once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch._inductor.config
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import Trainer, TrainingArguments

from rose_peft import RoseCallback, ROSEConfig, UnsupportedEngineError, attach_rose, get_selector
from tests.helpers.tiny import batch, tiny_bert
from tests.helpers.watching import assert_masks_acted, backward, unit_weights

STEPS = 4


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def train(
    compiled: str | None, strategy: str = "ensemble", lora: bool = False, backend: str = "aot_eager"
) -> tuple[list[Tensor], dict[str, Tensor], list[int], int]:
    """Train; returns masks, weights, the number of graphs after each step and of operations in all of them."""
    counter = CompileCounterWithBackend(backend)
    base = tiny_bert(num_labels=2, num_hidden_layers=1)
    batches = [batch(base, seed=step) for step in range(STEPS)]
    if compiled == "base":
        base = torch.compile(base, backend=counter)
    inner = LoraConfig(r=4, target_modules=["query", "value", "dense"]) if lora else None
    config = ROSEConfig(task_type="SEQ_CLS", strategy=strategy, upper_quantile=0.6, base_config=inner)
    model = get_peft_model(base, config)
    network = torch.compile(model, backend=counter) if compiled == "wrapped" else model
    if compiled == "in place":
        model.compile(backend=counter)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    masks, graphs = [], []
    for step, inputs in enumerate(batches):
        torch.manual_seed(step)
        network(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        masks.append(get_selector(network).state.last_mask.clone())
        graphs.append(counter.frame_count)
    weights = {
        name.replace("_orig_mod.", ""): param.detach()
        for name, param in model.named_parameters()
        if "key" not in name or "bias" not in name  # rounding noise, of which Adam makes full steps
    }
    return masks, weights, graphs, counter.op_count


def assert_steered(compiled: str, lora: bool, backend: str) -> None:
    masks, weights, graphs, operations = train(compiled, lora=lora, backend=backend)
    eager_masks, eager_weights, none, _ = train(None, lora=lora)
    assert none[-1] == 0
    assert any((mask == 0).any() for mask in eager_masks)
    assert all(torch.equal(one, two) for one, two in zip(masks, eager_masks, strict=True))
    torch.testing.assert_close(weights, eager_weights, rtol=1e-4, atol=1e-5)
    # The model is in the graphs, and no step after the second makes a new one.
    assert operations > 50 and graphs[1] == graphs[-1] <= 2, (operations, graphs)


@pytest.mark.parametrize(("compiled", "lora"), [("base", False), ("wrapped", False), ("in place", True)])
def test_compiled_equals_eager(compiled: str, lora: bool) -> None:
    assert_steered(compiled, lora, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("compiled", ["base", "wrapped"])
def test_inductor_equals_eager(compiled: str) -> None:
    with torch._inductor.config.patch(fallback_random=True):  # the draws of eager mode
        assert_steered(compiled, False, "inductor")


# Batches of varying shape -------------------------------------------------------------------------------------------

SHAPES = [(8, 8), (6, 10), (5, 12), (7, 7), (8, 9), (3, 8)]


def train_on_shapes(compiled: bool, **fields: object) -> tuple[list[Tensor], dict[str, Tensor], int]:
    """Train on batches of many shapes; returns masks, weights and the number of graphs."""
    counter = CompileCounterWithBackend("aot_eager")
    base = tiny_bert(num_labels=2, num_hidden_layers=1)
    batches = [batch(base, *shape, seed=step) for step, shape in enumerate(SHAPES)]
    if compiled:
        base = torch.compile(base, backend=counter)
    model = get_peft_model(base, ROSEConfig(task_type="SEQ_CLS", upper_quantile=0.6, **fields))
    selector = get_selector(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    masks = []
    for step, inputs in enumerate(batches):
        torch.manual_seed(step)
        model(**inputs).loss.backward()
        before = unit_weights(selector)
        optimizer.step()
        assert_masks_acted(selector, before)
        optimizer.zero_grad()
        masks.append(selector.state.last_mask.clone())
    weights = {
        name.replace("_orig_mod.", ""): param.detach()
        for name, param in model.named_parameters()
        if "key" not in name or "bias" not in name
    }
    return masks, weights, counter.frame_count


@pytest.mark.parametrize("how", ["method", "function"])
@pytest.mark.parametrize("strategy", ["first_order", "second_order"])
def test_masks_act_in_a_compiled_step_of_the_optimizer(strategy: str, how: str) -> None:
    model = tiny_bert(num_hidden_layers=1)
    selector = attach_rose(model, ROSEConfig(strategy=strategy, upper_quantile=0.4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    step = torch.compile(optimizer.step if how == "method" else lambda: optimizer.step(), backend="aot_eager")
    for seed in range(3):
        backward(model, seed)
        before = unit_weights(selector)
        step()
        optimizer.zero_grad()
        if seed:  # after the first step there is momentum
            assert_masks_acted(selector, before)


def test_sampled_passes_and_batches_of_varying_shape() -> None:
    """The small pass is one more shape, and gives its graph up, as compiled ones with dynamic shapes want it."""
    fields = {"risk_pass": "sampled", "risk_interval": 2, "strategy": "first_order"}
    masks, weights, graphs = train_on_shapes(True, **fields)
    eager_masks, eager_weights, _ = train_on_shapes(False, **fields)
    assert all(torch.equal(one, two) for one, two in zip(masks, eager_masks, strict=True))
    torch.testing.assert_close(weights, eager_weights, rtol=1e-4, atol=1e-5)
    assert 0 < graphs <= 4  # static and dynamic shapes, with gradients and without


def test_paired_passes_and_batches_of_varying_shape_are_refused_with_the_way_out() -> None:
    with pytest.raises(UnsupportedEngineError, match=r"donated_buffer = False.*risk_pass='sampled'"):
        train_on_shapes(True)


@pytest.mark.slow
def test_paired_passes_and_batches_of_varying_shape_train_by_the_way_out() -> None:
    with torch._functorch.config.patch(donated_buffer=False):
        masks, weights, _ = train_on_shapes(True)
    eager_masks, eager_weights, _ = train_on_shapes(False)
    assert all(torch.equal(one, two) for one, two in zip(masks, eager_masks, strict=True))
    torch.testing.assert_close(weights, eager_weights, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_accelerate")
def test_the_trainer_compiles(tmp_path: Path) -> None:
    """TrainingArguments(torch_compile=True), with its own compiler, and a last batch that is smaller."""
    model = get_peft_model(
        tiny_bert(num_labels=2, num_hidden_layers=1),
        ROSEConfig(task_type="SEQ_CLS", risk_pass="sampled", risk_interval=2, upper_quantile=0.6),
    )
    columns = batch(tiny_bert(num_labels=2), 19, 8)
    rows = [{name: tensor[row] for name, tensor in columns.items()} for row in range(19)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        torch_compile=True,
        num_train_epochs=2,
        per_device_train_batch_size=8,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[RoseCallback()]).train()
    statistics = get_selector(model).statistics()
    assert statistics.steps == 6 and 0 < statistics.kept_share < 1
