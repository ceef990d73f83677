"""Which processes train a model together, and sums over them; which engines are refused, and by which errors."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from .errors import RankMismatchError, UnsupportedEngineError

CHECK_RANKS = "ROSE_CHECK_RANKS"


class Processes:
    """
    The processes that train one model together: those of the engine around it, or those that the user names.

    Models in one process group that no engine ties together (one model per process) are independent.

    Args:
        given: The user's process group, or None to go by the engine.
    """

    def __init__(self, given: dist.ProcessGroup | None = None) -> None:
        self._given = given
        self._found: list[dist.ProcessGroup] = []
        self._warned = False

    def find(self, host: nn.Module, parameters: Sequence[Tensor]) -> None:
        """Look for the engine, during a forward pass or before an optimizer step.

        Args:
            host: The module whose forward call is observed.
            parameters: What the modules hold in place of the unit parameters, or what the optimizer holds.
        """
        if self._given is not None or self._found or not _is_initialized():
            return
        # DDP runs the module inside; it leaves no mark on it but this one, for compilers.
        ddp = getattr(DistributedDataParallel, "_active_ddp_module", None)
        shard = next((param for param in parameters if isinstance(param, DTensor)), None)
        if shard is not None:
            self._found = list(shard.device_mesh.get_all_groups())
        elif ddp is not None and any(module is host for module in ddp.modules()):
            self._found = [ddp.process_group]

    def warn_if_alone(self) -> None:
        """Say once that processes which no engine ties together are taken for independent ones."""
        alone = self._given is None and not self._found and _is_initialized() and dist.get_world_size() > 1
        if alone and not self._warned:
            self._warned = True
            warnings.warn(
                f"this process is one of {dist.get_world_size()}, and neither DDP nor FSDP2 is around the model: ROSE "
                "takes the model for one that this process trains alone. If they train it together by other means, "
                "pass process_group=torch.distributed.group.WORLD to attach_rose.",
                stacklevel=2,
            )

    @property
    def groups(self) -> list[dist.ProcessGroup]:
        """The process groups over which sums run, one after the other; none for a single process."""
        groups = [self._given] if self._given is not None else self._found
        return [group for group in groups if dist.get_world_size(group) > 1]

    def sum(self, values: Tensor) -> Tensor:
        """Add a small vector over all processes, so that K processes and K micro-batches give the same scores.

        Args:
            values: float64 [any] on the device of the parameters; one all-reduce of 8 bytes per entry and group.

        Returns:
            The sum, equal to the last bit on all processes.
        """
        for group in self.groups:
            dist.all_reduce(values, op=dist.ReduceOp.SUM, group=group)
        return values

    def check_equal(self, names: Sequence[str], masks: Tensor, device: torch.device) -> None:
        """Compare the masks of all processes where the environment variable ROSE_CHECK_RANKS is 1.

        Args:
            names: Unit names, U of them.
            masks: float32 [U].
            device: Device for the collective.

        Raises:
            RankMismatchError: On every process, naming the first unit that differs.
        """
        if os.environ.get(CHECK_RANKS, "0") in ("", "0"):
            return
        for group in self.groups:
            mine = masks.to(device)
            gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
            dist.all_gather(gathered, mine, group=group)
            for rank, theirs in enumerate(gathered):
                different = (theirs != gathered[0]).nonzero().flatten().tolist()
                if different:
                    raise RankMismatchError(
                        f"mask of unit {names[different[0]]!r} is {float(gathered[0][different[0]])} on rank 0 and "
                        f"{float(theirs[different[0]])} on rank {rank} ({len(different)} units differ). The replicas "
                        "have diverged: check that all ranks load the same weights and that gradients are "
                        "synchronised."
                    )


def _is_initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def keep_unsharded_after_forward(model: nn.Module) -> None:
    """Let FSDP2 keep whole parameters between forward and backward: more memory, and one all-gather less.

    Args:
        model: Model in which modules are sharded by `fully_shard`.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_reshard_after_forward(False, recurse=False)


@contextmanager
def whole_parameters(model: nn.Module) -> Iterator[None]:
    """Let FSDP2 keep whole what it gathers inside, and give back afterwards what was sharded before.

    Args:
        model: Model in which modules may be sharded by `fully_shard`.
    """
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    groups = [group for module in sharded for group in _parameter_groups(module)]
    before = [(group, group.post_forward_mesh_info, group.is_sharded) for group in groups]
    for group in groups:
        group.post_forward_mesh_info = None
    try:
        yield
    finally:
        for group, mesh_info, was_sharded in before:
            group.post_forward_mesh_info = mesh_info
            if was_sharded and not group.is_sharded:
                group.reshard()


def _parameter_groups(module: FSDPModule) -> list[Any]:
    """The parameter groups of one module; torch has one or several of them, by version."""
    state = module._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [state._fsdp_param_group] if state._fsdp_param_group is not None else []


def check_engine(module: nn.Module, parameters: Sequence[Tensor]) -> None:
    """Refuse engines under which ROSE would silently do nothing or the wrong thing.

    Args:
        module: The module whose forward call is running.
        parameters: What the modules hold in place of the unit parameters.

    Raises:
        UnsupportedEngineError: Naming the engine and what to use instead.
    """
    if getattr(module, "_is_replica", False):
        raise UnsupportedEngineError(
            "nn.DataParallel copies the model at every step, so ROSE cannot follow its parameters. Start one process "
            "per GPU (accelerate launch, torchrun), or make one GPU visible (CUDA_VISIBLE_DEVICES=0)."
        )
    # ZeRO-3 marks its parameters; the other stages leave no mark, but Accelerate knows of them.
    accelerated = AcceleratorState._shared_state.get("distributed_type") == DistributedType.DEEPSPEED
    if accelerated or any(hasattr(param, "ds_id") for param in parameters):
        raise UnsupportedEngineError(
            "DeepSpeed steps flat copies of the parameters inside its own engine, so masks cannot act. Use DDP or "
            "FSDP2 through Accelerate (accelerate_configs/multi_gpu_ddp.yaml, multi_gpu_fsdp2.yaml)."
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
