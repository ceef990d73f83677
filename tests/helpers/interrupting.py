"""Raising in the middle of what the library does, wherever that is, and comparing what is left behind."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

import rose_peft
from rose_peft import RoseSelector

_HOME = str(Path(rose_peft.__file__).parent)
Call = tuple[str, int]


def _name(frame: FrameType) -> str | None:
    """Of a function of the library; generators are left out, for they are also entered to be thrown away."""
    code = frame.f_code
    ours = code.co_filename.startswith(_HOME) and not code.co_flags & inspect.CO_GENERATOR
    return f"{Path(code.co_filename).stem}.{getattr(code, 'co_qualname', code.co_name)}" if ours else None


@contextmanager
def _profiled(function: Callable[[FrameType, str, Any], None]):
    sys.setprofile(function)
    try:
        yield
    finally:
        sys.setprofile(None)


def calls_of(action: Callable[[], Any]) -> list[Call]:
    """Every call of a function of the library during an action: its name, and the how manieth of that name it is."""
    found: list[Call] = []
    counts: dict[str, int] = {}

    def note(frame: FrameType, event: str, _: Any) -> None:
        name = _name(frame) if event == "call" else None
        if name is not None:
            counts[name] = counts.get(name, 0) + 1
            found.append((name, counts[name]))

    with _profiled(note):
        action()
    return found


def interrupt_at(call: Call, action: Callable[[], Any]) -> None:
    """Run an action, with a KeyboardInterrupt as soon as that call of the library is entered."""
    name, number = call
    count = 0

    def interrupt(frame: FrameType, event: str, _: Any) -> None:
        nonlocal count
        if event == "call" and _name(frame) == name:
            count += 1
            if count == number:
                sys.setprofile(None)
                raise KeyboardInterrupt

    with _profiled(interrupt):
        action()


def everything(model: nn.Module, selector: RoseSelector, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All that a step changes: weights, gradients, the optimizer's state, the statistics; weights are asked first.

    Asking for the weights as `state_dict` is what a user does who saves when he is interrupted.
    """
    found = {f"weight {name}": tensor.clone() for name, tensor in model.state_dict().items()}
    for name, param in model.named_parameters():
        if param.grad is not None:
            found[f"gradient {name}"] = param.grad.clone()
        for key, value in optimizer.state.get(param, {}).items():
            found[f"{key} {name}"] = torch.as_tensor(value).clone()
    history, _ = selector.state.mask_history()
    return {**found, "steps": torch.tensor(selector.statistics().steps), "history": history.clone()}


def differences(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """What is not the same to the last bit, by name."""
    odd = sorted(one.keys() ^ other.keys())
    return odd + [name for name in one.keys() & other.keys() if not torch.equal(one[name], other[name])]
