"""ROSEModel, the PEFT side of full fine-tuning, and the composition with another PEFT method."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import (
    BaseTuner,
    _ExcludedModule,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .config import ROSEConfig
from .errors import AlreadyAttachedError, RoseConfigError, TargetModulesError, UnsupportedModelError
from .layer import RoseLayer, tie_copies
from .overlay import obstacle
from .selector import RoseSelector, find_selector
from .units import base_modules, find_units, is_target, prefixes

_LATE_HEADS: dict[Any, tuple[str, ...]] = {"TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}


class ROSEModel(BaseTuner):
    """
    Tuner of PEFT that trains full weights under ROSE.

    Each module with trainable parameters is wrapped by a `RoseLayer`. With a `base_config` no ROSEModel is built at
    all: the constructor returns the tuner of that method, so that PEFT treats the model as the plain inner adapter,
    with ROSE attached to it.

    Args:
        model: Base model, changed in place.
        peft_config: One ROSEConfig, or a dictionary of them by adapter name.
        adapter_name: Name of the adapter.
        **kwargs: As in `BaseTuner`.
    """

    prefix = "rose_"
    tuner_layer_cls = RoseLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  (an instance variable of BaseTuner)

    def __new__(cls, model: Any = None, peft_config: Any = None, adapter_name: str = "default", **kwargs: Any) -> Any:
        if peft_config is None:  # copy and pickle fill the object in themselves
            return super().__new__(cls)
        wrapped = isinstance(peft_config, dict)  # by a PeftModel; `inject_adapter_in_model` passes the config alone
        config = own_copy(peft_config[adapter_name] if wrapped else peft_config)
        if find_selector(model) is not None:
            raise AlreadyAttachedError(
                f"ROSE is already attached to this {type(model).__name__}; call detach_rose(model) first."
            )
        if config.base_config is not None:
            return _build_inner(model, config, adapter_name, wrapped, **kwargs)
        return super().__new__(cls)

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, **kwargs: Any) -> None:
        self._frozen = {
            name for name, param in model.named_parameters(remove_duplicate=False) if not param.requires_grad
        }
        super().__init__(model, peft_config, adapter_name, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model with its hooks; BaseTuner would go past them."""
        return self.model(*args, **kwargs)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Wrap the target modules, tie the copies of tied weights, and attach ROSE where the adapter trains."""
        config = self.peft_config[adapter_name] = own_copy(self.peft_config[adapter_name])
        if config.base_config is not None:
            raise RoseConfigError(
                "base_config cannot be added to a model that is fully fine-tuned with ROSE; start from the base model "
                "(model.unload()) and call get_peft_model with it."
            )
        selector = find_selector(model)
        if selector is not None:
            selector.hold_dropout(None)  # or the copies that are made now would take it for the model's own
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        _replace_children(model, {id(layer.base_layer): layer for layer in _rose_layers(model)})
        tie_copies(self.model, adapter_name)
        if not config.inference_mode and config.original_weights != "keep":
            for layer in _rose_layers(model):
                layer.put_away(config.original_weights)
        if not config.inference_mode and find_selector(self.model) is None:
            RoseSelector(self.model, self.model, config)

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:
        return peft_config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        refuse_quantized(model)
        _maybe_include_all_linear_layers(peft_config, model)  # in place
        self._targets = self._find_targets(peft_config, model)
        _refuse_obstacles(model, self._targets)
        if not peft_config.inference_mode:
            find_units(model, peft_config, self._targets)  # refuses before anything is changed
            if peft_config.target_modules is None:
                self._record_frozen(peft_config, model)

    def _record_frozen(self, config: ROSEConfig, model: nn.Module) -> None:
        """Name modules that the user froze in the config, or a loaded adapter would expect weights for them."""
        frozen = {
            name
            for name, module in base_modules(model)
            if name
            and (own := _own_parameters(module))
            and all(f"{name}.{parameter}" in self._frozen for parameter in own)
        }
        if frozen and isinstance(config.exclude_modules, str):
            names = "|".join(re.escape(name) for name in sorted(frozen))
            config.exclude_modules = f"(?:{config.exclude_modules})|{names}"
        elif frozen:
            config.exclude_modules = frozen | set(config.exclude_modules or ())

    def _find_targets(self, config: ROSEConfig, model: nn.Module) -> set[str]:
        """Names of the modules to wrap: those with parameters of their own that are meant to train."""
        modules = [(name, module) for name, module in base_modules(model) if _own_parameters(module)]
        targets = set()
        for name, module in modules:
            own = _own_parameters(module)
            if config.target_modules is None:
                trains = any((f"{name}.{parameter}" if name else parameter) not in self._frozen for parameter in own)
                chosen = trains and not self._is_kept_aside(config, name)
            else:
                chosen = is_target(config, name)
            if chosen and not name:
                raise UnsupportedModelError(
                    f"parameters {own} lie on the model itself ({type(model).__name__}), which cannot be wrapped. "
                    "Freeze them (requires_grad_(False)) before get_peft_model, or pass target_modules."
                )
            if chosen and not self._is_excluded(config, name):
                targets.add(name)
        if not targets:
            frozen = ", and every parameter of the model is frozen" if config.target_modules is None else ""
            names = [name for name, _ in modules if name]
            raise TargetModulesError(
                f"target_modules={config.target_modules!r} matches no module with parameters{frozen} "
                f"(exclude_modules={config.exclude_modules!r}, modules_to_save={config.modules_to_save!r}). "
                f"Candidates: {', '.join(names[:12])}{' ...' if len(names) > 12 else ''}."
            )
        return targets

    @staticmethod
    def _is_excluded(config: ROSEConfig, name: str) -> bool:
        probe = copy.copy(config)
        probe.target_modules = set()
        return any(isinstance(check_target_module_exists(probe, prefix), _ExcludedModule) for prefix in prefixes(name))

    @staticmethod
    def _is_kept_aside(config: ROSEConfig, name: str) -> bool:
        """Whether PEFT will wrap this module, or one around it, for `modules_to_save` (which goes by name endings)."""
        return any(prefix.endswith(saved) for prefix in prefixes(name) for saved in config.modules_to_save or ())

    def _check_target_module_exists(self, peft_config: Any, key: str) -> bool | _ExcludedModule:  # type: ignore[override]
        if key.replace(".base_layer", "") in self._targets and not key.endswith(".base_layer"):
            return True
        return _ExcludedModule() if self._is_excluded(peft_config, key) else False

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, RoseLayer):
            target.update_layer(adapter_name)
            return
        frozen = self._frozen if peft_config.target_modules is None else set()
        name = current_key.replace(".base_layer", "")
        layer = RoseLayer(target, adapter_name, [own for own in _own_parameters(target) if f"{name}.{own}" in frozen])
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT goes by names from before the wrapping, so the parent may be the layer that has come around it.
        setattr(parent.base_layer if isinstance(parent, RoseLayer) else parent, child_name, new_module)

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        super()._mark_only_adapters_as_trainable(model)
        # PEFT 0.18 goes by the prefix, which names of the base model may contain ("prose_encoder").
        managed = (RoseLayer, AuxiliaryTrainingWrapper)
        kept = {id(param) for m in model.modules() if isinstance(m, managed) for param in _adapter_parameters(m)}
        for name, param in model.named_parameters():
            if self.prefix in name and id(param) not in kept:
                param.requires_grad = False

    def _get_tied_target_modules(self, model: nn.Module) -> list[str]:
        """None that PEFT should warn of: copies of tied weights are tied, and merging keeps them so."""
        return []

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # Full weights keep the dtype of the model. PEFT calls this after loading, which may untie.
        tie_copies(self.model, adapter_name)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        # PEFT looks modules up by names that are out of date once the container around them is unloaded, so our layers
        # go first; it then deals with `modules_to_save`.
        layers = _rose_layers(self.model)
        for layer in () if merge else layers:
            layer.check_originals()
        for layer in layers if merge else ():
            layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        selector = find_selector(self.model)
        if selector is not None:
            selector.detach()
        _replace_children(self.model, {id(layer): layer.release() for layer in layers})
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)

    def _check_tied_modules(self, *args: Any) -> None:
        """PEFT's warning about tied weights does not apply either."""


