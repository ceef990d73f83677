"""examples.benchmark.cost as a user runs it, and what its figures are made of."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("datasets")
from transformers import AutoModelForSequenceClassification

from examples.benchmark import cost, ways
from examples.benchmark.agreement import ONE_SIDED, PUBLISHED, Agreement, Setting, agreement_along, point_steps
from examples.benchmark.timing import WARM_UP, relative_cost, time_in_turn
from rose_peft.robustness import load_result
from rose_peft.robustness.results import find
from rose_peft.selector import find_selector


def test_every_round_takes_one_step_of_each_way_and_the_first_rounds_do_not_count() -> None:
    taken: list[str] = []
    steps = {name: (lambda name=name: taken.append(name)) for name in ("a", "b")}
    seconds = time_in_turn(steps, 3, lambda: taken.append("new batch"))
    assert taken == ["new batch", "a", "b"] * (WARM_UP + 3)
    assert [len(times) for times in seconds.values()] == [3, 3]


def test_cost_is_a_ratio_of_means_that_sees_the_steps_with_a_risk_pass() -> None:
    dear = [2.0, 1.0, 1.0, 1.0] * 4
    found = relative_cost(dear, [1.0] * 16)
    assert found.value == 1.25 and found.n == 16  # a median would say 1
    assert (found.low, found.high) == (1.25, 1.25)  # each cycle costs the same
    uneven = relative_cost([2.0, 1.0, 1.0, 1.0] * 2 + [1.0] * 8, [1.0] * 16)
    assert uneven.value == 1.125 and uneven.low < 1.125 < uneven.high
    assert relative_cost([3.0, 1.0], [1.0, 1.0]) == type(found)(2.0, 2)  # too short for an interval


def test_points_lie_one_in_each_part_of_the_training_and_at_every_phase_of_an_interval() -> None:
    steps = point_steps(240, 20)
    assert [step // 12 for step in steps] == list(range(20))
    assert {step % 4 for step in steps} == {0, 1, 2, 3}


def test_ways_differ_in_what_steers_them(inputs: dict[str, str]) -> None:
    for way in ways.WAYS:
        selector = find_selector(ways.build(way, inputs["model"]))
        assert (selector is None) == (way in (ways.PLAIN, "LoRA"))
        if selector is not None:
            assert ("sampled" in way or way == "second order") == (
                selector.config.risk_pass == "sampled" or not selector.config.needs_risk_pass
            )
            assert selector.config.skip_frozen_gradients == ("skipped" in way)


def test_times_memory_table_and_rows_in_one_command(
    inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Ids of the tiny vocabulary; two ways, one process each for their memory.
    monkeypatch.setattr(ways, "random_batch", lambda *shape: _ids(*shape))
    monkeypatch.setattr(cost, "random_batch", lambda *shape: _ids(*shape))
    monkeypatch.setattr(cost, "peak_memory", lambda way, *rest: {"plain": 2**20, "ensemble, sampled": 2**21}[way])
    line = ["--model_name_or_path", inputs["model"], "--rounds", "16", "--batch_size", "8", "--max_length", "8"]
    line += ["--ways", "plain", "ensemble, sampled", "--output_dir", str(tmp_path)]
    assert cost.main(line) == 0
    result = load_result(tmp_path / "cost.result.json")
    assert find(result.rows, "relative_time", "plain").value == 1
    measured = find(result.rows, "relative_time", "ensemble, sampled")
    assert measured.n == 16 and measured.low < measured.value < measured.high
    assert find(result.rows, "peak_memory", "ensemble, sampled").value == 2
    assert result.config["batch_size"] == 8 and not any("/" in str(value) for value in result.config.values())
    table = (tmp_path / "cost.md").read_text()
    assert table in capsys.readouterr().out and "| ensemble, sampled |" in table and "| 2 | 2.00 |" in table
    assert not (tmp_path / "agreement.png").exists()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads /proc of Linux")
def test_memory_is_that_of_a_process_that_only_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    ballast = bytearray(2**28)  # of this process, which must not count
    ballast[::4096] = b"x" * len(ballast[::4096])
    grown = []
    for size in (2**20, 2**24):
        monkeypatch.setattr(ways, "stepper", lambda *rest, size=size: lambda: torch.ones(size).sum())
        monkeypatch.setattr(ways, "random_batch", lambda *rest: {})
        grown.append(ways._train_and_look("plain", "", "cpu", 1, 1, 1))
    assert grown[1] > grown[0] + 2**25  # 64 MB of ones
    assert grown[0] < 2**27


def test_agreement_in_one_command_from_data_to_picture(inputs: dict[str, str], tmp_path: Path) -> None:
    line = ["--model_name_or_path", inputs["model"], "--task", "sst2", "--data_dir", inputs["data"]]
    line += ["--rounds", "0", "--memory", "false", "--batch_size", "8", "--train_steps", "12", "--points", "3"]
    line += ["--draws", "3", "--output_dir", str(tmp_path)]
    assert cost.main(line) == 0
    rows = load_result(tmp_path / "cost.result.json").rows
    for upper in cost.UPPERS:
        for name in (PUBLISHED, ONE_SIDED, *map(str, cost.SETTINGS)):
            share = find(rows, "mask_agreement", name, upper)
            assert share is not None and share.n == 3 and 0.5 <= share.value <= 1
    # Twice the interval is half the extra time.
    every_4, every_8 = (find(rows, "relative_time", str(Setting(k, 0.25, 0.8))).value for k in (4, 8))
    assert every_4 - 1 == pytest.approx(2 * (every_8 - 1)) and every_8 > 1
    assert (tmp_path / "agreement.png").read_bytes().startswith(b"\x89PNG")
    table = (tmp_path / "cost.md").read_text()
    # Head and rule; published, one-sided, published beside the others, and the settings.
    assert table.count("\n") == 2 + 3 + len(cost.SETTINGS)


def _model(path: str) -> torch.nn.Module:
    return AutoModelForSequenceClassification.from_pretrained(path, num_labels=2)


def _ids(rows: int, length: int, device: str = "cpu", seed: int | None = None) -> dict[str, torch.Tensor]:
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 40, (rows, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 2}


def test_more_draws_agree_better_and_the_training_is_steered(inputs: dict[str, str]) -> None:
    torch.manual_seed(0)
    model = _model(inputs["model"])
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    batches = [_ids(8, 8, seed=seed) for seed in range(8)]
    numbers = iter(range(100, 1000))
    points: list[int] = []
    found = agreement_along(
        model,
        batches,
        lambda: _ids(8, 8, seed=next(numbers)),
        steps=8,
        points=4,
        draws=6,
        learning_rate=1e-3,
        after_point=lambda seen: points.append(len(seen.shares[PUBLISHED, 0.7])),
    )
    assert points == [1, 2, 3, 4]
    assert next(numbers) == 100 + 4 * 6  # a fresh batch for each draw
    assert len(found.step_seconds) == 8
    # Every fourth step has a pass of a quarter of the rows, and a point has one at any step.
    assert len(found.pass_seconds[0.25]) >= 4 and len(found.pass_seconds[0.125]) == 2
    # The published step costs its risk pass, and the user's backward pass through one more graph.
    assert len(found.pass_seconds[2]) == 4
    assert any(not torch.equal(before[name], param) for name, param in model.named_parameters())


def test_extra_time_of_a_pass_is_shared_by_the_steps_of_its_interval() -> None:
    found = Agreement(step_seconds=[1.0, 3.0])
    found.pass_seconds[0.25] = [1.0]
    assert math.isclose(found.cost(4, 0.25), 1.125)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--draws", "1"], "draws=1 must be at least 2"),
        (["--points", "300"], "points=300 must be at most train_steps=240"),
        (["--ways", "ensemble, sampled"], "with plain among them"),
        (["--ways", "plain", "fast"], "must be of plain; "),
        (["--rounds", "0", "--memory", "false"], "leaves nothing to measure"),
        (["--batch_size", "0"], "batch_size=0 must be at least 1"),
    ],
)
def test_what_cannot_be_measured_is_refused_on_one_line(
    line: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cost.main(line) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
