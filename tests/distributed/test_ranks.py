"""Several processes stay together over many steps, and whatever happens to one of them; see also test_table.py."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import processes
from tests.helpers.comparing import worst

pytestmark = pytest.mark.distributed
WORKER = str(Path(__file__).with_name("worker.py"))


def results(ranks: int, engine: str, strategy: str, output: Path, *options: str) -> list[dict[str, Any]]:
    """Run the worker and return what each rank wrote."""
    log = Path(f"{output}.log")
    processes.run(ranks, [WORKER, engine, strategy, str(output), *options], log, 300, ROSE_CHECK_RANKS="1")
    return [torch.load(f"{output}.{rank}") for rank in range(ranks)]


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_masks_and_weights_are_the_same_on_all_ranks_over_50_steps(engine: str, tmp_path: Path) -> None:
    one, two = results(2, engine, "ensemble", tmp_path / "out", "--steps", "50")
    assert torch.equal(one["masks"], two["masks"])
    assert worst(one["weights"], two["weights"]) == 0


SAMPLED = ("--risk_pass", "sampled")


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_sampled_passes_of_ranks_are_those_of_micro_batches(engine: str, tmp_path: Path) -> None:
    """Over passes at steps 0, 2 ... 18: the same interval and the same masks on all ranks and in one process."""
    options = (*SAMPLED, "--micro_batches", "4", "--steps", "20")
    alike = ("--two_calls",) if engine == "fsdp2" else ()
    (expected,) = results(1, "none", "ensemble", tmp_path / "one", *options, *alike)
    changes = (expected["masks"][1:] != expected["masks"][:-1]).any(1)
    assert changes.any()
    for rank in results(2, engine, "ensemble", tmp_path / "two", *options):
        assert torch.equal(rank["masks"], expected["masks"])
        assert worst(rank["weights"], expected["weights"]) < 1e-4


@pytest.mark.parametrize("engine", ["ddp", "ddp_unused", "ddp_static", "fsdp2"])
def test_sampled_passes_leave_the_reducers_alone(engine: str, tmp_path: Path) -> None:
    """With nothing frozen gradients and weights are those of plain training under the engine, to the last bit."""
    plain = results(2, engine, "ensemble", tmp_path / "off", "--rose", "off", "--steps", "4")
    opened = results(2, engine, "ensemble", tmp_path / "open", "--rose", "open", "--steps", "4", *SAMPLED)
    for one, two in zip(plain, opened, strict=True):
        assert (two["masks"] == 1).all() and two["statistics"]["steps"] == 4
        assert all(unit["first_order_score"] > 0 for unit in two["statistics"]["units"].values())
        for step in range(4):
            assert one["gradients"][step].keys() == two["gradients"][step].keys()
            assert all(
                torch.equal(grad, two["gradients"][step][name]) for name, grad in one["gradients"][step].items()
            )
        assert all(torch.equal(weight, two["weights"][name]) for name, weight in one["weights"].items())
        # Between forward and backward only that is whole which FSDP2 keeps whole without ROSE: nothing of the blocks.
        assert all(names <= more for names, more in zip(one["sharded"], two["sharded"], strict=True))
        blocks = {name for name in one["weights"] if ".encoder.layer." in name}
        assert all(blocks <= names for names in two["sharded"]) == (engine == "fsdp2")


def test_three_ranks(tmp_path: Path) -> None:
    expected = results(1, "none", "ensemble", tmp_path / "one", "--micro_batches", "3")[0]
    for rank in results(3, "ddp", "ensemble", tmp_path / "three", "--micro_batches", "3"):
        assert torch.equal(rank["masks"], expected["masks"])
        assert worst(rank["weights"], expected["weights"]) < 1e-4


def test_ranks_and_accumulation_together(tmp_path: Path) -> None:
    expected = results(1, "none", "ensemble", tmp_path / "one", "--micro_batches", "4")[0]
    for rank in results(2, "ddp", "ensemble", tmp_path / "two", "--micro_batches", "4"):
        assert torch.equal(rank["masks"], expected["masks"])
        assert worst(rank["weights"], expected["weights"]) < 1e-4


def test_a_smaller_last_batch_on_one_rank(tmp_path: Path) -> None:
    one, two = results(2, "ddp", "ensemble", tmp_path / "out", "--small_last")
    assert torch.equal(one["masks"], two["masks"])
    assert worst(one["weights"], two["weights"]) == 0


def test_a_nan_loss_on_one_rank_keeps_ranks_together_and_frozen_units_whole(tmp_path: Path) -> None:
    one, two = results(2, "ddp", "second_order", tmp_path / "out", "--nan_at", "5")
    assert torch.equal(one["masks"], two["masks"])
    # Every gradient is NaN after the reduction, so no score is finite and every unit is frozen.
    assert torch.equal(one["masks"][5], torch.zeros_like(one["masks"][5]))
    units = [name for name in one["weights"] if ".encoder.layer." in name and name.endswith("weight")]
    assert units and all(torch.isfinite(one["weights"][name]).all() for name in units)


def test_an_empty_batch_on_one_rank_ends_all_with_an_error(tmp_path: Path) -> None:
    """Transformers cannot take a batch of no examples; the other rank must not wait for ever."""
    command = [WORKER, "ddp", "ensemble", str(tmp_path / "out"), "--empty_last"]
    codes = processes.wait(processes.start(2, [*command, "--timeout", "10"], tmp_path / "log"), 100)
    assert all(code not in (0, None) for code in codes)
    assert "0 elements" in (tmp_path / "log.1").read_text() and "Error" in (tmp_path / "log.0").read_text()


def test_a_rank_without_examples_takes_any_with_a_loss_of_zero(tmp_path: Path) -> None:
    (expected,) = results(1, "none", "ensemble", tmp_path / "one", "--idle_last")
    for rank in results(2, "ddp", "ensemble", tmp_path / "two", "--idle_last"):
        assert torch.equal(rank["masks"], expected["masks"]) and (rank["masks"] == 0).any()
        assert worst(rank["weights"], expected["weights"]) < 1e-4  # NaN is not


@pytest.mark.parametrize("loss", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_a_lost_rank_ends_the_others_with_an_error(engine: str, loss: signal.Signals, tmp_path: Path) -> None:
    """Killed, its connections break; hung, the process group's timeout does it."""
    command = [WORKER, engine, "ensemble", str(tmp_path / "out")]
    ranks = processes.start(2, [*command, "--steps", "1000000", "--timeout", "10"], tmp_path / "log")
    try:
        processes.until(lambda: all((tmp_path / f"out.{rank}.began").exists() for rank in (0, 1)), ranks)
        os.kill(ranks[1].pid, loss)
        (code,) = processes.wait(ranks[:1], 40)  # the timeout, and the end of a process on a busy machine
    finally:
        processes.kill(ranks)
    assert code not in (0, None)
    assert "Error" in (tmp_path / "log.0").read_text()


def test_the_rank_check_names_the_first_unit_that_differs(tmp_path: Path) -> None:
    command = [WORKER, "ddp", "second_order", str(tmp_path / "out"), "--diverge_at", "3"]
    codes = processes.wait(processes.start(2, command, tmp_path / "log", ROSE_CHECK_RANKS="1"), 100)
    assert all(code not in (0, None) for code in codes)
    printed = "".join((tmp_path / f"log.{rank}").read_text() for rank in (0, 1))
    assert "RankMismatchError: mask of unit 'bert.encoder.layer." in printed
