"""What the risk passes since the last step have said so far."""

from __future__ import annotations

import torch

from rose_peft.average import RiskFigures
from rose_peft.selector import RoseSelector


def figures_of(selector: RoseSelector) -> RiskFigures:
    """Read the window of the adapter that trains now."""
    window = selector.current.window
    return window.figures(window.sums(torch.device("cpu"), torch.float64, bypassed=False))
