"""What ROSE sends between processes in a step is what the README says."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard

from rose_peft import ROSEConfig, attach_rose, get_selector
from rose_peft.distributed import Processes
from tests.distributed.test_fsdp1 import group
from tests.helpers.tiny import batch, tiny_bert

__all__ = ["group"]
COUNTS = 5  # numbers that count the risk passes


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("strategy", ["first_order", "second_order", "ensemble"])
def test_bytes_per_step(group: None, strategy: str, sharded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_bert()
    attach_rose(model, ROSEConfig(task_type="SEQ_CLS", strategy=strategy))
    if sharded:
        fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
    sent: list[int] = []

    def counted(processes: Processes, values: Tensor) -> Tensor:
        sent.append(values.numel() * values.element_size())
        return values

    monkeypatch.setattr(Processes, "sum", counted)
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):  # second order begins at the second step
        sent.clear()
        model(**batch(tiny_bert())).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    units = len(get_selector(model).units)
    risk = 8 * (units + COUNTS) if strategy != "second_order" else 0
    norms = 16 * units if sharded and strategy != "first_order" else 0
    assert sent == [risk + norms] * bool(risk + norms)
