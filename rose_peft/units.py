"""Which parameters form which unit: a tensor in full fine-tuning, all adapter tensors of one module elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import Tensor, nn

from .config import ROSEConfig
from .errors import TargetModulesError
from .layer import RoseLayer


@dataclass(frozen=True)
class Unit:
    """What is masked together.

    Args:
        name: Name of the weight in the base model, or of the module for an adapter.
        slots: Where the tensors live (module, attribute); a sharding engine may replace what lies there.
    """

    name: str
    slots: tuple[tuple[nn.Module, str], ...]

    def tensors(self) -> list[Tensor]:
        """Whatever the modules hold in place of the parameters, which need not be parameters."""
        found = (getattr(module, name, None) for module, name in self.slots)
        return [tensor for tensor in found if isinstance(tensor, Tensor)]

    def parameters(self) -> list[Tensor]:
        """The tensors that train now; those of an inactive adapter do not."""
        found = (module._parameters.get(name) for module, name in self.slots)
        return [param for param in found if param is not None and param.requires_grad]


def is_weight(parameter_name: str) -> bool:
    """Whether a parameter is a weight rather than a bias, going by the last part of its name."""
    return "bias" not in parameter_name.rpartition(".")[2]


def repeated_blocks(model: nn.Module) -> list[str]:
    """Names of the repeated transformer blocks: the members of the outermost lists of composite modules of one class.

    The published rule (names with `layer` and `weight`) selects the weights in these blocks on RoBERTa; this one finds
    the same place in models with other names.

    Args:
        model: Any model, wrapped by a tuner or not; names are those of the base model.
    """
    blocks: list[str] = []
    for name, module in base_modules(model):
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or _inside(name, blocks):
            continue
        # A wrapped module is judged by what it wraps: all layers of ours are of one class and have children.
        children = [c.get_base_layer() if isinstance(c, BaseTunerLayer) else c for c in module.children()]
        same = len({type(child) for child in children}) == 1
        composite = all(any(True for _ in child.children()) for child in children)
        # One child in a Sequential is how heads are written; one in a ModuleList is a model with one layer.
        if children and same and composite and (isinstance(module, nn.ModuleList) or len(children) > 1):
            blocks.extend(f"{name}.{index}" if name else str(index) for index, _ in module.named_children())
    return blocks


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Walk the modules of the base model under their own names; a tuner layer stands for the module it wraps."""
    own = {id(child) for layer in model.modules() if isinstance(layer, BaseTunerLayer) for child in _internals(layer)}
    for name, module in model.named_modules():
        if id(module) not in own and not name.endswith(".base_layer"):
            yield name.replace(".base_layer", ""), module


def _internals(layer: BaseTunerLayer) -> Iterator[nn.Module]:
    assert isinstance(layer, nn.Module)
    for name, child in layer.named_children():
        if name != "base_layer":
            yield from child.modules()


def _inside(name: str, prefixes: list[str]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def find_units(model: nn.Module, config: ROSEConfig | None, among: set[str] | None = None) -> list[Unit]:
    """Find the units of a model.

    Args:
        model: The base model with tuner layers in it, or a plain model.
        config: Its `target_modules` decide for full fine-tuning; None or a `base_config` for an adapter of PEFT.
        among: Modules in which a full fine-tuning unit may lie; None for all.

    Raises:
        TargetModulesError: If there are none; the message lists modules that could be named.
    """
    if any(isinstance(m, BaseTunerLayer) and not isinstance(m, RoseLayer) for m in model.modules()):
        units = _adapter_units(model)
    else:
        units = _weight_units(model, config, among)
    if not units:
        candidates = [
            name for name, module in base_modules(model) if name and any(True for _ in _weight_slots(module))
        ]
        raise TargetModulesError(
            f"target_modules={config.target_modules if config else None!r} leaves no weight to mask: with None the "
            "weights inside repeated blocks (an nn.ModuleList of equal blocks) are units. Pass target_modules; "
            f"candidates: {', '.join(candidates[:12])}{' ...' if len(candidates) > 12 else ''}."
        )
    return units


def _adapter_units(model: nn.Module) -> list[Unit]:
    units = []
    seen: set[int] = set()
    for name, layer in model.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        slots = []
        for attribute in dict.fromkeys(layer.adapter_layer_names):
            container = getattr(layer, attribute, None)
            if not isinstance(container, nn.Module):
                continue
            for module in container.modules():
                for parameter_name, param in module.named_parameters(recurse=False):
                    if id(param) not in seen:
                        seen.add(id(param))
                        slots.append((module, parameter_name))
        if slots:
            units.append(Unit(name.replace(".base_layer", ""), tuple(slots)))
    return units


def _weight_units(model: nn.Module, config: ROSEConfig | None, among: set[str] | None) -> list[Unit]:
    blocks = repeated_blocks(model)
    units = []
    seen: set[int] = set()
    for name, module in base_modules(model):
        if among is not None and name not in among:
            continue
        for parameter_name, slots in _weight_slots(module):
            full_name = f"{name}.{parameter_name}" if name else parameter_name
            if not is_weight(parameter_name) or not _is_unit(full_name, name, blocks, config, module):
                continue
            fresh = [(m, p) for m, p in slots if id(m._parameters[p]) not in seen]
            seen.update(id(m._parameters[p]) for m, p in fresh)
            if fresh:
                units.append(Unit(full_name, tuple(fresh)))
    return units


def _is_unit(
    full_name: str, module_name: str, blocks: list[str], config: ROSEConfig | None, module: nn.Module
) -> bool:
    if config is None or config.target_modules is None:
        return _inside(full_name, blocks)
    if isinstance(module, RoseLayer):  # wrapped because it is a target
        return True
    parts = module_name.split(".")
    return any(check_target_module_exists(config, ".".join(parts[:n])) for n in range(1, len(parts) + 1))


def _weight_slots(module: nn.Module) -> Iterator[tuple[str, list[tuple[nn.Module, str]]]]:
    if isinstance(module, RoseLayer):
        for parameter_name in module.parameter_names:
            yield parameter_name, module.slots(parameter_name)
    else:
        for parameter_name, _ in module.named_parameters(recurse=False):
            yield parameter_name, [(module, parameter_name)]
