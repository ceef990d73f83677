"""Under DDP the tokens of each process go to experts of their own; masks are those of one process all the same."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers as tf
from torch.nn.parallel import DistributedDataParallel

from rose_peft import ROSEConfig, attach_rose
from tests.distributed.processes import run
from tests.helpers.experts import few_kinds, tiny_mixture

pytestmark = pytest.mark.distributed
STEPS, RANKS = 6, 2


def train(kind: str, risk_pass: str, output: Path) -> None:
    """Run by each process; micro-batch k of a step, whose tokens are all alike, goes to rank k modulo their number."""
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if world > 1:
        dist.init_process_group("gloo")
    model = tiny_mixture(kind)
    often: dict[str, Any] = {"risk_interval": 2, "risk_fraction": 0.5} if risk_pass == "sampled" else {}
    config = ROSEConfig(task_type="CAUSAL_LM", risk_pass=risk_pass, upper_quantile=0.6, **often)
    selector = attach_rose(model, config)
    network = DistributedDataParallel(model, find_unused_parameters=True) if world > 1 else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    masks = []
    for step in range(STEPS):
        for index in range(rank, RANKS, world):
            torch.manual_seed(10 * step + index)
            (network(**few_kinds(1, seed=RANKS * step + index)).loss * world / RANKS).backward()
        optimizer.step()
        optimizer.zero_grad()
        masks.append(selector.state.last_mask.clone())
    weights = [param.detach() for param in model.parameters()]
    reached = selector.state.values["unit_steps"]
    torch.save({"masks": torch.stack(masks), "weights": weights, "stepped": reached}, f"{output}.{rank}")
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def results(ranks: int, *arguments: str) -> list[dict[str, Any]]:
    log = Path(f"{arguments[-1]}.log")
    run(ranks, [str(Path(__file__)), *arguments], log, 300, ROSE_CHECK_RANKS="1")
    return [torch.load(f"{arguments[-1]}.{rank}") for rank in range(ranks)]


@pytest.mark.skipif(int(tf.__version__.split(".")[0]) >= 5, reason="transformers 5 fuses the experts of a layer")
@pytest.mark.parametrize("risk_pass", ["paired", "sampled"])
@pytest.mark.parametrize("kind", ["mixtral", "olmoe"])
def test_experts_that_only_one_process_has_tokens_for(kind: str, risk_pass: str, tmp_path: Path) -> None:
    (expected,) = results(1, kind, risk_pass, str(tmp_path / "one"))
    assert (expected["masks"] == 0).any()
    for found in results(2, kind, risk_pass, str(tmp_path / "two")):
        assert torch.equal(found["masks"], expected["masks"])
        assert torch.equal(found["stepped"], expected["stepped"])
        assert kind == "olmoe" or (found["stepped"] < STEPS).any()  # some had no tokens on either
        torch.testing.assert_close(found["weights"], expected["weights"], rtol=1e-3, atol=1e-5)


if __name__ == "__main__":
    train(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
