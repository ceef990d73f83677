"""Runs a script in CPU processes that Accelerate takes for GPUs: it shards (FSDP2) over GPUs only.

torchrun --nproc_per_node 2 tests/distributed/as_gpus.py SCRIPT [ARGUMENTS]
"""

from __future__ import annotations

import os
import runpy
import sys
from typing import Any
from unittest import mock

import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType


def gloo_on_gpus(*args: Any, **kwargs: Any) -> tuple[str, DistributedType]:
    """What `PartialState._prepare_backend` answers in such processes."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return "gloo", DistributedType.MULTI_GPU


def pretend() -> mock._patch:
    """A context in which Accelerate starts like that; it reads ACCELERATE_TORCH_DEVICE."""
    return mock.patch.object(PartialState, "_prepare_backend", gloo_on_gpus)


if __name__ == "__main__":
    del sys.argv[0]
    sys.path[0] = os.path.dirname(sys.argv[0])
    with pretend(), mock.patch.dict(os.environ, {"ACCELERATE_TORCH_DEVICE": "cpu"}):
        runpy.run_path(sys.argv[0], run_name="__main__")
