"""What scale.py measures, what plan.py says of it, and the page that shows the plan."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from examples.benchmark import scale
from examples.benchmark.plan import ENGINES, WAYS, Training, check, collectives, memory, of_figures, plan, sent
from tests.helpers.pages import ROOT

FIGURES = json.loads((ROOT / "examples/benchmark/results/scale.json").read_text(encoding="utf-8"))
TINY = ("--width", "64", "--layers", "2", "--vocabulary", "64", "--length", "2")


def agrees(found: dict[str, Any], engine: str, way: str, within: float) -> None:
    training = of_figures(found)
    expected = memory(engine, way, training)
    assert found["kept"] == pytest.approx(expected.kept, rel=within)
    peak = found["kept"] + max(found[name] for name in ("passes", "backward", "step"))
    assert peak == pytest.approx(expected.peak, rel=within)
    counted = collectives(engine, way, training, interval=1)
    for kind, size in counted.items():
        own = 24 * 1000 if kind == "all-reduce" else 0  # scores of the units
        assert found["sent"][kind] == pytest.approx(size, rel=within, abs=own)


@pytest.mark.parametrize("run", FIGURES)
@pytest.mark.parametrize("way", WAYS)
def test_formulas_say_what_was_measured(run: str, way: str) -> None:
    agrees(FIGURES[run][way], run.split()[0], way, within=0.12)


def test_more_processes_leave_whole_weights_and_gradients_of_the_risk_pass() -> None:
    """By hand, for 1,000 weights in 10 blocks on 100 processes."""
    training = Training(1000.0, 900.0, 10, 100, bucket=10.0)
    assert memory("fsdp2", "second order", training).peak == 120 + 40 + 1000  # backward
    assert memory("fsdp2", "first order, sampled", training).peak == 120 + 2000 + 1000
    assert memory("zero2", "plain", training).peak == 2000 + 120 + 200
    assert memory("zero2", "ensemble, paired", training).peak == 2000 + 120 + 1800 + 500
    assert sent("zero2", "plain", training) == pytest.approx(0.99 * (2 * 2000 + 2000))
    assert sent("fsdp2", "plain", training) == pytest.approx(0.99 * (4000 + 4000))
    assert sent("fsdp2", "first order, sampled", training) == pytest.approx(0.99 * (8000 + 3800 / 8))


def test_the_page_shows_the_plan_and_the_figures() -> None:
    page = (ROOT / "docs" / "large_models.md").read_text(encoding="utf-8")
    for lines in (plan(), check({run: ways for run, ways in FIGURES.items() if "100 million" in run})):
        for line in lines:
            assert line in page


def test_a_tiny_model_is_measured(tmp_path: Path) -> None:
    """Weights and momenta in float32; a small pass lets go of each gradient, a paired one holds those of the units."""
    ways = ["plain", "first order, sampled", "ensemble, paired"]
    scale.main([*TINY, "--ways", *ways, "--output", str(tmp_path / "figures.json")])
    found = json.loads((tmp_path / "figures.json").read_text())
    plain, sampled = found[ways[0]], found[ways[1]]
    assert plain["kept"] == pytest.approx(12 * plain["weights"], rel=0.1)
    assert plain["sent"] == {} and plain["mask"] == 1
    more = {way: found[way]["passes"] - plain["passes"] for way in ways[1:]}
    assert more[ways[1]] < 2 * sampled["unit_weights"] < 4 * sampled["unit_weights"] < more[ways[2]]
    assert 0 < found[ways[2]]["mask"] < 1
    again = scale.measure(ways[1], "plain", False, (64, 2, 64), 4, 2)
    assert again.passes == sampled["passes"]  # to the byte


def test_adapters_are_measured_too() -> None:
    found = scale.measure("first order, sampled", "plain", True, (64, 2, 64), 4, 2)
    assert found.unit_weights < 0.2 * found.weights and found.passes < 2.5 * found.weights


@pytest.mark.distributed
def test_two_processes_under_fsdp2_hold_and_send_what_the_formulas_say(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "-m"]
    sizes = ["--width", "256", "--layers", "8", "--vocabulary", "100", "--length", "2"]
    ways = ["plain", "first order, sampled", "first order, paired"]
    options = ["--engine", "fsdp2", *sizes, "--output", str(tmp_path / "figures.json"), "--ways", *ways]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "examples.benchmark.scale", *options], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for way, found in json.loads((tmp_path / "figures.json").read_text()).items():
        agrees(found, "fsdp2", way, within=0.12)


def test_every_way_of_the_plan_is_measured() -> None:
    assert list(scale.WAYS) == list(WAYS) and set(ENGINES) < set(scale.ENGINES)
