"""FSDP1 is refused however it is wrapped; a process group of one process shows it."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from rose_peft import ROSEConfig, UnsupportedEngineError, attach_rose, get_selector
from tests.helpers.tiny import batch, tiny_bert


@pytest.mark.parametrize("strategy", ["second_order", "ensemble"])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("use_orig_params", [True, False])
def test_fsdp1_is_refused(group: None, use_orig_params: bool, nested: bool, strategy: str) -> None:
    model = tiny_bert()
    attach_rose(model, ROSEConfig(task_type="SEQ_CLS", strategy=strategy))
    policy = ModuleWrapPolicy({type(model.bert.encoder.layer[0])}) if nested else None
    network = FullyShardedDataParallel(
        model, use_orig_params=use_orig_params, auto_wrap_policy=policy, device_id=torch.device("cpu")
    )
    with pytest.raises(UnsupportedEngineError, match="Use FSDP2"):
        network(**batch(tiny_bert()))


@pytest.mark.parametrize("strategy", ["second_order", "ensemble"])
@pytest.mark.parametrize("use_orig_params", [True, False])
def test_fsdp1_is_refused_when_it_comes_after_a_pass(group: None, use_orig_params: bool, strategy: str) -> None:
    model = tiny_bert()
    attach_rose(model, ROSEConfig(task_type="SEQ_CLS", strategy=strategy))
    model(**batch(model))
    network = FullyShardedDataParallel(model, use_orig_params=use_orig_params, device_id=torch.device("cpu"))
    with pytest.raises(UnsupportedEngineError, match="Use FSDP2"):
        network(**batch(tiny_bert()))


@pytest.mark.parametrize("strategy", ["second_order", "ensemble"])
@pytest.mark.parametrize("nested", [True, False])
def test_fsdp2_is_not_taken_for_it(group: None, nested: bool, strategy: str) -> None:
    model = tiny_bert()
    attach_rose(model, ROSEConfig(task_type="SEQ_CLS", strategy=strategy))
    for block in model.bert.encoder.layer if nested else ():
        fully_shard(block, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
    fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        model(**batch(tiny_bert())).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert get_selector(model).statistics().steps == 2
