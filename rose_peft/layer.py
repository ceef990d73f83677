"""RoseLayer: a module of the base model, frozen, beside one trainable copy of its parameters per adapter."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from .errors import UnsupportedModelError
from .overlay import lay_over, lift

# Attribute on a base parameter that holds what was there before a copy was merged into it. A tied parameter belongs to
# several layers, and this tells the later ones that the first has merged it. They all keep it under `_unmerged` as
# well: a deep copy of a parameter loses its attributes.
_UNMERGED = "_rose_unmerged"


class RoseLayer(nn.Module, BaseTunerLayer):
    """
    Wraps one module that has parameters of its own.

    A module without children is copied whole (`rose_copy`), so that buffers such as running statistics come along. A
    module with children is not: its own parameters are copied one by one (`rose_<parameter>`) and found by the module
    in place of them, while its children are wrapped by themselves. Either way PEFT finds the adapter name where it
    looks for it.

    Args:
        base_layer: The module to wrap.
        adapter_name: Name of the first adapter.
        frozen: Names of its parameters that never train; their copies only keep the state dict complete.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, frozen: Sequence[str] = ()) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.merged_adapters: list[str] = []
        self._unmerged: dict[str, Tensor] = {}
        self._unmerged_buffers: dict[str, Tensor | None] = {}
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.frozen = tuple(frozen)
        # Tied parameters stay tied when the originals are put away.
        self.identities = {name: id(param) for name, param in base_layer.named_parameters(recurse=False)}
        self._away: dict[str, Tensor | None] = {}
        self._comes_back = False
        self.parameter_names = [name for name, _ in base_layer.named_parameters(recurse=False)]
        self.copies_module = not any(True for _ in base_layer.children())
        if self.copies_module:
            self.adapter_layer_names: tuple[str, ...] = ("rose_copy",)
            self.rose_copy = nn.ModuleDict()
        else:
            self.adapter_layer_names = tuple(f"rose_{name}" for name in self.parameter_names)
            for name in self.adapter_layer_names:
                setattr(self, name, nn.ParameterDict())
            lay_over(base_layer, self, self.parameter_names)
        names = {name for name in (*vars(base_layer), *base_layer._buffers) if not name.startswith("_")}
        self.attribute_names = {name for name in names if name not in vars(self) and not hasattr(RoseLayer, name)}
        self.update_layer(adapter_name)

    def update_layer(self, adapter_name: str) -> None:
        """Add a trainable copy of the base parameters under an adapter name.

        Raises:
            UnsupportedModelError: If the base parameters were dropped.
        """
        away = bool(self._away)
        self._bring_back()
        source = {
            name: self._unmerged.get(name, getattr(param, _UNMERGED, param.detach())).clone()
            for name, param in self.base_layer.named_parameters(recurse=False)
        }
        if self.copies_module:
            self.rose_copy[adapter_name] = _copy_module(self.base_layer, source)
        else:
            for name, value in source.items():
                getattr(self, f"rose_{name}")[adapter_name] = nn.Parameter(value)
        self._keep_frozen()
        if away:
            self.put_away("cpu")

    # The originals, which only disabling, unloading and further adapters ask for ------------------------------------

    def put_away(self, how: Literal["cpu", "drop"]) -> None:
        """Free the memory of the base parameters: copies train in their place.

        Args:
            how: "cpu" keeps them there until they are asked for, "drop" keeps nothing.
        """
        for name in self.parameter_names:
            base = self.base_layer._parameters[name]
            if base is not None:
                self._away[name] = base.detach().cpu() if how == "cpu" else None
                self.base_layer._parameters[name] = None

    def _bring_back(self) -> None:
        """Put the base parameters where they were.

        Raises:
            UnsupportedModelError: If they were dropped.
        """
        self.check_originals()
        for name, value in self._away.items():
            assert value is not None
            copied = next((module._parameters[attribute] for module, attribute in self.slots(name)), None)
            value = value if copied is None else value.to(copied)
            self.base_layer._parameters[name] = nn.Parameter(value, requires_grad=False)
        self._away.clear()

    def check_originals(self) -> None:
        """Refuse what needs base parameters that are gone.

        Raises:
            UnsupportedModelError: Naming the option.
        """
        if any(value is None for value in self._away.values()):
            raise UnsupportedModelError(
                f"original_weights='drop' has dropped the weights that {type(self.base_layer).__name__} had before "
                "the training, and disabling, unloading or adding an adapter needs them. Train with "
                "original_weights='cpu' or 'keep'; merge_and_unload() works as it is."
            )

    def enable_adapters(self, enabled: bool) -> None:
        """Use the copies or the originals; originals that were put away come back for as long as they are used.

        Args:
            enabled: Whether the copies are used.

        Raises:
            UnsupportedModelError: If the originals were dropped.
        """
        if not enabled and self._away:
            self._bring_back()
            self._comes_back = True
        super().enable_adapters(enabled)
        if enabled and self._comes_back:
            self._comes_back = False
            self.put_away("cpu")

    def slots(self, parameter_name: str) -> list[tuple[nn.Module, str]]:
        """Where the copies of one parameter live, for every adapter."""
        if self.copies_module:
            return [(module, parameter_name) for module in self.rose_copy.values()]
        container = getattr(self, f"rose_{parameter_name}")
        return [(container, adapter_name) for adapter_name in container]

    def slot(self, parameter_name: str, adapter_name: str) -> tuple[nn.Module, str] | None:
        """Where the copy of one parameter lives for one adapter, or None where that adapter does not train it."""
        if self.copies_module:
            return (self.rose_copy[adapter_name], parameter_name) if adapter_name in self.rose_copy else None
        container = getattr(self, f"rose_{parameter_name}")
        return (container, adapter_name) if adapter_name in container else None

    def copy_of(self, parameter_name: str, adapter_name: str) -> nn.Parameter | None:
        """The copy of one parameter for one adapter, or None where that adapter does not train it."""
        slot = self.slot(parameter_name, adapter_name)
        return slot[0]._parameters[slot[1]] if slot is not None else None

    def copies(self, adapter_name: str) -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
        """Yield (parameter name, base parameter, copy) of one adapter."""
        for name in self.parameter_names:
            base, copied = self.base_layer._parameters[name], self.copy_of(name, adapter_name)
            if base is not None and copied is not None:
                yield name, base, copied

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Choose the adapter whose copy is used; full weights of several adapters cannot be added up.

        Raises:
            UnsupportedModelError: If more than one of the names has a copy here.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        present = [name for name in names if name in self._get_available_adapters()]
        if len(present) > 1:
            raise UnsupportedModelError(
                f"adapter_names={present} cannot be active together: each holds full weights, not a difference to "
                "add. Pass one name to set_adapter."
            )
        super().set_adapter(names, inference_mode=inference_mode)
        self._keep_frozen()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Let the copies of some adapters train or not."""
        super().set_requires_grad(adapter_names, requires_grad)
        self._keep_frozen()

    def _keep_frozen(self) -> None:
        for name in self.frozen:
            for module, attribute in self.slots(name):
                module.get_parameter(attribute).requires_grad_(False)

    def _adapter_in_use(self) -> str | None:
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return None
        available = self._get_available_adapters()
        return next((name for name in self.active_adapters if name in available), None)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the copy of the active adapter, or the base layer where none is in use."""
        adapter_name = self._adapter_in_use()
        if adapter_name is not None and self.copies_module:
            return self.rose_copy[adapter_name](*args, **kwargs)
        return self.base_layer(*args, **kwargs)

    def tensor_in_use(self, parameter_name: str) -> Tensor | None:
        """The copy of the active adapter, or the base parameter where none is in use.

        Args:
            parameter_name: Name of one of the module's own parameters.
        """
        adapter_name = self._adapter_in_use()
        base = self.base_layer._parameters[parameter_name]
        if adapter_name is None or base is None or self.slot(parameter_name, adapter_name) is None:
            return base
        return self.copy_of(parameter_name, adapter_name)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put the copy of an adapter in place of the base parameters.

        Args:
            safe_merge: Refuse copies with NaN or infinite values.
            adapter_names: At most one name; None for the active adapter.

        Raises:
            ValueError: If `safe_merge` finds such values.
            UnsupportedModelError: If there is more than one adapter to merge.
        """
        available = self._get_available_adapters()
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in available]
        if not names:
            return
        if len(names) > 1 or self.merged:
            raise UnsupportedModelError(
                f"adapters {[*self.merged_adapters, *names]} cannot be merged into the same weights: each holds full "
                "weights, not a difference to add. Merge one."
            )
        for name, base, copied in self.copies(names[0]):
            if safe_merge and not torch.isfinite(copied).all():
                raise ValueError(f"NaNs detected in the merged weights. The adapter {names[0]} ({name}) is broken.")
            if not hasattr(base, _UNMERGED):
                setattr(base, _UNMERGED, base.data)
                base.data = copied.detach().clone()
            self._unmerged[name] = getattr(base, _UNMERGED)
        for name in self._away:
            trained = self.copy_of(name, names[0])
            if trained is not None:
                self.base_layer._parameters[name] = trained
        if self.copies_module:
            buffers = self.base_layer._buffers
            self._unmerged_buffers = dict(buffers)
            buffers.update({name: copy.deepcopy(value) for name, value in self.rose_copy[names[0]]._buffers.items()})
        self.merged_adapters.append(names[0])

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the base parameters back, to the last bit."""
        if not self.merged_adapters:
            return
        for name, value in self._unmerged.items():
            base = self.base_layer._parameters[name]
            if base is not None:
                base.data = value
        for name in self._away:
            self.base_layer._parameters[name] = None
        if self.copies_module:
            self.base_layer._buffers.update(self._unmerged_buffers)
        self.forget_unmerged()

    def release(self) -> nn.Module:
        """Give the wrapped module back as it was before the wrapping; the layer is of no use after that.

        Raises:
            UnsupportedModelError: If nothing is merged into it and its own parameters were dropped.
        """
        if not self.merged:
            self._bring_back()
        self.forget_unmerged()
        lift(self.base_layer)
        return self.base_layer

    def forget_unmerged(self) -> None:
        """Take what is merged for the base parameters from now on."""
        self.merged_adapters.clear()
        self._unmerged.clear()
        self._unmerged_buffers.clear()
        for base in self.base_layer.parameters(recurse=False):
            if hasattr(base, _UNMERGED):
                delattr(base, _UNMERGED)

    # Models read attributes of their modules besides calling them (`self.wo.weight.dtype`, a relative embedding's
    # weight, `in_features`), and write some (the state of a recurrent unit): they must be those that a call would use.
    @property
    def weight(self) -> Tensor:
        """The weight in use."""
        return self._attribute("weight")

    @property
    def bias(self) -> Tensor:
        """The bias in use."""
        return self._attribute("bias")

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "base_layer" not in self.__dict__.get("_modules", {}) or name.startswith("rose_"):
                raise
            return self._attribute(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Parameter) and name in self.__dict__.get("parameter_names", ()):
            adapter_name = self._adapter_in_use()
            slot = None if adapter_name is None else self.slot(name, adapter_name)
            owner, key = slot if slot is not None else (self.base_layer, name)
            owner._parameters[key] = value  # `tie_weights` ties what is in use
        elif name in self.__dict__.get("attribute_names", ()):
            setattr(self._module_in_use(), name, value)
        else:
            super().__setattr__(name, value)

    def _attribute(self, name: str) -> Any:
        return getattr(self._module_in_use(), name)

    def _module_in_use(self) -> nn.Module:
        adapter_name = self._adapter_in_use()
        return self.rose_copy[adapter_name] if adapter_name is not None and self.copies_module else self.base_layer

    # Python looks these up on the class: a ParameterList is read by index.
    def __getitem__(self, key: Any) -> Any:
        return self._module_in_use()[key]  # type: ignore[index]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._module_in_use())  # type: ignore[call-overload]

    def __len__(self) -> int:
        return len(self._module_in_use())  # type: ignore[arg-type]

    def __bool__(self) -> bool:
        return True

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *dir(self._module_in_use())})

    def __repr__(self) -> str:
        return "rose." + super().__repr__()


