"""The demo: what it runs, that its table is right, and that its words follow from its numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rose_peft.robustness import Estimate, Result, Row, load_result

pytest.importorskip("datasets")
from examples import train
from examples.training import demo


def result(method: str, seed: int, *values: float) -> Result:
    """A result with one value for each line of the table, in its order."""
    rows = [
        Row(line.row[0], Estimate(value, 100), line.row[1], line.row[2])
        for line, value in zip(demo.LINES, values, strict=True)
    ]
    return Result(method, "demo", seed, rows)


def runs(rose: tuple[float, ...], clean: float = 0.99) -> dict[str, list[Result]]:
    """Three seeds of both methods; ROSE differs by the given amounts on each line, and a little from seed to seed."""
    found: dict[str, list[Result]] = {"plain": [], "ROSE": []}
    for seed in range(3):
        wobble = seed / 1000
        plain = (clean, 0.80, 0.10, 0.05, 0.9)
        found["plain"].append(result("plain", seed, *plain))
        found["ROSE"].append(result("ROSE", seed, *(p + d + wobble for p, d in zip(plain, rose, strict=True))))
    return found


SECONDS = {"plain": [0.10, 0.20, 0.10], "ROSE": [0.11, 0.22, 0.30]}


def conclusion(*arguments: Any, **named: Any) -> str:
    return " ".join(demo._conclusion(runs(*arguments, **named), SECONDS))


def test_fewer_flips_are_better_and_what_is_unsure_is_called_so() -> None:
    said = conclusion((0, 0.10, -0.05, -0.001, 0.5))
    assert "better than plain: robust: misspelt, unseen words, predictions flipped by dropout;" in said
    assert "no sure difference: predictions flipped by typos." in said
    assert "worse than plain: robust" in conclusion((0, -0.10, 0, 0, 0)) and "turned" not in said
    assert "1.10 times as long" in said  # the median ratio of runs that came one after the other


def test_a_method_that_has_not_learnt_is_no_more_robust() -> None:
    said = conclusion((0, 0.10, -0.05, -0.05, 0), clean=0.90)
    assert "plain and ROSE did not learn the task" in said and "better" not in said


def test_the_table_has_means_spreads_and_paired_intervals() -> None:
    lines = demo._table(runs((0, 0.10, 0, 0, 0)), SECONDS)
    robust = next(line for line in lines if line.startswith("robust"))
    # 0.10, 0.101 and 0.102 more: their mean, and 4.303 standard errors around it.
    assert "+10.1  +9.9 to +10.3" in robust and "80.0 ± 0.0" in robust and "90.1 ± 0.1" in robust
    assert "x 1.10" in lines[-1]


def test_three_seeds_of_both_methods_in_one_table(
    inputs: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["--model_name_or_path", inputs["model"], "--output_dir", str(tmp_path), "--max_train_samples", "32"]
    assert train.main([*line, "--epochs", "2", "--risk_pass", "paired"]) == 0
    table = capsys.readouterr().out
    for each in demo.LINES:
        assert table.count(each.title) == 1
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    for seed in range(3):
        plain, rose = (tmp_path / method / f"seed{seed}" for method in ("plain", "ROSE"))
        assert load_result(rose / "demo.result.json").get("flipped_share", "dropout").n == 240
        made = [json.loads((folder / "results.json").read_text()) for folder in (plain, rose)]
        assert [one["config"]["learning_rate"] for one in made] == [demo.SETTINGS["learning_rate"]] * 2
        assert made[1]["config"]["risk_pass"] == "paired" and made[1]["config"]["epochs"] == 2
        assert [one["method"] for one in made] == ["none", "ensemble"] and made[0]["seed"] == seed
