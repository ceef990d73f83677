"""Sampled passes under FSDP2, whichever comes first, ROSE or the shards; one process is enough for that."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from rose_peft import ROSEConfig, RoseSelector, attach_rose
from tests.helpers.tiny import batch, tiny_bert


def shard(model: nn.Module, reshard: bool, half: bool) -> None:
    options = {"mesh": dist.device_mesh.init_device_mesh("cpu", (1,)), "reshard_after_forward": reshard}
    dtype = torch.bfloat16 if half else None
    for block in model.bert.encoder.layer:
        fully_shard(block, **options, mp_policy=MixedPrecisionPolicy(dtype))
    fully_shard(model, **options, mp_policy=MixedPrecisionPolicy(dtype, output_dtype=torch.float32 if half else None))


def train(
    order: str, reshard: bool = True, half: bool = False, upper: float = 0.6
) -> tuple[list[Tensor], RoseSelector]:
    """Returns masks of some steps, and weights at the end."""
    model = tiny_bert()
    config = ROSEConfig(risk_pass="sampled", risk_interval=2, risk_fraction=0.5, upper_quantile=upper)
    if order == "shards first":
        shard(model, reshard, half)
    selector = attach_rose(model, config)
    if order == "ROSE first":
        shard(model, reshard, half)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    found = []
    for step in range(4):
        torch.manual_seed(step)
        loss = model(**batch(model, seed=step)).loss
        blocks = list(model.bert.encoder.layer.parameters())
        assert order == "no shards" or not reshard or all(isinstance(param, DTensor) for param in blocks)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(selector.state.last_mask.clone())
    weights = [param.full_tensor() if isinstance(param, DTensor) else param for param in model.parameters()]
    return [*found, *weights], selector


@pytest.mark.parametrize("reshard", [True, False])
@pytest.mark.parametrize("order", ["ROSE first", "shards first"])
def test_sharded_is_unsharded(group: None, order: str, reshard: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rose_peft.sampled._rows_are_apart", lambda *_: False)  # two small calls without shards too
    expected, _ = train("no shards")
    found, selector = train(order, reshard)
    assert all(torch.equal(one, two) for one, two in zip(found[:4], expected[:4], strict=True))
    assert any((mask == 0).any() for mask in found[:4])
    torch.testing.assert_close(found[4:], expected[4:], rtol=1e-4, atol=1e-6)
    assert selector.statistics().whole_risk_passes == 0


@pytest.mark.parametrize("order", ["ROSE first", "shards first"])
def test_outputs_that_the_engine_casts(group: None, order: str) -> None:
    found, selector = train(order, half=True)
    assert selector.statistics().skipped_risk_passes == 0 and selector.statistics().steps == 4
    assert any((mask == 0).any() for mask in found[:4])
