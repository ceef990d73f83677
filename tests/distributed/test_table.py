"""Every engine x loop x precision x strategy x risk pass: works as in one process, or is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import rose_peft
from tests.distributed.cells import CELLS, Cell
from tests.distributed.conftest import Record
from tests.distributed.loops import steps_of
from tests.distributed.processes import run
from tests.helpers.comparing import worst
from tests.helpers.traffic import expected_bytes

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]
CLOSE = {"float32": 1e-4, "float64": 1e-12}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of all cells, from one launch of one process and one of two."""
    folder = tmp_path_factory.mktemp("table")
    script = str(Path(__file__).with_name("table.py"))
    for ranks in (1, 2):
        run(ranks, [script, str(folder)], folder / f"log.{ranks}", seconds=800, ROSE_CHECK_RANKS="1")
    return folder


def trained(cell: Cell, ranks: list[dict[str, Any]], reference: dict[str, Any] | None) -> None:
    """Assert that ROSE acted, alike on all ranks, and as in one process."""
    for rank in ranks:
        assert not rank["error"], rank["trace"]
        assert rank["sharded"] == (cell.engine == "fsdp2")
        assert rank["steps"] == len(rank["masks"]) == steps_of(cell)
        assert (rank["masks"] == 0).any() and (rank["masks"] > 0).any(), "nothing was frozen, or everything"
        assert not rank["wrong"]
        assert torch.equal(rank["masks"], ranks[0]["masks"])
        if cell.ranks > 1:
            assert max(rank["traffic"]) == bytes_of(cell, rank)
            # One reduction per step, or none between sampled passes of first order.
            between = cell.risk_pass == "sampled" and cell.strategy == "first_order"
            assert len(rank["traffic"]) == (rank["steps"] // 2 if between else rank["steps"])
        assert all(torch.equal(rank["weights"][name], ranks[0]["weights"][name]) for name in rank["weights"])
        if reference is not None:
            assert torch.equal(rank["masks"], reference["masks"])
            assert worst(rank["weights"], reference["weights"]) < CLOSE[cell.precision]


def bytes_of(cell: Cell, rank: dict[str, Any]) -> int:
    """What a step sends at most."""
    return expected_bytes(cell.strategy, rank["masks"].shape[1], rank["sharded"], rank["vectors"])


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_cell(cell: Cell, folder: Path, record_outcome: Record, record_figures: Callable[[str], None]) -> None:
    record_outcome(cell, "FAILED", "")
    ranks = [torch.load(path) for path in sorted(folder.glob(f"{cell.name}.[01]"))]
    assert len(ranks) == cell.ranks
    if cell.refusal:
        for rank in ranks:
            assert issubclass(getattr(rose_peft, rank["error"]), rose_peft.RoseError), rank["trace"]
            assert cell.refusal in rank["message"]
        record_outcome(cell, "refused", f"{ranks[0]['error']}: {ranks[0]['message']}")
    elif cell.obstacle:
        assert all(cell.obstacle in rank["message"] for rank in ranks), ranks[0]
        record_outcome(cell, "not on CPU", ranks[0]["message"].split(" on rank")[0])
    else:
        trained(cell, ranks, torch.load(folder / f"{cell.reference}.0") if cell.reference else None)
        record_outcome(cell, "works", "")
        if cell.ranks > 1 and (cell.loop, cell.precision) == ("plain", "float32"):
            units = ranks[0]["masks"].shape[1]
            record_figures(f"{cell.engine} {cell.way}: {max(ranks[0]['traffic'])} bytes per step for {units} units")
