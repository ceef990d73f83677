"""What happens to one rank ends in a training that is the same on all, or in an error that names the rank."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.processes import start, wait

pytestmark = pytest.mark.distributed
TIMEOUT = 6  # of the process group, in seconds


def run(engine: str, folder: Path, *cells: str, **environment: str) -> list[dict[str, Any]]:
    """Run the cells in two processes and return what each wrote."""
    script = str(Path(__file__).with_name("faults.py"))
    options = ["--timeout", str(TIMEOUT if len(cells) == 1 else 60)]
    ranks = start(2, [script, engine, str(folder / "out"), *cells, *options], folder / "log", **environment)
    found = wait(ranks, 240)
    assert None not in found, "hangs"
    return [torch.load(folder / f"out.{rank}") for rank in (0, 1) if (folder / f"out.{rank}").exists()]


def environment_of(engine: str, request: pytest.FixtureRequest) -> dict[str, str]:
    return request.getfixturevalue("deepspeed_environment") if engine.startswith("zero") else {}


GOES_ON = [f"ensemble/{risk_pass}/{fault}" for risk_pass in ("paired", "sampled") for fault in ("nan logits", "empty")]
GOES_ON += ["ensemble/paired/nan loss", "second_order/paired/nan loss", "ensemble/paired/one call, reduced once"]


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero2"])
def test_ranks_go_on_together(engine: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Passes that say nothing are left out on all ranks, and more or fewer of them are those of micro-batches."""
    cells = [cell for cell in GOES_ON if engine == "ddp" or not cell.endswith("once")]
    one, two = run(engine, tmp_path, *cells, **environment_of(engine, request))
    assert list(one) == list(two) == cells
    for cell in cells:
        assert not one[cell]["error"] and not two[cell]["error"], one[cell]["message"]
        # DeepSpeed leaves a step with a NaN out altogether.
        assert len(one[cell]["masks"]) == (3 if "nan" in cell and engine == "zero2" else 4)
        assert torch.equal(torch.stack(one[cell]["masks"]), torch.stack(two[cell]["masks"]))
        assert one[cell]["skipped"] == two[cell]["skipped"]
        if engine != "zero2":
            assert one[cell]["skipped"][2] == ("nan logits" in cell)
        for name, weight in one[cell]["weights"].items():
            assert torch.equal(weight.nan_to_num(99), two[cell]["weights"][name].nan_to_num(99))


FEWER = "rank 1 begins its optimizer step 3 after 1 model call, and .* did not come"
MORE = "rank 0 begins its optimizer step 3 after 2 model calls, and (rank 1|another rank) did not come"
STEPS = "rank 1 has taken another number of steps than rank 0: .* step 4 after 2 model calls"


@pytest.mark.parametrize(
    ("engine", "cell", "messages"),
    [
        # One reduction of DDP or FSDP2 less: the rank that has come to the masks says so, the other has torch's error.
        ("ddp", "ensemble/paired/one call", [None, FEWER]),
        ("ddp", "second_order/paired/one call", [None, FEWER]),
        ("ddp", "ensemble/paired/one call more", [MORE, None]),
        ("fsdp2", "ensemble/paired/one call", [None, FEWER]),
        ("fsdp2", "ensemble/sampled/one call", [None, FEWER]),
        # A step without a call: the engine pairs the next with the others' last, the masks are not made.
        ("ddp", "ensemble/paired/no call", [STEPS, STEPS]),
        ("ddp", "second_order/paired/no call", [STEPS, STEPS]),
        ("fsdp2", "ensemble/sampled/no call", [STEPS, STEPS]),
    ],
)
def test_ranks_end_with_an_error(engine: str, cell: str, messages: list[str | None], tmp_path: Path) -> None:
    found = run(engine, tmp_path, cell)
    assert len(found) == 2
    for rank, message in zip(found, messages, strict=True):
        assert torch.equal(torch.stack(rank[cell]["masks"]), torch.stack(found[0][cell]["masks"]))
        assert len(rank[cell]["masks"]) == 2 and "weights" not in rank[cell]
        assert rank[cell]["error"] == ("RankMismatchError" if message else "RuntimeError")
        assert message is None or re.search(message, rank[cell]["message"]), rank[cell]["message"]


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_counts_calls_itself(stage: int, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """A rank with one call less is behind by one micro-batch, with the same masks, until the others run out."""
    engine, cell = f"zero{stage}", "ensemble/sampled/one call"
    found = run(engine, tmp_path, cell, **environment_of(engine, request))
    masks = [torch.stack(rank[cell]["masks"]) for rank in found]
    assert masks[0].shape == masks[1].shape and torch.equal(masks[0], masks[1]) and len(masks[0]) == 3
    assert "" in [rank[cell]["error"] for rank in found]  # who had the least to do
