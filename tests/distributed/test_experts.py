"""The tokens of each process go to experts of their own; masks are those of one process all the same."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers as tf
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from rose_peft import ROSEConfig, attach_rose
from tests.distributed.processes import run
from tests.distributed.worker import draw_as_where_calls_gather, whole
from tests.helpers.experts import few_kinds, tiny_mixture

pytestmark = pytest.mark.distributed
STEPS, RANKS = 6, 2
# What one process does: where an engine has gradients of zeros for experts without tokens, so has that process.
ALONE = {"ddp": "none", "fsdp2": "zeros"}


def under(engine: str, model: nn.Module) -> nn.Module:
    """The model under an engine."""
    if engine in ("ddp", "fsdp2"):
        dist.init_process_group("gloo")
    if engine == "ddp":
        return DistributedDataParallel(model, find_unused_parameters=True)
    if engine == "fsdp2":
        for block in model.model.layers:
            fully_shard(block)
        fully_shard(model).set_reduce_scatter_unused_params(True)
    return model


def train(engine: str, kind: str, risk_pass: str, output: Path) -> None:
    """Run by each process; micro-batch k of a step, whose tokens are all alike, goes to rank k modulo their number."""
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    draw_as_where_calls_gather()
    model = tiny_mixture(kind)
    often: dict[str, Any] = {"risk_interval": 2, "risk_fraction": 0.5} if risk_pass == "sampled" else {}
    config = ROSEConfig(task_type="CAUSAL_LM", risk_pass=risk_pass, upper_quantile=0.6, **often)
    selector = attach_rose(model, config)
    network = under(engine, model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    masks = []
    for step in range(STEPS):
        for index in range(rank, RANKS, world):
            torch.manual_seed(10 * step + index)
            (network(**few_kinds(1, seed=RANKS * step + index)).loss * world / RANKS).backward()
        for param in model.parameters() if engine == "zeros" else ():
            param.grad = torch.zeros_like(param) if param.grad is None else param.grad
        optimizer.step()
        optimizer.zero_grad()
        masks.append(selector.state.last_mask.clone())
    weights = list(whole(model.named_parameters()).values())
    reached = selector.state.values["unit_steps"]
    torch.save({"masks": torch.stack(masks), "weights": weights, "stepped": reached}, f"{output}.{rank}")
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def results(ranks: int, engine: str, *arguments: str) -> list[dict[str, Any]]:
    log = Path(f"{arguments[-1]}.log")
    run(ranks, [str(Path(__file__)), engine, *arguments], log, 300, ROSE_CHECK_RANKS="1")
    return [torch.load(f"{arguments[-1]}.{rank}") for rank in range(ranks)]


@pytest.mark.skipif(int(tf.__version__.split(".")[0]) >= 5, reason="transformers 5 fuses the experts of a layer")
@pytest.mark.parametrize("risk_pass", ["paired", "sampled"])
@pytest.mark.parametrize("kind", ["mixtral", "olmoe"])
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_experts_that_only_one_process_has_tokens_for(engine: str, kind: str, risk_pass: str, tmp_path: Path) -> None:
    (expected,) = results(1, ALONE[engine], kind, risk_pass, str(tmp_path / "one"))
    assert (expected["masks"] == 0).any()
    for found in results(2, engine, kind, risk_pass, str(tmp_path / "two")):
        assert torch.equal(found["masks"], expected["masks"])
        assert torch.equal(found["stepped"], expected["stepped"])
        # Some had no tokens on either.
        assert (found["stepped"] < STEPS).any() == ((engine, kind) == ("ddp", "mixtral"))
        torch.testing.assert_close(found["weights"], expected["weights"], rtol=1e-3, atol=5e-5)


if __name__ == "__main__":
    train(sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4]))
