"""Which engine is around a model: looked for before forward passes and steps; what cannot work is refused by name."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from ..errors import UnsupportedEngineError
from .fsdp2 import Fsdp2, sharded_modules, split_otherwise
from .plain import Plain
from .seam import Engine
from .zero import Zero, find_zero, is_marked


class EngineFinder:
    """
    The engine around one model: plain PyTorch, until another is seen.

    Args:
        host: The module whose forward call is observed.
        model: The base model.
        backward: Called when an engine notes a backward pass.
    """

    def __init__(self, host: nn.Module, model: nn.Module, backward: Callable[[], None]) -> None:
        self.host = host
        self._model = model
        self._backward = backward
        self._looked = self._checked = self._stepped = self._managed = False
        # Whether DeepSpeed was found to be around the model in a way that cannot be read.
        self.refused = False
        self.engine: Engine = Plain(host)

    def __getstate__(self) -> dict[str, Any]:
        unseen = dict.fromkeys(("_looked", "_checked", "_stepped", "_managed"), False)
        return {**self.__dict__, **unseen, "engine": Plain(self.host)}

    def before_forward(self, module: nn.Module, parameters: Sequence[Tensor], paired: bool) -> None:
        """Look before a training pass.

        Args:
            module: Who is called.
            parameters: What the modules hold in place of the unit parameters.
            paired: Whether paired risk passes are made in it.

        Raises:
            UnsupportedEngineError: If ROSE would silently do nothing or the wrong thing under the engine.
        """
        self.check(module, parameters)
        # ZeRO may come later than the first pass, as in a notebook.
        if not self._looked or (is_marked(parameters) and not isinstance(self.engine, Zero)):
            zero = self._find_zero(parameters)
            if zero is not None:
                self._become(zero)
            elif sharded_modules(self._model):
                self._become(Fsdp2(self.host, self._model, self._backward))
            self._looked = True
        self._find_shards(parameters)
        self.engine.before_forward(parameters, paired)

    def check(self, module: nn.Module, parameters: Sequence[Tensor]) -> None:
        """Refuse what no engine file can read; asked once, again when FSDP1 comes later, and for every replica.

        Args:
            module: Who is called.
            parameters: What the modules hold in place of the unit parameters.

        Raises:
            UnsupportedEngineError: Naming it and what to use instead.
        """
        managed = getattr(module, "_is_fsdp_managed_module", False)
        if managed != self._managed:
            self._managed, self._checked = managed, False
        if getattr(module, "_is_replica", False) or not self._checked:
            _refuse(module, self._model, parameters)
            if not self._checked:
                _refuse_pipeline(self._model)
            self._checked = True

    def before_step(self, parameters: Sequence[Tensor]) -> None:
        """Look before a step: some shards show themselves only there, and some engines do not call the model.

        Args:
            parameters: What the optimizer holds, or the unit parameters where it holds none of them.

        Raises:
            UnsupportedEngineError: If ROSE would silently do nothing under the engine.
        """
        if not self._stepped:
            self._stepped = True
            _refuse_pipeline(self._model)
        self._find_shards(parameters)
        if is_marked(parameters) and not isinstance(self.engine, Zero):
            zero = self._find_zero(parameters)
            if zero is not None:
                self._become(zero)

    def _find_zero(self, parameters: Sequence[Tensor]) -> Zero | None:
        try:
            return find_zero(self.host, parameters)
        except UnsupportedEngineError:
            self.refused = True
            raise

    def _find_shards(self, parameters: Sequence[Tensor]) -> None:
        if not any(isinstance(param, DTensor) for param in parameters):
            return
        if not isinstance(self.engine, Fsdp2):
            self._become(Fsdp2(self.host, self._model, self._backward))
        if isinstance(self.engine, Fsdp2):
            self.engine.find_processes(parameters)

    def _become(self, engine: Engine) -> None:
        self.engine.close()
        self.engine = engine


def _refuse(module: nn.Module, model: nn.Module, parameters: Sequence[Tensor]) -> None:
    if getattr(module, "_is_replica", False):
        raise UnsupportedEngineError(
            "nn.DataParallel copies the model at every step, so ROSE cannot follow its parameters. Start one process "
            "per GPU (accelerate launch, torchrun), or make one GPU visible (CUDA_VISIBLE_DEVICES=0)."
        )
    # FSDP1 around the whole puts views of its flat parameter into the modules, where FSDP2 puts parameters; around
    # blocks inside, which are shards until their turn comes, it can be seen itself.
    whole = all(isinstance(param, nn.Parameter) for param in parameters)
    wrapped = getattr(module, "_is_fsdp_managed_module", False) and not whole
    if wrapped or any(isinstance(inner, FullyShardedDataParallel) for inner in module.modules()):
        raise UnsupportedEngineError(
            "FSDP1 flattens parameters, so units cannot be told apart. Use FSDP2 (fsdp_version: 2 in the Accelerate "
            "config) or DDP."
        )
    # A tp_plan splits the base's weights and leaves adapters as plain tensors with other values on each process.
    split = split_otherwise(model)
    plan = getattr(model, "tp_size", None) or getattr(model, "_tp_size", None) or 1
    if split or plan > 1:
        what = f"of {split[0]!r} and {len(split) - 1} more parameters" if split else f"(tp_size={plan})"
        raise UnsupportedEngineError(
            f"tensor parallelism {what} splits units over processes, so their norms cannot be told. Train with FSDP2, "
            "ZeRO or DDP; load the model without tp_plan."
        )


def _refuse_pipeline(model: nn.Module) -> None:
    """Refuse the stages of torch.distributed.pipelining, and those that Accelerate's prepare_pippy makes.

    Nothing on the model leads to them, so all objects are gone through, which takes up to a second: before the first
    pass and the first step, and only where there may be one. A stage asks its process group for its rank when it is
    made.
    """
    package = sys.modules.get("torch.distributed.pipelining.stage")
    if package is None or not distributed.is_initialized():
        return
    own = {id(param) for param in model.parameters()}
    stages = [thing for thing in gc.get_objects() if issubclass(type(thing), package._PipelineStageBase)]
    for stage in stages:
        if stage.num_stages > 1 and any(id(param) in own for param in stage.submod.parameters()):
            raise UnsupportedEngineError(
                f"stage {stage.stage_index} of {stage.num_stages} of a pipeline holds a part of the units; they would "
                "be ranked among those alone, and what it returns are no logits. Train with FSDP2, ZeRO or DDP."
            )