def _copy_module(module: nn.Module, values: dict[str, Tensor]) -> nn.Module:
    # The memo makes deepcopy share the parameters, which are then registered anew: registration is what PEFT's
    # `low_cpu_mem_usage` intercepts to put them on the meta device.
    memo: dict[int, Any] = {id(param): param for param in module._parameters.values() if param is not None}
    # A module that it reaches by a reference of its own (a tied embedding) is another's, and not copied with it.
    others = (other for value in vars(module).values() for other in _modules_inside(value, set()))
    memo |= {id(other): other for other in others if other is not module}
    copied = copy.deepcopy(module, memo)
    for name, value in values.items():
        del copied._parameters[name]
        copied.register_parameter(name, nn.Parameter(value))
    return copied


def _modules_inside(value: Any, seen: set[int]) -> Iterator[nn.Module]:
    if isinstance(value, nn.Module):
        yield value
    elif type(value) in (list, tuple, dict) and id(value) not in seen:
        seen.add(id(value))
        for item in value.values() if type(value) is dict else value:
            yield from _modules_inside(item, seen)


def tie_copies(model: nn.Module, adapter_name: str) -> None:
    """Make copies of one tied base parameter one parameter again, as tied embeddings need.

    Args:
        model: Model whose layers are wrapped.
        adapter_name: Adapter whose copies are tied.
    """
    first: dict[int, nn.Parameter] = {}
    for layer in model.modules():
        if not isinstance(layer, RoseLayer):
            continue
        for name, identity in layer.identities.items():
            slot, copied = layer.slot(name, adapter_name), layer.copy_of(name, adapter_name)
            if slot is not None and copied is not None:
                slot[0]._parameters[slot[1]] = first.setdefault(identity, copied)
