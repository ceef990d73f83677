"""DeepSpeed's ZeRO: each process steps a stretch of every parameter group, in float32, inside DeepSpeed's own step.

DeepSpeed flattens each parameter group and gives each process a stretch of it: the `holder` of all parts that lie in
it. It calls the user's own optimizer once per parameter group (stages 1 and 2) or sub-group (stage 3), with nothing
but that group in it, so that masks are made in the first call and act in each. Weights of ours are written to the
float32 stretch; DeepSpeed copies it to the model's parameters and gathers them.

What is read here is private to DeepSpeed, is the same in all versions from 0.15.4 to 0.19.8, and is checked when an
engine is first seen.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import UnsupportedEngineError
from ..optimizers import owned_groups
from .seam import Group, Part, Turn

_NAMES = {
    "DeepSpeedZeroOptimizer": (
        "single_partition_of_fp32_groups",
        "bit16_groups",
        "averaged_gradients",
        "unscale_and_clip_grads",
        "_global_grad_norm",
        "loss_scale",
        "clip_grad",
        "dp_process_group",
    ),
    "BF16_Optimizer": ("fp32_groups_flat_partition", "bf16_groups", "fp32_groups_gradient_dict", "dp_process_group"),
    "DeepSpeedZeroOptimizer_Stage3": (
        "fp32_partitioned_groups_flat",
        "fp16_groups",
        "grad_position",
        "get_param_id",
        "sub_group_to_group_id",
        "_global_grad_norm",
        "loss_scale",
        "clip_grad",
        "dp_process_group",
    ),
}
_INSTEAD = "Use ZeRO stage 1 or 2 (accelerate_configs/multi_gpu_deepspeed_zero2.yaml), FSDP2 or DDP."


class Zero:
    """
    Stages 1 and 2.

    Args:
        engine: The `DeepSpeedEngine` around the model.
    """

    splits = True
    gathers = False
    sees_backward = True

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._zero = engine.optimizer
        self.optimizer: Optimizer = self._zero.optimizer
        self.process_groups: list[dist.ProcessGroup] = [self._zero.dp_process_group]
        self._settings = list(self.optimizer.param_groups)
        self._index = {id(param): index for index, params in enumerate(self._members()) for param in params}
        self._skipped = int(engine.skipped_steps)
        self._lost = False
        self._scale = 1.0
        self._factor: Tensor | None = None

    # Where things lie -----------------------------------------------------------------------------------------------

    def _members(self) -> list[list[Tensor]]:
        """The model's parameters of each flat tensor."""
        return self._zero.bit16_groups

    def _flats(self) -> list[Tensor]:
        """This process's stretch of each flattened group, float32: what the optimizer holds."""
        return self._zero.single_partition_of_fp32_groups

    def _settings_of(self, index: int) -> Group:
        """Settings of the group that a flat tensor belongs to."""
        if len(self.optimizer.param_groups) == len(self._members()):  # within a step there is one group only
            self._settings = list(self.optimizer.param_groups)
        return self._settings[index]

    def part(self, param: Tensor) -> Part:
        """A stretch of its group's flat tensor; of no elements where other processes step all of it."""
        mapping: Any = param._hp_mapping  # type: ignore[attr-defined]
        flat = self._flats()[self._index[id(param)]]
        if mapping is None:
            return Part(flat, (0, 0))
        return Part(flat, (mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel))

    # Steps ----------------------------------------------------------------------------------------------------------

    def groups(self, optimizer: Optimizer) -> dict[int, Group]:
        """All groups of the engine's optimizer, whichever of them it is called with now."""
        if optimizer is not self.optimizer:
            return owned_groups(optimizer)
        settings = [self._settings_of(index) for index in range(len(self._members()))]
        return {id(param): settings[index] for index, params in enumerate(self._members()) for param in params}

    def turn(self, optimizer: Optimizer) -> Turn:
        """Groups are stepped one after the other, in their order."""
        if optimizer is not self.optimizer:
            return Turn()
        now = owned_groups(optimizer)
        turns = [index for index, flat in enumerate(self._flats()) if id(flat) in now]
        turn = Turn(0 in turns, len(self._flats()) - 1 in turns)
        if turn.first:
            self._factor = None
        return turn

    def steps(self, param: Tensor) -> bool:
        """All: to DeepSpeed a missing gradient is one of zeros."""
        return True

    def gradient(self, param: Tensor) -> Tensor:
        """Averaged over processes, unscaled and clipped, float32 [elements of the part].

        DeepSpeed unscales and clips a group just before it steps it, so those that come later are done here.
        """
        part = self.part(param)
        if part.is_empty:
            return part.of(part.holder)
        if id(part.holder) in owned_groups(self.optimizer):
            return part.gradient
        return self._raw(param, part).float() * self._clipped()

    def _raw(self, param: Tensor, part: Part) -> Tensor:
        mapping: Any = param._hp_mapping  # type: ignore[attr-defined]
        if mapping.use_offload:
            return part.gradient
        fragment: Tensor = mapping.get_lp_grad_fragment(param._index_in_param_group)  # type: ignore[attr-defined]
        return fragment.detach().reshape(-1)

    def _clipped(self) -> Tensor:
        """The factor that unscales and clips, as DeepSpeed itself makes it: to the last bit."""
        if self._factor is None:
            device = self._flats()[0].device
            factor = torch.ones((), device=device)
            norm = self._zero._global_grad_norm
            self._zero.unscale_and_clip_grads([factor], norm * self._scale if self._zero.clip_grad > 0 else None)
            self._factor = factor
        return self._factor

    # Forward passes -------------------------------------------------------------------------------------------------

    def before_forward(self, parameters: Sequence[Tensor], paired: bool) -> None:
        """Note the loss scale, which DeepSpeed changes before it unscales, and whether the last step was skipped."""
        self._scale = self._loss_scale()
        skipped = int(self._engine.skipped_steps)
        self._lost, self._skipped = skipped != self._skipped, skipped

    def _loss_scale(self) -> float:
        return float(self._zero.loss_scale)

    def require_whole(self, parameters: Sequence[Tensor]) -> None:
        """Accept: parameters are whole."""

    def whole_parameters(self) -> AbstractContextManager[None]:
        """Nothing to do: parameters are whole."""
        return nullcontext()

    def discarded(self) -> bool | None:
        """DeepSpeed throws gradients away in a step that overflows; else `param.grad` is None all the same."""
        return self._lost

    def gradient_holders(self, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
        """None: DeepSpeed says itself whether gradients were thrown away."""
        return ()

    def close(self) -> None:
        """There is nothing on the model."""


class Bf16(Zero):
    """Stage 1 in bf16 with gradients accumulated in float32: one call steps all groups, with all gradients ready."""

    def _members(self) -> list[list[Tensor]]:
        return self._zero.bf16_groups

    def _flats(self) -> list[Tensor]:
        return self._zero.fp32_groups_flat_partition

    def _loss_scale(self) -> float:
        return 1.0


class Zero3(Zero):
    """Stage 3: parameters are split as well, so that only a pass of its own can see them whole."""

    gathers = True

    def _members(self) -> list[list[Tensor]]:
        return self._zero.fp16_groups

    def _flats(self) -> list[Tensor]:
        return self._zero.fp32_partitioned_groups_flat

    def _settings_of(self, index: int) -> Group:
        return self.optimizer.param_groups[self._zero.sub_group_to_group_id[index]]

    def part(self, param: Tensor) -> Part:
        """Its stretch of a sub-group's flat tensor."""
        index, start, numel = self._zero.grad_position[self._zero.get_param_id(param)]
        return Part(self._flats()[index], (int(start), int(numel)))

    def _raw(self, param: Tensor, part: Part) -> Tensor:
        from deepspeed.utils import safe_get_local_grad

        return safe_get_local_grad(param).detach().reshape(-1)

    def _clipped(self) -> Tensor:
        if self._factor is None:
            scale = torch.tensor(float(self._zero.loss_scale), device=self._flats()[0].device)
            if self._zero.clip_grad > 0:
                norm = self._zero._global_grad_norm
                scale = scale * torch.clamp((norm + 1e-6) / self._zero.clip_grad, min=1.0)
            self._factor = (1.0 / scale).float()
        return self._factor

    def require_whole(self, parameters: Sequence[Tensor]) -> None:
        """Refuse.

        Raises:
            UnsupportedEngineError: Always.
        """
        raise UnsupportedEngineError(
            "DeepSpeed ZeRO stage 3 splits parameters again before the paired risk pass can take its gradient. Use "
            "risk_pass='sampled' or strategy='second_order', or ZeRO stage 2, FSDP2 or DDP."
        )


def is_marked(parameters: Sequence[Tensor]) -> bool:
    """Whether ZeRO has marked parameters as its own.

    Args:
        parameters: As the modules show them.
    """
    return any(hasattr(param, "_hp_mapping") or hasattr(param, "ds_id") for param in parameters)


def refuse_split(parameters: Sequence[Tensor]) -> None:
    """Refuse parameters that are not whole when ROSE is attached: their shapes and sizes cannot be told.

    Args:
        parameters: Of the units.

    Raises:
        UnsupportedEngineError: If ZeRO stage 3 has split them.
    """
    if any(hasattr(param, "ds_id") for param in parameters):
        raise UnsupportedEngineError(
            "DeepSpeed ZeRO stage 3 has split the parameters already. Make the model with zero3_init_flag: false and "
            "attach ROSE before deepspeed.initialize, or use ZeRO stage 2."
        )


def find_zero(host: nn.Module, parameters: Sequence[Tensor]) -> Zero | None:
    """Look for the DeepSpeed engine around a model.

    Nothing on the model, its parameters or the optimizer leads to the engine, so all objects are gone through; once,
    and only in a process that uses DeepSpeed.

    Args:
        host: The module whose forward call is observed.
        parameters: The unit parameters.

    Returns:
        How to read it, or None where there is none.

    Raises:
        UnsupportedEngineError: If there is one that hides what ROSE needs, or that this version does not know.
    """
    module = sys.modules.get("deepspeed.runtime.engine")
    engines = [] if module is None else _engines(module.DeepSpeedEngine, host)
    stepped = [engine for engine in engines if _is_theirs(engine, parameters)]
    if stepped:
        return _read(stepped[-1])
    if not is_marked(parameters):
        for engine in engines:
            _refuse(engine)
        return None
    raise UnsupportedEngineError(
        f"the parameters bear the marks of DeepSpeed ZeRO{_version()}, and no engine of deepspeed.initialize is "
        f"around the model whose forward call ROSE observes. {_INSTEAD}"
    )


def _engines(cls: type, host: nn.Module) -> list[Any]:
    # By class alone: `isinstance` would wake lazy proxies of other packages.
    found = [thing for thing in gc.get_objects() if issubclass(type(thing), cls)]
    return [engine for engine in found if any(module is host for module in engine.modules())]


def _is_theirs(engine: Any, parameters: Sequence[Tensor]) -> bool:
    """Whether an engine is the one whose marks the parameters bear: an older one may still be about."""
    marks = [getattr(param, "_hp_mapping", None) for param in parameters]
    dictionaries = [mark.gradient_dict for mark in marks if mark is not None]
    zero = engine.optimizer
    mine = getattr(zero, "averaged_gradients", None), getattr(zero, "fp32_groups_gradient_dict", None)
    third = any(getattr(param, "_z3_optimizer", None) is zero for param in parameters)
    return third or any(dictionary is own for dictionary in dictionaries for own in mine)


def _read(engine: Any) -> Zero:
    _refuse(engine)
    zero = engine.optimizer
    name = type(zero).__name__
    readers: dict[str, type[Zero]] = {
        "DeepSpeedZeroOptimizer": Zero,
        "BF16_Optimizer": Bf16,
        "DeepSpeedZeroOptimizer_Stage3": Zero3,
    }
    missing = [attribute for attribute in _NAMES.get(name, ()) if not hasattr(zero, attribute)]
    if name not in readers or missing:
        what = f"lacks {', '.join(missing)}" if missing else "is not known"
        raise UnsupportedEngineError(
            f"DeepSpeed{_version()}: the optimizer {name} {what}, so ROSE cannot read its gradients and momenta. Use "
            "deepspeed>=0.15.4,<0.20 (in a clone of rose-peft: pip install '.[deepspeed]')."
        )
    return readers[name](engine)


def _refuse(engine: Any) -> None:
    """Refuse what is known to hide the units, or has not been tried.

    Raises:
        UnsupportedEngineError: Naming it.
    """
    stage = int(engine.zero_optimization_stage())
    autotp = engine.autotp_size() if hasattr(engine, "autotp_size") else 0
    refused = {
        "the pipeline engine calls layers instead of the model": type(engine).__name__ == "PipelineEngine",
        "tensor parallelism (AutoTP) splits units over processes": autotp > 1,
        "ZeRO stage 0 steps copies of the parameters that lead to nobody": stage == 0,
        "ZenFlow steps parts of a parameter at different times": bool(getattr(engine, "zenflow", False)),
        "mixture-of-experts groups are reduced over groups of their own": bool(
            getattr(engine, "has_moe_layers", False)
        ),
        "round_robin_gradients puts parameters elsewhere than their marks say": bool(
            engine.zero_round_robin_gradients()
        ),
        "elastic checkpoints leave out the parameter groups, in which ROSE's state lies": bool(
            engine.zero_elastic_checkpoint()
        ),
    }
    for why, applies in refused.items():
        if applies:
            raise UnsupportedEngineError(f"DeepSpeed{_version()}: {why}. {_INSTEAD}")


def _version() -> str:
    return f" {getattr(sys.modules.get('deepspeed'), '__version__', '')}".rstrip()
