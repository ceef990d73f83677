"""torch.distributed.checkpoint's state dicts, as Accelerate saves FSDP2: resumed equals uninterrupted."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from rose_peft import ROSEConfig, attach_rose, get_selector
from tests.helpers.tiny import batch, tiny_bert

WHOLE = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


def make(strategy: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = tiny_bert()
    attach_rose(model, ROSEConfig(task_type="SEQ_CLS", strategy=strategy))
    fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> list[Tensor]:
    for _ in range(count):
        model(**batch(tiny_bert())).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return [param.full_tensor() for param in model.parameters()]


@pytest.mark.parametrize("strategy", ["first_order", "second_order", "ensemble"])
def test_resumed_equals_uninterrupted(group: None, strategy: str) -> None:
    model, optimizer = make(strategy)
    steps(model, optimizer, 2)
    weights, state = get_state_dict(model, optimizer, options=WHOLE)
    weights = {name: tensor.clone() for name, tensor in weights.items()}
    state = torch.utils._pytree.tree_map_only(Tensor, torch.clone, state)
    expected = steps(model, optimizer, 2)
    again, optimizer = make(strategy)
    set_state_dict(again, optimizer, model_state_dict=weights, optim_state_dict=state, options=WHOLE)
    found = steps(again, optimizer, 2)
    assert all(torch.equal(one, two) for one, two in zip(expected, found, strict=True))
    statistics = [get_selector(one).statistics() for one in (model, again)]
    assert statistics[0].steps == 4 and 0 < statistics[0].kept_share < 1
    assert str(statistics[0].as_dict()) == str(statistics[1].as_dict())  # as text: NaN equals itself
