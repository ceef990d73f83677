"""The gradient of a divergence: its norms are kept, it is not."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor, nn

from rose_peft import ROSEConfig, attach_rose, get_selector
from rose_peft.risk import RiskWindow

LAYERS, WIDTH = 6, 5


def square_norms(parameters: list[tuple[int, Tensor]], value: Tensor, units: int = LAYERS) -> Tensor:
    window = RiskWindow(units)
    window.add(parameters, value, torch.tensor(False), scale=1.0)
    return window.figures(window.sums(torch.device("cpu"), torch.float64, bypassed=False)).square_sum


def deep() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    layers = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
    return layers, layers(torch.randn(3, WIDTH)).square().sum()


def test_norms_are_those_of_the_gradient() -> None:
    layers, value = deep()
    weights = list(layers.parameters())
    wanted = torch.stack(
        [grad.double().square().sum() for grad in torch.autograd.grad(value, weights, retain_graph=True)]
    )
    torch.testing.assert_close(square_norms(list(enumerate(weights)), value), wanted, rtol=1e-5, atol=0)


def test_no_two_gradients_are_held_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Together they take the memory of the model; one is let go of before the next but one arrives."""
    seen: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    norms_of = RiskWindow.add.__globals__["norms_of"]

    def watched(tensors: list[Tensor]) -> list[Tensor]:
        found = list(tensors)
        alive.append(sum(ref() is not None for ref in seen))
        seen.extend(weakref.ref(tensor) for tensor in found)
        return norms_of(found)

    layers, value = deep()
    monkeypatch.setattr("rose_peft.risk.norms_of", watched)
    square_norms(list(enumerate(layers.parameters())), value)
    assert len(alive) == LAYERS and max(alive) <= 1


def test_a_tensor_that_is_named_twice_counts_twice_and_whole() -> None:
    layers, value = deep()
    weight = layers[2].weight
    (gradient,) = torch.autograd.grad(value, [weight], retain_graph=True)
    found = square_norms([(0, weight), (1, weight)], value, units=2)
    torch.testing.assert_close(found, gradient.double().square().sum().expand(2), rtol=1e-5, atol=0)


def test_no_hook_of_ours_stays_also_when_the_gradient_fails() -> None:
    layers, value = deep()
    value.register_hook(lambda grad: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        square_norms(list(enumerate(layers.parameters())), value)
    assert not any(weight._backward_hooks for weight in layers.parameters())


@pytest.mark.parametrize("risk_pass", ["paired", "sampled"])
@pytest.mark.parametrize("by_name", [False, True])
def test_a_model_may_write_into_its_labels(risk_pass: str, by_name: bool) -> None:
    """As RemBERT and others do for question answering; the graph of the user's loss still needs them."""

    class Clamps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Sequential(nn.Dropout(0.2), nn.Linear(4, 4)) for _ in range(2)])

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.layers[1](self.layers[0](x))
            return {"loss": nn.functional.cross_entropy(logits, labels.clamp_(0, 3)), "logits": logits}

    torch.manual_seed(0)
    model = Clamps()
    attach_rose(model, ROSEConfig(risk_pass=risk_pass, strategy="first_order"))
    labels = torch.tensor([0, 3, 9, 9, 1, 2, 0, 9])
    output = model(torch.randn(8, 4), labels=labels) if by_name else model(torch.randn(8, 4), labels)
    output["loss"].backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    statistics = get_selector(model).statistics()
    assert statistics.steps == 1 and statistics.skipped_risk_passes == 0
    assert labels.tolist() == [0, 3, 3, 3, 1, 2, 0, 3]