def own_copy(config: Any) -> Any:
    """Copy a ROSEConfig for one model: what is found out about that model is written into the copy only.

    It names the head of the task in `modules_to_save` where PEFT does so only after it has built the tuner; by then
    the head would be wrapped as a part of the model, and the inner config would have been copied.

    Args:
        config: As the user gave it; he may use it again for another model.
    """
    saved = config.modules_to_save or []
    named = list(dict.fromkeys([*saved, *_LATE_HEADS.get(config.task_type, ())]))
    if config.inference_mode and named == saved and config.target_modules != "all-linear":
        return config  # nothing is found out; PEFT's users expect the object that they gave to `from_pretrained`
    copied = copy.deepcopy(config)
    copied.modules_to_save = named or copied.modules_to_save
    return copied


def _refuse_obstacles(model: nn.Module, targets: set[str]) -> None:
    for name, module in base_modules(model):
        if name in targets and not isinstance(module, RoseLayer) and any(True for _ in module.children()):
            reason = obstacle(module, _own_parameters(module))
            if reason is not None:
                raise UnsupportedModelError(
                    f"the parameters {_own_parameters(module)} of {name!r} cannot have trained copies: {reason}. "
                    f"Leave it out by exclude_modules=[{name!r}], or freeze them (requires_grad_(False))."
                )


