"""Accuracy of a classifier on a prepared loader, exact on any number of processes."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from rose_peft.robustness.estimate import wilson


@torch.no_grad()
def accuracy(model: nn.Module, loader: Any, accelerator: Accelerator) -> dict[str, float | None]:
    """Count right answers in eval mode.

    Args:
        model: Prepared model; left in the mode it was in.
        loader: Prepared loader of batches with `labels`.
        accelerator: Gathers from all processes without counting padding twice.

    Returns:
        accuracy in [0, 1], its 95 % Wilson interval (low, high), and n, the number of examples.
    """
    training = model.training
    model.eval()
    right = total = 0
    for batch in loader:
        predictions = model(**batch).logits.argmax(dim=-1)
        predictions, labels = accelerator.gather_for_metrics((predictions, batch["labels"]))
        right += int((predictions == labels).sum())
        total += len(labels)
    model.train(training)
    found = wilson(right, total)
    return {"accuracy": found.value, "low": found.low, "high": found.high, "n": total}
