"""The sampled pass leaves nothing behind: what modules keep of their last call is that of the user's call."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rose_peft import ROSEConfig, attach_rose, get_selector
from rose_peft.aside import aside


class Block(nn.Module):
    """A mixture that leaves an auxiliary loss, and counts, logs and draws in its own ways."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.inner, self.drop = nn.Linear(8, 2), nn.Linear(8, 8), nn.Dropout(0.2)
        self.generator = torch.Generator().manual_seed(0)
        self.mean, self.rows = torch.zeros(8), 0
        self.log: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        shares = self.router(x).softmax(-1)
        self.aux_loss = shares.mean(0).square().sum()
        self.rows += len(x)
        self.log.append(len(x))
        with torch.no_grad():
            self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
        noise = torch.rand(x.shape, generator=self.generator)
        return x + self.drop(self.inner(x * (noise > 0.1) - self.mean.clone())).relu() * shares[:, :1]


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        for layer in self.layers:
            x = layer(x)
        logits = self.head(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def inputs(seed: int, rows: int = 8) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(rows, 8, generator=generator),
        "labels": torch.randint(0, 3, (rows,), generator=generator),
    }


def trained(prepare: Callable[[nn.Module], Any]) -> nn.Module:
    model = Mixture().train()
    prepare(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(1)
    for step in range(3):
        loss = model(**inputs(step))["loss"] + 0.1 * sum(layer.aux_loss for layer in model.layers)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("fraction", [0.25, 1.0])
def test_what_modules_keep_of_a_call_is_that_of_the_users(fraction: float) -> None:
    config = ROSEConfig(
        strategy="first_order", risk_pass="sampled", risk_interval=1, risk_fraction=fraction, upper_quantile=1.0
    )
    plain, model = trained(lambda model: None), trained(lambda model: attach_rose(model, config))
    assert get_selector(model).statistics().first_order_thresholds[1] > 0  # there were passes
    for name, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    for ours, theirs in zip(model.layers, plain.layers, strict=True):
        assert (ours.rows, ours.log) == (theirs.rows, theirs.log)
        assert torch.equal(ours.mean, theirs.mean)
        assert torch.equal(ours.generator.get_state(), theirs.generator.get_state())


def test_new_attributes_are_gone_and_old_ones_are_the_same_objects() -> None:
    block = Block()
    mean, log = block.mean, block.log
    with aside(block):
        assert block.mean is not mean
        block(torch.randn(2, 8))
    assert block.mean is mean and torch.equal(mean, torch.zeros(8))
    assert block.log is log and not log and block.rows == 0 and not hasattr(block, "aux_loss")


def test_backward_hooks_of_modules_do_not_see_the_risk_pass() -> None:
    def seen(prepare: Callable[[nn.Module], Any]) -> list[float]:
        norms: list[float] = []

        def watch(model: nn.Module) -> None:
            inner = model.layers[1].inner
            inner.register_full_backward_hook(lambda module, ours, out: norms.append(float(out[0].norm())))
            inner.register_full_backward_pre_hook(lambda module, out: norms.append(float(out[0].norm())))
            prepare(model)

        trained(watch)
        return norms

    config = ROSEConfig(strategy="first_order", risk_pass="sampled", risk_interval=1, upper_quantile=1.0)
    plain = seen(lambda model: None)
    assert len(plain) == 6 and seen(lambda model: attach_rose(model, config)) == plain


def test_containers_of_other_kinds_and_deeper_ones_are_left_alone() -> None:
    block = Block()
    block.counted, block.ordered, block.deep = Counter(a=1), OrderedDict(a=1), {"a": [1]}
    with aside(block):
        block.deep["b"] = [2]
    assert (block.counted, block.ordered, block.deep) == (Counter(a=1), OrderedDict(a=1), {"a": [1]})


def test_what_two_modules_share_they_share_in_the_pass_too() -> None:
    first, second, shared = Block(), Block(), torch.zeros(8)
    first.mean = second.mean = shared
    second.register_buffer("also", shared)
    with aside(nn.ModuleList([first, second])):
        first.mean.add_(1)
        assert first.mean is second.mean is second.also is not shared
    assert first.mean is second.mean is second.also is shared and not shared.any()


def test_an_auxiliary_loss_that_is_added_up_in_place_keeps_its_graph() -> None:
    weight = nn.Parameter(torch.ones(2))
    block = Block()
    block.total = (2 * weight).sum()
    with aside(block):
        block.total += (3 * weight).sum()
    block.total.backward()
    assert weight.grad is not None and weight.grad.tolist() == [2, 2]
