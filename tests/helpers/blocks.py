"""Models of a few blocks, small enough to be checked number by number."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x))


class Blocks(nn.Module):
    """Units are the weights of the blocks; biases and head train unmasked."""

    def __init__(self, depth: int = 5, width: int = 3, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, 2)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class DropoutBlocks(Blocks):
    """Blocks with dropout in between, for first-order scores."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = nn.functional.dropout(layer(x), 0.3, training=self.training)
        return self.head(x)


def weights(model: nn.Module) -> list[nn.Parameter]:
    return [layer.linear.weight for layer in model.layers]


def set_gradients(model: nn.Module, step: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for param in model.parameters():
        param.grad = (torch.randn(param.shape, generator=generator, dtype=torch.float64) * scale).to(param.dtype)
