"""What the PEFT tests do to a model over and over: train a few steps, ask for outputs, compare weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from rose_peft import get_selector


def optimizer_of(model: nn.Module, lr: float = 1e-2) -> torch.optim.Optimizer:
    """AdamW with a decay that shows: a frozen weight that is decayed all the same is caught."""
    trained = [p for p in model.parameters() if p.requires_grad]
    # The usual eps of 1e-8 is zero in float16.
    eps = 1e-4 if any(p.dtype == torch.float16 for p in trained) else 1e-8
    return torch.optim.AdamW(trained, lr=lr, weight_decay=0.1, eps=eps)


def loss_of(output: Any) -> Tensor:
    return output["loss"] if hasattr(output, "keys") else output.square().mean()


def step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: dict[str, Tensor]) -> Tensor:
    """One training step; returns the masks it was taken with."""
    optimizer.zero_grad()
    loss_of(model(**inputs)).backward()
    optimizer.step()
    return get_selector(model).state.last_mask.clone()


def train(
    model: nn.Module, inputs: dict[str, Tensor] | list[dict[str, Tensor]], steps: int = 3, lr: float = 1e-2
) -> torch.optim.Optimizer:
    model.train()
    optimizer = optimizer_of(model, lr)
    torch.manual_seed(1)
    for index in range(steps):
        step(model, optimizer, inputs[index % len(inputs)] if isinstance(inputs, list) else inputs)
    return optimizer


def train_watched(
    model: nn.Module, inputs: dict[str, Tensor], steps: int = 3, after_step: Callable[[int], None] | None = None
) -> list[Tensor]:
    """Train and check at every step that masks did to the weights what they say; returns the masks."""
    model.train()
    selector = get_selector(model)
    optimizer = optimizer_of(model)
    torch.manual_seed(1)
    masks = []
    for index in range(steps):
        before = {id(p): p.detach().clone() for p in model.parameters()}
        mask = step(model, optimizer, inputs)
        masks.append(mask)
        assert ((mask >= 0) & (mask <= 1)).all()
        assert any(unit.parameters() for unit in selector.units)
        for unit, share in zip(selector.units, mask.tolist(), strict=True):
            same = [torch.equal(param, before[id(param)]) for param in unit.parameters()]
            if not same:  # of an adapter that is not active
                continue
            assert all(torch.isfinite(param).all() for param in unit.parameters())
            if share == 0:
                assert all(same), f"{unit.name} was masked out in step {index} and moved"
            else:
                assert not all(same), f"{unit.name} has mask {share} in step {index} and did not move"
        if after_step is not None:
            after_step(index)
    return masks


def outputs(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Logits in evaluation mode; puts the mode back."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        output = model(**inputs)
    model.train(was_training)
    if isinstance(output, Tensor):
        return output
    return output["logits"] if "logits" in output else torch.stack([output["start_logits"], output["end_logits"]])


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    """Names of the tensors in the state dict that are not what they were, to the last bit."""
    now = model.state_dict()
    assert now.keys() == before.keys()
    return {name for name in now if not torch.equal(now[name], before[name])}


def trainable(model: nn.Module) -> set[str]:
    return {name for name, param in model.named_parameters() if param.requires_grad}


def tuner_layers(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