def _rose_layers(model: nn.Module) -> list[RoseLayer]:
    return [module for module in model.modules() if isinstance(module, RoseLayer)]


def _replace_children(model: nn.Module, replacements: dict[int, nn.Module]) -> None:
    """Replace modules, given by identity, wherever they hang: a shared one (T5's embedding) has several parents.

    A model may reach its modules through lists, tuples and dictionaries of its own, too.
    """
    seen: set[int] = set()
    for parent in list(model.modules()):
        if isinstance(parent, RoseLayer):  # what it is around stays inside
            continue
        for name, child in parent._modules.items():
            parent._modules[name] = replacements.get(id(child), child)
        for name, value in vars(parent).items():
            if name not in ("_modules", "_parameters", "_buffers"):
                parent.__dict__[name] = _replaced_inside(value, replacements, seen)


def _replaced_inside(value: Any, replacements: dict[int, nn.Module], seen: set[int]) -> Any:
    """A value with modules replaced in it: lists and dictionaries in place, for others may hold them too.

    Args:
        value: Anything.
        replacements: Modules by the identities of those in whose place they stand.
        seen: Identities of lists and dictionaries that are done; they may hold each other.
    """
    if isinstance(value, nn.Module):
        return replacements.get(id(value), value)
    if type(value) is tuple:
        found = tuple(_replaced_inside(item, replacements, seen) for item in value)
        return found if any(one is not other for one, other in zip(found, value, strict=True)) else value
    if type(value) in (list, dict) and id(value) not in seen:
        seen.add(id(value))
        for place, item in list(enumerate(value) if type(value) is list else value.items()):
            found = _replaced_inside(item, replacements, seen)
            if found is not item:
                value[place] = found
    return value


def _adapter_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    if not isinstance(module, RoseLayer):
        return module.parameters()
    return (param for name in module.adapter_layer_names for param in getattr(module, name).parameters())


def _own_parameters(module: nn.Module) -> list[str]:
    if isinstance(module, RoseLayer):
        return module.parameter_names
    return [name for name, _ in module.named_parameters(recurse=False)]


def refuse_quantized(model: nn.Module) -> None:
    """Refuse full fine-tuning of a model whose weights are quantized or complex.

    Raises:
        UnsupportedModelError: Naming the mark or the parameter that tells.
    """
    marks = ("is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized", "quantization_method")
    mark = next((mark for mark in marks if getattr(model, mark, None)), None)
    complex_one = next((name for name, param in model.named_parameters() if param.is_complex()), None)
    if complex_one is not None:
        raise UnsupportedModelError(
            f"{complex_one} is complex, and full fine-tuning masks real weights. Train an adapter over the model: "
            "ROSEConfig(base_config=LoraConfig(...))."
        )
    integer = next((name for name, param in model.named_parameters() if not param.is_floating_point()), None)
    if mark is not None or integer is not None:
        found = f"model.{mark}={getattr(model, mark)}" if mark else f"{integer} has an integer dtype"
        raise UnsupportedModelError(
            f"full fine-tuning needs floating-point weights, but the base is quantized ({found}). Load it without "
            "quantization, or train an adapter over it: ROSEConfig(base_config=LoraConfig(...))."
        )


def _build_inner(model: nn.Module, config: ROSEConfig, adapter_name: str, wrapped: bool, **kwargs: Any) -> BaseTuner:
    """Build the tuner of the base config and attach ROSE, to the tuner where a PeftModel will keep it."""
    inner = copy.deepcopy(config.base_config)
    assert inner is not None
    inner.inference_mode = config.inference_mode
    inner.base_model_name_or_path = config.base_model_name_or_path
    for name in ("task_type", "revision", "modules_to_save"):
        value = getattr(config, name)
        if hasattr(inner, name):
            setattr(inner, name, value)
        elif value:
            raise RoseConfigError(
                f"{name}={value!r} is unknown to {type(inner).__name__}, so it would be lost; leave it out."
            )
    tuner_cls = PEFT_TYPE_TO_TUNER_MAPPING[PeftType(inner.peft_type)]
    tuner = tuner_cls(model, {adapter_name: inner}, adapter_name, **kwargs)
    if not config.inference_mode:
        # A PeftModel calls the tuner, which calls `model.forward` directly, so hooks on the model would not fire.
        RoseSelector(tuner if wrapped else model, model, config)
    return tuner
