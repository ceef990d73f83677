"""Tensor parallelism is refused, however it is made; a process group of one process shows it."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from rose_peft import ROSEConfig, UnsupportedEngineError, attach_rose, get_selector
from tests.helpers.tiny import batch, tiny_bert

PLAN = {"intermediate.dense": ColwiseParallel(), "output.dense": RowwiseParallel()}


def attached(strategy: str) -> nn.Module:
    model = tiny_bert()
    attach_rose(model, ROSEConfig(task_type="SEQ_CLS", strategy=strategy))
    return model


@pytest.mark.parametrize("strategy", ["second_order", "ensemble"])
@pytest.mark.parametrize("sharded", [False, True])
def test_split_parameters_are_refused(group: None, strategy: str, sharded: bool) -> None:
    model = attached(strategy)
    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "tp"))
    for block in model.bert.encoder.layer:
        parallelize_module(block, mesh["tp"], PLAN)
        if sharded:
            fully_shard(block, mesh=mesh["dp"])
    with pytest.raises(UnsupportedEngineError, match=r"tensor parallelism of 'bert\.encoder\.layer\.0.*FSDP2"):
        model(**batch(tiny_bert()))


def test_a_tp_plan_of_transformers_is_refused_although_adapters_look_plain(group: None) -> None:
    model = attached("ensemble")
    model._tp_size = 2
    with pytest.raises(UnsupportedEngineError, match=r"tp_size=2.*without tp_plan"):
        model(**batch(tiny_bert()))


def test_replicas_of_shards_are_not_taken_for_it(group: None) -> None:
    model = attached("ensemble")
    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("replicas", "shards"))
    for module in (*model.bert.encoder.layer, model):
        fully_shard(module, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    model(**batch(tiny_bert())).loss.backward()
    optimizer.step()
    assert get_selector(model).statistics().steps == 1
    assert dist.get_world_size() == 1
