"""Which parameters form which unit: a tensor in full fine-tuning, all adapter tensors of one module elsewhere.

`find_units` looks once; `LiveUnits` keeps up with a model whose adapters and layers change.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import Tensor, nn

from .config import ROSEConfig
from .errors import TargetModulesError
from .layer import RoseLayer

# What stands for the name of an adapter where a model trains in place.
PLAIN = "model"
Slot = tuple[nn.Module, str]


@dataclass(frozen=True)
class Unit:
    """What is masked together.

    Args:
        name: Name of the weight in the base model, or of the module for an adapter.
        slots: Where the tensors live (module, attribute); a sharding engine may replace what lies there.
        adapter: Name of the adapter that they belong to; `PLAIN` for a model that trains in place.
    """

    name: str
    slots: tuple[tuple[nn.Module, str], ...]
    adapter: str = PLAIN

    def tensors(self) -> list[Tensor]:
        """Whatever the modules hold in place of the parameters, which need not be parameters."""
        found = (getattr(module, name, None) for module, name in self.slots)
        return [tensor for tensor in found if isinstance(tensor, Tensor)]

    def size(self) -> int:
        """Number of weights, those of an inactive adapter too."""
        found = (module._parameters.get(name) for module, name in self.slots)
        return sum(param.numel() for param in found if param is not None)

    def is_vector(self) -> bool:
        """Whether it is one tensor with one dimension, but for those of size 1."""
        shapes = [tensor.shape for tensor in self.tensors()]
        return len(shapes) == 1 and self.size() == max(shapes[0], default=1)

    def parameters(self) -> list[Tensor]:
        """The tensors that train now; those of an inactive adapter do not."""
        found = (module._parameters.get(name) for module, name in self.slots)
        return [param for param in found if param is not None and param.requires_grad]


def is_weight(parameter_name: str) -> bool:
    """Whether a parameter is a weight rather than a bias, going by the last part of its name."""
    return "bias" not in parameter_name.rpartition(".")[2]


def prefixes(name: str) -> list[str]:
    """A module's name and those of all modules around it, the outermost first.

    Args:
        name: Its name in the model.
    """
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts) + 1)]


def is_target(config: ROSEConfig, name: str) -> bool:
    """Whether `target_modules` names a module or one around it.

    Args:
        config: The settings; `target_modules` is given.
        name: The module's name in the model.
    """
    return any(check_target_module_exists(config, prefix) for prefix in prefixes(name))


def repeated_blocks(model: nn.Module) -> list[str]:
    """Names of the repeated transformer blocks: the members of the outermost lists of composite modules.

    The published rule (names with `layer` and `weight`) selects the weights in these blocks on RoBERTa; this one finds
    the same place in models with other names. Blocks of several classes may take turns in one list (attention and
    state space, self and cross attention); lists inside a block, such as its experts, are part of it.

    Args:
        model: Any model, wrapped by a tuner or not; names are those of the base model.
    """
    blocks: list[str] = []
    for name, module in base_modules(model):
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or _inside(name, blocks):
            continue
        # A wrapped module is judged by what it wraps: all layers of ours are of one class and have children. What has
        # no parameters (an identity in place of a block) says nothing.
        children = [c.get_base_layer() if isinstance(c, BaseTunerLayer) else c for c in module.children()]
        children = [child for child in children if any(True for _ in child.parameters())]
        kinds = {type(child) for child in children}
        composite = all(any(True for _ in child.children()) for child in children)
        repeat = len(kinds) < len(children)  # a pipeline of different things, or a head, may be a Sequential too
        if isinstance(module, nn.ModuleList) and not repeat:
            # Once each in a list may stand blocks, but also whole models: those have embeddings.
            inside = (inner for child in children for inner in child.modules())
            repeat = len(children) == 1 or not any(isinstance(inner, nn.Embedding) for inner in inside)
        if children and repeat and composite:
            blocks.extend(f"{name}.{index}" if name else str(index) for index, _ in module.named_children())
    return blocks


def block_coverage(model: nn.Module, units: Sequence[Unit]) -> float:
    """Share of the weights in repeated blocks that belong to units, in [0, 1]; 1 for a model without such blocks.

    Args:
        model: The base model with layers of full fine-tuning in it, or a plain model.
        units: Its units; weights, not adapters.
    """
    blocks = repeated_blocks(model)
    sizes: dict[str, int] = {}
    seen: set[int] = set()
    for name, module in base_modules(model):
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        for parameter_name, param in base.named_parameters(recurse=False):
            full_name = f"{name}.{parameter_name}" if name else parameter_name
            if is_weight(parameter_name) and _inside(full_name, blocks) and id(param) not in seen:
                seen.add(id(param))
                sizes[full_name] = param.numel()
    covered = {unit.name for unit in units}
    total = sum(sizes.values())
    return sum(size for name, size in sizes.items() if name in covered) / total if total else 1.0


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
    units = _adapter_units(model) if has_other_tuner(model) else _weight_units(model, config, among)
    if not units:
        candidates = [
            name for name, module in base_modules(model) if name and any(True for _ in _weight_slots(module))
        ]
        raise TargetModulesError(
            f"target_modules={config.target_modules if config else None!r} leaves no weight to mask: with None the "
            "weights inside repeated blocks (an nn.ModuleList of blocks) are units. Pass target_modules; "
            f"candidates: {', '.join(candidates[:12])}{' ...' if len(candidates) > 12 else ''}."
        )
    return units


def has_other_tuner(model: nn.Module) -> bool:
    """Whether an adapter other than full fine-tuning is on a model.

    Args:
        model: Any model.
    """
    return any(isinstance(m, BaseTunerLayer) and not isinstance(m, RoseLayer) for m in model.modules())


def _adapter_units(model: nn.Module) -> list[Unit]:
    units = []
    seen: set[int] = set()
    names: set[tuple[str, str]] = set()
    for name, layer in model.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        by_adapter: dict[str, list[Slot]] = {}
        for adapter, module, parameter_name in _adapter_slots(layer):
            param = module._parameters[parameter_name]
            if id(param) not in seen:
                seen.add(id(param))
                by_adapter.setdefault(adapter, []).append((module, parameter_name))
        for adapter, slots in by_adapter.items():
            own = name.replace(".base_layer", "")
            # LoRA on parameters wraps one module once per parameter: the parameter's name tells them apart.
            if (own, adapter) in names:
                own = f"{own}.{getattr(layer, 'parameter_name', name)}"
            names.add((own, adapter))
            units.append(Unit(own, tuple(slots), adapter))
    return units


def _adapter_slots(layer: BaseTunerLayer) -> Iterator[tuple[str, nn.Module, str]]:
    """(adapter name, module, attribute) of every adapter tensor; PEFT keys its containers by adapter names."""
    for attribute in dict.fromkeys(layer.adapter_layer_names):
        container = getattr(layer, attribute, None)
        if not isinstance(container, nn.Module):
            continue
        for path, module in container.named_modules():
            for parameter_name in module._parameters:
                if module._parameters[parameter_name] is not None:
                    yield path.split(".")[0] or parameter_name, module, parameter_name


def _weight_units(model: nn.Module, config: ROSEConfig | None, among: set[str] | None) -> list[Unit]:
    blocks = repeated_blocks(model)
    units = []
    seen: set[int] = set()
    for name, module in base_modules(model):
        if among is not None and name not in among:
            continue
        for parameter_name, adapter, slot in _weight_slots(module):
            full_name = f"{name}.{parameter_name}" if name else parameter_name
            if not is_weight(parameter_name) or not _is_unit(full_name, name, blocks, config, module):
                continue
            identity = id(slot[0]._parameters[slot[1]])
            if identity not in seen:
                seen.add(identity)
                units.append(Unit(full_name, (slot,), adapter))
    return units


def _is_unit(
    full_name: str, module_name: str, blocks: list[str], config: ROSEConfig | None, module: nn.Module
) -> bool:
    if config is None or config.target_modules is None:
        return _inside(full_name, blocks)
    if isinstance(module, RoseLayer):  # wrapped because it is a target
        return True
    if isinstance(config.target_modules, set) and module_name in config.target_modules:
        return True  # each prefix is compared with every target, which takes long where all units are named
    return is_target(config, module_name)


def _weight_slots(module: nn.Module) -> Iterator[tuple[str, str, Slot]]:
    """(parameter name, adapter name, slot) of every parameter of a module's own, copies in place of the base's."""
    if isinstance(module, RoseLayer):
        for parameter_name in module.parameter_names:
            for adapter in sorted(module._get_available_adapters()):
                slot = module.slot(parameter_name, adapter)
                if slot is not None:
                    yield parameter_name, adapter, slot
    else:
        for parameter_name, _ in module.named_parameters(recurse=False):
            yield parameter_name, PLAIN, (module, parameter_name)


class LiveUnits:
    """
    The units of a model as it is now, by adapter.

    Args:
        model: The base model with tuner layers in it, or a plain model.
        config: The settings it was attached with; an adapter that has a ROSEConfig of its own goes by that.

    Raises:
        TargetModulesError: If there are none.
    """

    def __init__(self, model: nn.Module, config: ROSEConfig) -> None:
        self.model = model
        self._config = config
        # The settings given here overrule those of adapters that are there already, such as loaded ones.
        self._overruled = dict(self._peft_configs() or {})
        self.by_adapter: dict[str, list[Unit]] = {}
        self._warned = self._warned_of_one = False
        self._lost: tuple[TargetModulesError, list[Unit]] | None = None
        self._find()

    def _find(self) -> None:
        self._signature = self._structure()
        self._witness = self._first_tuner_layer()
        self.by_adapter = self._units_by_adapter()
        self._holders = self._find_holders()
        self._warn_of_small_coverage()
        self._warn_of_a_single_unit()

    def _units_by_adapter(self) -> dict[str, list[Unit]]:
        configs = self._peft_configs()
        if configs == {}:  # after the last adapter was deleted there is nothing to steer
            return {}
        found: dict[str, list[Unit]] = {}
        if not any(isinstance(config, ROSEConfig) for config in (configs or {}).values()):
            for unit in find_units(self.model, self._config):
                found.setdefault(unit.adapter, []).append(unit)
            return found
        for adapter, own in (configs or {}).items():
            if isinstance(own, ROSEConfig):
                units = find_units(self.model, self.config_of(adapter))
                found[adapter] = [unit for unit in units if unit.adapter == adapter]
        return found

    def _warn_of_small_coverage(self) -> None:
        """Say once where most of the blocks is never masked; adapters are small beside the weights by their nature."""
        for units in self.by_adapter.values():
            coverage = block_coverage(self.model, units)
            if units and coverage < 0.5 and not self._warned and not has_other_tuner(self.model):
                self._warned = True
                warnings.warn(
                    f"the {len(units)} units cover {coverage:.0%} of the weights in repeated blocks, less than half: "
                    "the others are never masked. Widen target_modules if that is not meant.",
                    stacklevel=2,
                )

    def _warn_of_a_single_unit(self) -> None:
        """Say once where there is nothing to rank: the quantiles of one score keep it."""
        for adapter, units in self.by_adapter.items():
            config = self.config_of(adapter)
            all_kept = (config.lower_quantile, config.upper_quantile) == (0, 1)
            if len(units) == 1 and not all_kept and not self._warned_of_one:
                self._warned_of_one = True
                warnings.warn(
                    f"there is one unit, {units[0].name!r}, and nothing to rank it against, so its updates are never "
                    "held back: ROSE has no effect. Name more modules in target_modules.",
                    stacklevel=2,
                )

    def config_of(self, adapter: str) -> ROSEConfig:
        """The settings of one adapter.

        Args:
            adapter: Its name.
        """
        own = (self._peft_configs() or {}).get(adapter)
        return own if isinstance(own, ROSEConfig) and self._overruled.get(adapter) is not own else self._config

    def changed(self) -> bool:
        """Whether adapters or layers have come, gone or moved since the units were found."""
        return self._signature != self._structure()

    def refresh(self) -> None:
        """Find the units anew; where there are none any more, `lost` says so when this model trains on."""
        before, self._lost = self.by_adapter, None
        try:
            self._find()
        except TargetModulesError as error:  # not now: it may be another model that is about to step
            self.by_adapter = {}
            self._lost = error, [unit for units in before.values() for unit in units]

    def lost(self) -> list[Unit]:
        """The units that there were before the model lost them all."""
        return [] if self._lost is None else self._lost[1]

    def refuse_lost(self) -> None:
        """Refuse to train a model that has lost its units.

        Raises:
            TargetModulesError: If it has.
        """
        if self._lost is not None:
            raise self._lost[0]

    def unloaded(self) -> bool:
        """Whether the adapter was merged or unloaded, of which other methods' tuners do not tell us."""
        if self._witness is None:
            return False
        there = {id(module) for module in self.model.modules()}
        ours = {id(module) for units in self.by_adapter.values() for unit in units for module, _ in unit.slots}
        return id(self._witness) not in there and not ours & there

    def parameters(self, adapter: str) -> list[tuple[int, Tensor]]:
        """(unit index, parameter) of everything of one adapter that trains now.

        Args:
            adapter: Its name.
        """
        units = self.by_adapter.get(adapter, ())
        return [(index, param) for index, unit in enumerate(units) for param in unit.parameters()]

    def all_parameters(self, adapter: str) -> list[tuple[int, Tensor]]:
        """(unit index, parameter) of one adapter, of units that are frozen or inactive now too.

        Args:
            adapter: Its name.
        """
        slots = [
            (index, module._parameters.get(name))
            for index, unit in enumerate(self.by_adapter.get(adapter, ()))
            for module, name in unit.slots
        ]
        return [(index, param) for index, param in slots if param is not None]

    def training(self) -> list[str]:
        """Names of the adapters that train now; none while they are merged or disabled."""
        resting = {
            name
            for name, layers in self._holders.items()
            if all(layer.merged or layer.disable_adapters for layer in layers)
        }
        return [
            name
            for name, units in self.by_adapter.items()
            if name not in resting and any(unit.parameters() for unit in units)
        ]

    def dropout_targets(self) -> Iterator[nn.Module]:
        """The modules in front of which dropout belongs: those with matrices among the units, not norms.

        Of a tuner layer and the modules inside it the layer alone, or an input would be dropped twice.
        """
        owners = {
            id(module)
            for units in self.by_adapter.values()
            for unit in units
            for module, name in unit.slots
            if any(param.dim() > 1 for param in [module._parameters.get(name)] if param is not None)
        }
        inside: set[int] = set()
        for module in self.model.modules():
            own = {id(inner) for inner in _internals(module)} if isinstance(module, BaseTunerLayer) else {id(module)}
            if id(module) not in inside and own & owners and not isinstance(module, (nn.ModuleDict, nn.ParameterDict)):
                yield module
            inside |= own

    def last_module(self) -> nn.Module | None:
        """The last module, in order of depth, whose call uses a unit."""
        owners = {id(module) for units in self.by_adapter.values() for unit in units for module, _ in unit.slots}
        last: nn.Module | None = None
        # What is inside a tuner layer does not count for itself: the second matrix of a fresh LoRA gives zeros only.
        inside: set[int] = set()
        for module in self.model.modules():
            if isinstance(module, BaseTunerLayer):
                own = list(_internals(module))
                inside.update(map(id, own))
                if id(module) not in inside and any(id(inner) in owners for inner in own):
                    last = module
            is_container = isinstance(module, (nn.ModuleDict, nn.ParameterDict, nn.ModuleList))
            if id(module) in owners and id(module) not in inside and not is_container:
                last = module
        return last

    def _peft_configs(self) -> dict[str, Any] | None:
        configs = getattr(self.model, "peft_config", None)
        return configs if isinstance(configs, dict) else None

    def _structure(self) -> tuple[Any, ...]:
        """Changes whenever a module, a parameter or an adapter comes, goes, moves or gets another name."""
        configs = self._peft_configs()
        adapters = None if configs is None else tuple((name, id(config)) for name, config in configs.items())
        found: list[int | str] = [*self.model._parameters]
        waiting = [self.model]
        while waiting:  # by hand: `model.modules()` takes several times as long, and this is asked twice a step
            for child in waiting.pop()._modules.values():
                if child is not None:
                    found.append(id(child))
                    found.extend(child._parameters)  # pruning and old weight norms rename those of a module
                    if child._modules:
                        waiting.append(child)
        return adapters, hash(tuple(found))

    def _find_holders(self) -> dict[str, list[BaseTunerLayer]]:
        """The tuner layers that hold each adapter: another one may be merged in the layers that this one is not in.

        All of them, for two towers of one model may have adapters of one name, of which one rests.
        """
        found: dict[str, list[BaseTunerLayer]] = {}
        for layer in self.model.modules():
            if isinstance(layer, BaseTunerLayer):
                held = layer._get_available_adapters()
                for name in self.by_adapter:
                    if name in held:
                        found.setdefault(name, []).append(layer)
        if isinstance(self._witness, BaseTunerLayer):
            return {name: found.get(name, [self._witness]) for name in self.by_adapter}
        return found

    def _first_tuner_layer(self) -> nn.Module | None:
        return next((module for module in self.model.modules() if isinstance(module, BaseTunerLayer)), None)
