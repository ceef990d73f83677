"""DeepSpeed ZeRO: the masks of DDP with the same data, frozen units that do not move, and resuming; or a refusal."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import rose_peft
from rose_peft.engines import zero as engine
from tests.distributed.conftest import Record
from tests.distributed.processes import run
from tests.distributed.zero import CELLS, SLOW, STEPS, ZeroCell
from tests.helpers.comparing import worst
from tests.helpers.tiny import batch, tiny_bert
from tests.helpers.traffic import expected_bytes

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]
# Adam turns the rounding of a gradient into a small part of its step; bf16 weights are 2**-8 apart.
CLOSE = {"float32": 1e-4, "bf16": 2**-6}


def launch(environment: dict[str, str], folder: Path, script: str, *arguments: str) -> None:
    run(2, [str(Path(__file__).with_name(script)), *arguments], folder / "log", **environment)


@pytest.fixture(scope="module")
def folder(deepspeed_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of all cells, from one launch."""
    folder = tmp_path_factory.mktemp("zero")
    launch(deepspeed_environment, folder, "zero.py", str(folder))
    return folder


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_cell(cell: ZeroCell, folder: Path, record_outcome: Record) -> None:
    record_outcome(cell.row, "FAILED", "")
    check(cell, folder)
    reason = torch.load(folder / f"{cell.name}.0")["message"].split(". ")[0] if cell.refusal else ""
    record_outcome(cell.row, "refused" if cell.refusal else "works", reason)


@pytest.mark.slow
def test_deepspeeds_own_optimizer_on_the_cpu(deepspeed_environment: dict[str, str], tmp_path: Path) -> None:
    launch(deepspeed_environment, tmp_path, "zero.py", str(tmp_path), "slow")
    for cell in SLOW:
        check(cell, tmp_path)


def check(cell: ZeroCell, folder: Path) -> None:
    """Assert that ROSE acted, alike on all ranks and as under DDP, or that it was refused."""
    ranks: list[dict[str, Any]] = [torch.load(folder / f"{cell.name}.{rank}") for rank in (0, 1)]
    if cell.refusal:
        for rank in ranks:
            assert issubclass(getattr(rose_peft, rank["error"]), rose_peft.UnsupportedEngineError), rank["trace"]
            assert cell.refusal in rank["message"]
        return
    for rank in ranks:
        assert not rank["error"], rank["trace"]
        assert len(rank["masks"]) == rank["statistics"]["steps"] == STEPS - (cell.overflow_at >= 0)
        assert (rank["masks"] == 0).any() and (rank["masks"] > 0).any(), "nothing was frozen, or everything"
        assert not rank["wrong"]
        assert torch.equal(rank["masks"], ranks[0]["masks"])
        assert all(torch.equal(rank["weights"][name], ranks[0]["weights"][name]) for name in rank["weights"])
        assert max(rank["traffic"]) == expected_bytes(cell.strategy, rank["units"], True, rank["vectors"])
        if cell.compared:
            assert torch.equal(rank["masks"], rank["reference"]["masks"])
            weights = {name: weight.float() for name, weight in rank["weights"].items()}
            assert worst(weights, rank["reference"]["weights"]) < CLOSE[cell.precision]


@pytest.mark.parametrize(
    ("route", "settings"),
    [("accelerate", "paired"), ("accelerate", "second_order"), ("trainer", "paired"), ("trainer", "sampled")],
)
def test_resumed_equals_uninterrupted(
    deepspeed_environment: dict[str, str], tmp_path: Path, route: str, settings: str
) -> None:
    launch(deepspeed_environment, tmp_path, "resume_zero.py", route, settings, str(tmp_path))
    for rank in (0, 1):
        one, two = (torch.load(tmp_path / f"{name}.{rank}") for name in ("whole", "resumed"))
        assert all(torch.equal(one["weights"][name], two["weights"][name]) for name in one["weights"])
        assert one["statistics"]["steps"] == 4 and 0 < one["statistics"]["kept_share"] < 1
        assert str(one["statistics"]) == str(two["statistics"])  # as text: NaN equals itself


def test_marks_without_an_engine_are_refused() -> None:
    """As under a pipeline, which calls layers instead of the model: the forward call or the first step tells."""
    model = tiny_bert()
    rose_peft.attach_rose(model, rose_peft.ROSEConfig(task_type="SEQ_CLS"))
    for param in model.parameters():
        param._hp_mapping = SimpleNamespace(gradient_dict={})
    copy = torch.nn.Parameter(torch.ones(2))
    copy.grad = torch.ones(2)
    with pytest.raises(rose_peft.UnsupportedEngineError, match="bear the marks of DeepSpeed"):
        torch.optim.AdamW([copy]).step()
    with pytest.raises(rose_peft.UnsupportedEngineError, match="bear the marks of DeepSpeed"):
        model(**batch(model))
    torch.optim.AdamW([copy]).step()  # said once: other models may be trained beside it


def test_parameters_that_are_split_already_are_refused() -> None:
    model = tiny_bert()
    for index, param in enumerate(model.parameters()):
        param.ds_id = index
    with pytest.raises(rose_peft.UnsupportedEngineError, match="zero3_init_flag: false"):
        rose_peft.attach_rose(model, rose_peft.ROSEConfig(task_type="SEQ_CLS"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "lacks .*single_partition_of_fp32_groups"),
        ({"zenflow": True}, "ZenFlow"),
        ({"has_moe_layers": True}, "mixture-of-experts"),
        ({"autotp_size": lambda: 2}, "tensor parallelism"),
        ({"zero_round_robin_gradients": lambda: True}, "round_robin"),
    ],
)
def test_an_engine_that_cannot_be_read_is_refused(change: dict[str, Any], message: str) -> None:
    kind = type("DeepSpeedZeroOptimizer", (), {"averaged_gradients": {}, "optimizer": None})
    settings = {
        "optimizer": kind(),
        "zero_optimization_stage": lambda: 2,
        "zero_round_robin_gradients": lambda: False,
        "zero_elastic_checkpoint": lambda: False,
        **change,
    }
    with pytest.raises(rose_peft.UnsupportedEngineError, match=message):
        engine._read(SimpleNamespace(**settings))
