"""Dropout for the training passes: set wherever a model has a probability, applied at the targets where none acts."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

# Numbers that modules keep for their own calls of `F.dropout`; not `layerdrop`, which leaves out whole layers.
_NUMBERS = re.compile(r"(?:^|_)(?:dropout|pdrop)(?:_p|_prob|_rate|_ratio)?$")


def drops_layers(module: nn.Module) -> bool:
    """Whether a module leaves out whole layers for all rows of a call, as speech models and BART can.

    Args:
        module: Any module; those inside it are not looked at.
    """
    settings = itertools.chain(vars(module).items(), getattr(getattr(module, "config", None), "__dict__", {}).items())
    return any("layerdrop" in name and value for name, value in settings)


def dropout_modules(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Find what drops in a model: each module with the name of the attribute that holds its probability.

    Args:
        model: Any model. Dropout modules count, and modules that call `F.dropout` with a number of their own.
    """
    found = []
    for module in model.modules():
        is_dropout = "drop" in type(module).__name__.lower()
        names = ("p", "drop_prob") if is_dropout else [name for name in vars(module) if _NUMBERS.search(name)]
        held = [(module, name) for name in names if _is_probability(getattr(module, name, None))]
        found.extend(held[:1] if is_dropout else held)
    return found


def _is_probability(value: Any) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool) and 0 <= value <= 1


def has_dropout_up_to(model: nn.Module, last: nn.Module) -> bool:
    """Whether active dropout comes before or inside a module, in order of depth.

    Args:
        model: The model.
        last: A module inside it.
    """
    active = {id(module) for module, attribute in dropout_modules(model) if getattr(module, attribute) > 0}
    for module in model.modules():
        if id(module) in active:
            return True
        if module is last:
            return any(id(inner) in active for inner in last.modules())
    return False


class TrainingDropout:
    """Holds a dropout probability on a model until it is undone.

    Args:
        model: Model to train.
        probability: Probability in (0, 1).
        targets: Modules in order of depth. If no dropout comes up to the last of them (as when the only one is in the
            head), the input of each is dropped; the output where the input are numbers of words.
    """

    def __init__(self, model: nn.Module, probability: float, targets: Iterable[nn.Module]) -> None:
        self._set = [(module, attribute, getattr(module, attribute)) for module, attribute in dropout_modules(model)]
        for module, attribute, _ in self._set:
            setattr(module, attribute, probability)
        self.probability = probability
        self._handles: list[Any] = []
        unique = list({id(module): module for module in targets}.values())
        if unique and not has_dropout_up_to(model, unique[-1]):
            for module in unique:
                self._handles.append(module.register_forward_pre_hook(self._drop_input, with_kwargs=True))
                self._handles.append(module.register_forward_hook(self._drop_output, with_kwargs=True))

    def _drop_input(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not module.training:
            return None
        if args and _is_float(args[0]):
            return (F.dropout(args[0], self.probability), *args[1:]), kwargs
        for name, value in kwargs.items() if not args else ():
            if _is_float(value):
                return args, {**kwargs, name: F.dropout(value, self.probability)}
        return None

    def _drop_output(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        dropped = any(_is_float(value) for value in (args[:1] if args else kwargs.values()))
        if dropped or not module.training or not _is_float(output):
            return None
        return F.dropout(output, self.probability)

    def undo(self) -> None:
        """Put the model's own probabilities back."""
        for module, attribute, probability in self._set:
            setattr(module, attribute, probability)
        for handle in self._handles:
            handle.remove()


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
