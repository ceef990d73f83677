"""Masks on stretches of one flat tensor, as sharding engines hold parameters, do what they do on the parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from rose_peft import UnsupportedOptimizerError
from rose_peft.engines.seam import Part
from rose_peft.optimizers import momentum_rule, readable_rule
from rose_peft.update import Masked, MaskedStep

SHAPES = [(3, 4), (5,), (2, 2, 2), (7,)]
SHARES = [[1.0, 0.0, 0.5, 0.0], [0.0, 1.0, 0.3, 0.0], [0.5, 0.0, 1.0, 0.0], [1.0, 0.7, 0.0, 0.0]]
OPTIMIZERS: list[dict[str, Any]] = [
    {"cls": torch.optim.AdamW, "lr": 0.01, "weight_decay": 0.1},
    {"cls": torch.optim.Adam, "lr": 0.01, "weight_decay": 0.1},
    {"cls": torch.optim.AdamW, "lr": 0.01, "amsgrad": True},
    {"cls": torch.optim.SGD, "lr": 0.1, "momentum": 0.9, "weight_decay": 0.1},
    {"cls": torch.optim.SGD, "lr": 0.1},
]


def step(optimizer: torch.optim.Optimizer, parts: list[Part], shares: list[float]) -> None:
    group = optimizer.param_groups[0]
    masked = [
        Masked(part, group, share, 1 - share, readable_rule(optimizer, part, momentum_rule(optimizer, group)))
        for part, share in zip(parts, shares, strict=True)
        if share < 1
    ]
    act = MaskedStep(optimizer)
    act.begin(masked, [part.holder for part in parts], 1.0)
    optimizer.step()
    act.finish()


@pytest.mark.parametrize("options", OPTIMIZERS, ids=lambda options: "-".join(map(str, options.values())))
def test_a_stretch_moves_like_its_parameter(options: dict[str, Any]) -> None:
    options = dict(options)
    cls = options.pop("cls")
    torch.manual_seed(0)
    whole = [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in SHAPES]
    flat = nn.Parameter(torch.cat([param.detach().flatten() for param in whole]))
    sizes = [param.numel() for param in whole]
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    pieces = [Part(flat, place) for place in zip(starts, sizes, strict=True)]
    # The flat tensor has one count of steps where parameters have their own: it starts with a step of all.
    one, two = cls(whole, **options), cls([flat], **options)
    for shares in ([1.0] * 4, *SHARES, [0.0] * 4):
        before = [piece.of(flat).clone() for piece in pieces]
        for param in whole:
            param.grad = torch.randn_like(param)
        flat.grad = torch.cat([param.grad.flatten() for param in whole])
        step(one, [Part(param) for param in whole], shares)
        step(two, pieces, shares)
        for param, piece, old, share in zip(whole, pieces, before, shares, strict=True):
            torch.testing.assert_close(piece.of(flat).view_as(param), param.detach(), rtol=1e-12, atol=1e-12)
            assert torch.equal(piece.of(flat), old) == (share == 0)


def test_state_that_cannot_be_told_apart_is_refused() -> None:
    flat = nn.Parameter(torch.randn(600))
    flat.grad = torch.randn(600)
    optimizer = torch.optim.Adagrad([flat])
    optimizer.state[flat] = {"state1": torch.zeros(600), "scales": torch.zeros(3), "step": torch.zeros(())}
    item = Masked(Part(flat, (0, 10)), optimizer.param_groups[0], 0.0, 1.0, None)
    with pytest.raises(UnsupportedOptimizerError, match="what belongs to one unit cannot be told"):
        MaskedStep(optimizer).begin([item], [flat], 1.0)
