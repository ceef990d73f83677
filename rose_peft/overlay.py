"""A module that finds the copies of its own parameters under their names, whoever calls which of its methods."""

from __future__ import annotations

import copyreg
from collections.abc import Sequence
from functools import cache
from typing import Any

from torch import Tensor, nn

# In the module's `__dict__` and not among its children: the layer is around it, and a cycle of modules has no end.
_LAYER = "_rose_layer"
_PLAIN = "_rose_plain_class"


def lay_over(module: nn.Module, layer: nn.Module, names: Sequence[str]) -> None:
    """Let the attributes of a module's parameters be what a layer around it answers.

    Swapping parameters in for the time of a call would not do: a block that checkpoints itself runs again in the
    backward pass, and other methods than `forward` may be called. What `parameters()` and `state_dict()` show stays.

    Args:
        module: Its class becomes a subclass of the same name.
        layer: Has a method `tensor_in_use(name)`.
        names: The module's own parameters.
    """
    plain: Any = type(module)
    module.__class__ = _overlaid_class(plain, tuple(names))
    module.__dict__[_LAYER] = layer


def obstacle(module: nn.Module, names: Sequence[str]) -> str | None:
    """Why a module cannot have an overlay, or None where it can.

    Args:
        module: Any module.
        names: Its own parameters.
    """
    plain: Any = type(module)
    taken = next((name for name in names if hasattr(plain, name)), None)
    if taken is not None:
        return f"{plain.__name__} has a class attribute {taken!r} beside its parameter of that name"
    try:
        _overlaid_class(plain, tuple(names))
    except TypeError as error:
        return f"{plain.__name__} does not let itself be subclassed ({error})"
    return None


def lift(module: nn.Module) -> None:
    """Give a module its own class and parameters back; does nothing for one without an overlay."""
    plain = getattr(type(module), _PLAIN, None)
    if plain is not None and module.__dict__.pop(_LAYER, None) is not None:
        module.__class__ = plain


@cache
def _overlaid_class(plain: Any, names: tuple[str, ...]) -> Any:
    def reduce_ex(self: nn.Module, protocol: Any) -> Any:
        reduced = plain.__reduce_ex__(self, protocol)
        if reduced[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]
            return reduced
        return (_blank, (plain, names), *reduced[2:])  # a class made here has no name that pickle could look up

    members: dict[str, Any] = {name: _property(name) for name in names}
    members |= {"__reduce_ex__": reduce_ex, "__module__": plain.__module__, "__qualname__": plain.__qualname__}
    return type(plain.__name__, (plain,), {**members, _PLAIN: plain})


def _property(name: str) -> property:
    def get(self: nn.Module) -> Tensor | None:
        return self.__dict__[_LAYER].tensor_in_use(name)

    return property(get)


def _blank(plain: type, names: tuple[str, ...]) -> Any:
    cls = _overlaid_class(plain, names)
    return cls.__new__(cls)
