"""FSDP2 (`fully_shard`): the optimizer holds shards as DTensors, modules show whole parameters while they compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard

from ..errors import UnsupportedEngineError
from .plain import Plain


class Fsdp2(Plain):
    """
    Shards are stepped one by one like parameters; DTensors tell by themselves that they are shards.

    A backward pass that FSDP2 does not reduce (while accumulating) leaves its gradients where nobody can see them,
    but also where nobody can throw them away; so a backward pass counts as seen when gradients arrive on shards.

    Args:
        host: The module whose forward call is observed.
        model: Model in which modules are sharded.
        backward: Called when a gradient arrives on a shard.
    """

    gathers = True

    def __init__(self, host: nn.Module, model: nn.Module, backward: Callable[[], None]) -> None:
        super().__init__(host)
        self._model = model
        self._backward = backward
        self._handles: list[Any] = []
        self._shards: dict[int, Tensor] = {}

    def find_processes(self, parameters: Sequence[Tensor]) -> None:
        """Read the process groups off a shard, once there is one to be seen.

        Args:
            parameters: As the modules show them now, or as the optimizer holds them.
        """
        shard = next((param for param in parameters if isinstance(param, DTensor)), None)
        if shard is not None and not self.process_groups:
            self.process_groups = list(shard.device_mesh.get_all_groups())

    def before_forward(self, parameters: Sequence[Tensor], paired: bool) -> None:
        """Watch shards, and let whole parameters stay between forward and backward pass.

        The graph hangs on the whole parameters; a shard put back in their place before the risk pass would leave its
        gradient nothing to reach. FSDP2 puts shards back as that gradient passes, and gathers anew for the user's.
        """
        shards = [param for param in parameters if isinstance(param, DTensor)]
        self.find_processes(shards)
        if not paired or not shards:
            return
        for shard in shards:
            if id(shard) not in self._shards:
                self._shards[id(shard)] = shard
                self._handles.append(shard.register_post_accumulate_grad_hook(lambda _: self._backward()))
        for module in sharded_modules(self._model):
            module.set_reshard_after_forward(False, recurse=False)

    def require_whole(self, parameters: Sequence[Tensor]) -> None:
        """Refuse shards.

        Raises:
            UnsupportedEngineError: If there are any.
        """
        if any(isinstance(param, DTensor) for param in parameters):
            raise UnsupportedEngineError(
                "the paired risk pass needs whole parameters inside the forward call, and this engine shows shards "
                "only. Use FSDP2 (fully_shard) or DDP, or strategy='second_order'."
            )

    def whole_parameters(self) -> AbstractContextManager[None]:
        """Keep whole what is gathered inside, and give back afterwards what was sharded before."""
        return _kept_whole(self._host, self._model)

    def gradient_holders(self, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
        """The shards."""
        return list(self._shards.values()) or parameters

    @property
    def sees_backward(self) -> bool:
        """Where there are shards to watch."""
        return bool(self._shards)

    def close(self) -> None:
        """Take the hooks off the shards."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._shards.clear()


def sharded_modules(model: nn.Module) -> list[FSDPModule]:
    """The modules inside a model that `fully_shard` was called on.

    Args:
        model: Any model.
    """
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def split_otherwise(model: nn.Module) -> list[str]:
    """Names of the parameters that are split by something else than FSDP2, as by tensor parallelism.

    Args:
        model: As it shows its parameters in a forward pass.
    """
    sharded = {id(inner) for module in sharded_modules(model) for inner in module.modules()}  # type: ignore[attr-defined]
    return [
        f"{name}.{parameter_name}" if name else parameter_name
        for name, module in model.named_modules()
        for parameter_name, param in module.named_parameters(recurse=False)
        if isinstance(param, DTensor) and not (id(module) in sharded and _is_fsdp2(param))
    ]


def _is_fsdp2(param: DTensor) -> bool:
    *replicas, shard = param.placements
    # Tensor parallelism beside FSDP2 puts a subclass of Shard, or a further shard or replica behind it.
    return type(shard) is Shard and all(isinstance(placement, Replicate) for placement in replicas)


@contextmanager
def _kept_whole(host: nn.Module, model: nn.Module) -> Iterator[None]:
    groups = [group for module in sharded_modules(host) for group in _parameter_groups(module)]
    before = [(group, group.post_forward_mesh_info, group.is_sharded) for group in groups]
    for group in groups:
        group.post_forward_mesh_info = None
    for module in (host, model):  # they are called past their own hooks
        if isinstance(module, FSDPModule):
            module.unshard()
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
