"""A compiled model is steered like the model itself, and compiled once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch._inductor.config
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from rose_peft import ROSEConfig, get_selector
from tests.helpers.tiny import batch, tiny_bert

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
