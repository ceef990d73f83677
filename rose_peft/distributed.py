"""Making scores equal on all ranks; which engines are not supported, and the errors that say so."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

from .errors import RankMismatchError, UnsupportedEngineError

CHECK_RANKS = "ROSE_CHECK_RANKS"


def world_size() -> int:
    """Number of processes that train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(values: Tensor) -> Tensor:
    """Add a small vector over all ranks, so that K ranks and K micro-batches give the same scores.

    Args:
        values: float64 [any] on the device of the parameters; one all-reduce of 8 bytes per entry.

    Returns:
        The sum, equal to the last bit on all ranks.
    """
    if world_size() > 1:
        dist.all_reduce(values, op=dist.ReduceOp.SUM)
    return values


def check_equal_on_ranks(names: Sequence[str], masks: Tensor, device: torch.device) -> None:
    """Compare the masks of all ranks where the environment variable ROSE_CHECK_RANKS is 1.

    Args:
        names: Unit names, U of them.
        masks: float32 [U].
        device: Device for the collective.

    Raises:
        RankMismatchError: On every rank, naming the first unit that differs.
    """
    if world_size() == 1 or os.environ.get(CHECK_RANKS, "0") in ("", "0"):
        return
    mine = masks.to(device)
    gathered = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(gathered, mine)
    for rank, theirs in enumerate(gathered):
        different = (theirs != gathered[0]).nonzero().flatten().tolist()
        if different:
            raise RankMismatchError(
                f"mask of unit {names[different[0]]!r} is {float(gathered[0][different[0]])} on rank 0 and "
                f"{float(theirs[different[0]])} on rank {rank} ({len(different)} units differ). The replicas have "
                "diverged: check that all ranks load the same weights and that gradients are synchronised."
            )


def keep_unsharded_after_forward(model: nn.Module) -> None:
    """Let FSDP2 keep whole parameters between forward and backward: more memory, and one all-gather less.

    Args:
        model: Model in which modules are sharded by `fully_shard`.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_reshard_after_forward(False, recurse=False)


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
