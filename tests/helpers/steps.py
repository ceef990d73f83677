"""Steps of a tiny BERT under ROSE: the config, the optimizer and the step that tests use over and over."""

from __future__ import annotations

import torch
from torch import nn

from rose_peft import ROSEConfig
from tests.helpers.tiny import batch

STRATEGIES = ["first_order", "second_order", "ensemble"]


def config(strategy: str = "ensemble", **options) -> ROSEConfig:
    return ROSEConfig(strategy=strategy, **{"upper_quantile": 0.5, **options})


def adamw(model: nn.Module, **options) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), **{"lr": 1e-3, "betas": (0.9, 0.98), "foreach": False, **options})


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, micro_batches: int = 1) -> None:
    torch.manual_seed(1000 + seed)
    for micro in range(micro_batches):
        inputs = batch(model, seed=seed * micro_batches + micro)
        (model(**inputs).loss / micro_batches).backward()
    optimizer.step()
    optimizer.zero_grad()
