"""What ROSE sends between processes in a step is what the README says."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard

from rose_peft import ROSEConfig, attach_rose, distributed, get_selector
from tests.distributed.test_fsdp1 import group
from tests.helpers.tiny import batch, tiny_bert

__all__ = ["group"]
PASSES = 3  # numbers that count the risk passes


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("strategy", ["first_order", "second_order", "ensemble"])
def test_bytes_per_step(group: None, strategy: str, sharded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_bert()
    attach_rose(model, ROSEConfig(task_type="SEQ_CLS", strategy=strategy))
    if sharded:
        fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
    sent: list[int] = []

    def all_reduce(values: Tensor, op: dist.ReduceOp) -> None:
        sent.append(values.numel() * values.element_size())

    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):  # second order begins at the second step
        sent.clear()
        model(**batch(tiny_bert())).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    units = len(get_selector(model).units)
    expected = {"first_order": [8 * (units + PASSES)], "second_order": [], "ensemble": [8 * (units + PASSES)]}[
        strategy
    ]
    if sharded and strategy != "first_order":
        expected = [*expected, 16 * units]
    assert sent == expected
