"""Dropout for the training passes: set on the modules that are there, applied at the targets where there are none."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch.nn.functional as F
from torch import nn


def dropout_modules(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Find the dropout modules of a model, each with the name of the attribute that holds its probability."""
    found = []
    for module in model.modules():
        if "drop" in type(module).__name__.lower():
            for attribute in ("p", "drop_prob"):
                if isinstance(getattr(module, attribute, None), float | int):
                    found.append((module, attribute))
                    break
    return found


def has_dropout_up_to(model: nn.Module, last: nn.Module) -> bool:
    """Whether an active dropout module comes before a module in order of depth.

    Args:
        model: The model.
        last: A module inside it.
    """
    active = {id(module) for module, attribute in dropout_modules(model) if getattr(module, attribute) > 0}
    for module in model.modules():
        if id(module) in active:
            return True
        if module is last:
            return False
    return False


class TrainingDropout:
    """Holds a dropout probability on a model until it is undone.

    Args:
        model: Model to train.
        probability: Probability in (0, 1).
        targets: Modules whose input gets the dropout if the model has no dropout module at all.
    """

    def __init__(self, model: nn.Module, probability: float, targets: Iterable[nn.Module]) -> None:
        self._set = [(module, attribute, getattr(module, attribute)) for module, attribute in dropout_modules(model)]
        for module, attribute, _ in self._set:
            setattr(module, attribute, probability)
        self.probability = probability
        self._handles = []
        if not self._set:
            unique = {id(module): module for module in targets}
            self._handles = [module.register_forward_pre_hook(self._drop_input) for module in unique.values()]

    def _drop_input(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not module.training or not args:
            return None
        return (F.dropout(args[0], self.probability, training=True), *args[1:])

    def undo(self) -> None:
        """Put the model's own probabilities back."""
        for module, attribute, probability in self._set:
            setattr(module, attribute, probability)
        for handle in self._handles:
            handle.remove()
