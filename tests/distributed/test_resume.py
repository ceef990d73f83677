"""All processes killed at random steps, again and again, and resumed: the end is as if nothing had happened."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
import torch

from tests.distributed.processes import ROOT, kill, run, start, until
from tests.helpers.task import assert_same_run, options

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(3000)]
FEW_AND_MANY = [pytest.param(2, id="2 kills"), pytest.param(20, id="20 kills", marks=pytest.mark.slow)]
# Accelerate calls the device of one of several CPU processes "cpu:0"; there the Trainer loads no optimizer.
DEVICE = {"ACCELERATE_TORCH_DEVICE": "cpu"}


def checkpoints(folder: Path) -> set[tuple[str, int]]:
    """Complete and incomplete checkpoints under their final name; a replaced one counts anew."""
    try:
        return {
            (path.name, path.stat().st_ino) for path in folder.rglob("checkpoint*/*") if ".partial" not in str(path)
        }
    except FileNotFoundError:  # replaced just now
        return checkpoints(folder)


def kill_at_random(
    ranks: int, command: list[str], folder: Path, log: Path, rng: random.Random, **environment: str
) -> None:
    """Start, let one or two steps be saved, and kill everything within the next one or two."""
    processes = start(ranks, command, log, **environment)
    try:
        for _ in range(rng.randint(1, 2)):
            before = checkpoints(folder)
            until(lambda before=before: bool(checkpoints(folder) - before), processes)
        time.sleep(rng.uniform(0, 0.2))
    finally:
        kill(processes)


@pytest.mark.parametrize("kills", FEW_AND_MANY)
def test_accelerate_on_two_processes(inputs: dict[str, str], tmp_path: Path, kills: int) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    # Four epochs of 12 steps; 20 kills see 40 of them at most, and not many more within the delays.
    more = ("--save_steps", "1", "--batch_size", "4", "--epochs", "1" if kills < 3 else "8")
    script = str(ROOT / "examples" / "train.py")
    run(2, [script, *options(inputs, whole, *more)], tmp_path / "log")
    rng = random.Random(kills)
    for _ in range(kills):
        resume = ("--resume",) if (broken / "run.json").exists() else ()
        kill_at_random(2, [script, *options(inputs, broken, *more, *resume)], broken, tmp_path / "log", rng)
    run(2, [script, *options(inputs, broken, *more, "--resume")], tmp_path / "log")
    assert_same_run(whole, broken)


def assert_same_end(whole: Path, broken: Path, steps: int) -> None:
    """Both runs ended in the same weights and statistics, to the last bit."""
    one, two = (torch.load(folder / "end", weights_only=False) for folder in (whole, broken))
    assert all(torch.equal(one["weights"][name], two["weights"][name]) for name in one["weights"])
    assert one["statistics"]["steps"] == steps and 0 < one["statistics"]["kept_share"] < 1
    assert str(one["statistics"]) == str(two["statistics"])  # as text: NaN equals itself


@pytest.mark.parametrize("kills", FEW_AND_MANY)
@pytest.mark.parametrize("engine", ["fsdp2", "zero2"])
def test_save_state(engine: str, kills: int, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """`accelerator.save_state` under the engines that split what the optimizer holds; sampled passes."""
    environment = request.getfixturevalue("deepspeed_environment") if engine == "zero2" else {}
    script = str(Path(__file__).with_name("resume_accelerate.py"))
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
        command = [script, engine, str(tmp_path / name), str(kills * 6)]
        rng = random.Random(kills)
        for _ in range(kills if name == "broken" else 0):
            kill_at_random(2, command, tmp_path / name, tmp_path / "log", rng, **environment)
        run(2, command, tmp_path / "log", **environment)
    assert_same_end(tmp_path / "whole", tmp_path / "broken", kills * 6)


@pytest.mark.parametrize("kills", FEW_AND_MANY)
@pytest.mark.parametrize("ranks", [1, 2])
def test_trainer(ranks: int, kills: int, tmp_path: Path) -> None:
    for name in ("whole", "broken"):
        command = [str(Path(__file__).with_name("resume_trainer.py")), str(tmp_path / name), str(kills * 6)]
        rng = random.Random(kills)
        for _ in range(kills if name == "broken" else 0):
            kill_at_random(ranks, command, tmp_path / name, tmp_path / "log", rng, **DEVICE)
        run(ranks, command, tmp_path / "log", **DEVICE)
    assert_same_end(tmp_path / "whole", tmp_path / "broken", kills * 6)
