"""examples.benchmark.cost as a user runs it, and what its figures are made of."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("datasets")
from transformers import AutoModelForSequenceClassification

from examples.benchmark import cost, ways
from examples.benchmark.agreement import ONE_SIDED, PUBLISHED, Agreement, Setting, agreement_along, point_steps
from examples.benchmark.timing import WARM_UP, relative_cost, time_in_turn
from examples.training.arguments import InputError
from rose_peft.robustness import load_result
from rose_peft.robustness.results import find
from rose_peft.selector import find_selector


def _noting(file: Path, way: str) -> Callable[[], None]:
    """Make a step that notes its way, its process and how that computes; at once, that it was made."""

    def note(what: str) -> None:
        with file.open("a") as notes:
            told = way, what, os.getpid(), torch.get_num_threads(), torch.get_float32_matmul_precision()
            notes.write(" ".join(map(str, told)) + "\n")

    note("made")
    return partial(note, "step")


def test_every_round_takes_one_step_of_each_way_in_its_process_and_the_first_rounds_do_not_count(
    tmp_path: Path,
) -> None:
    file = tmp_path / "notes"
    torch.set_float32_matmul_precision("medium")
    try:
        seconds = time_in_turn({way: partial(_noting, file, way) for way in ("a", "b")}, 3)
    finally:
        torch.set_float32_matmul_precision("highest")
    notes = [line.split() for line in file.read_text().splitlines()]
    assert [note[:2] for note in notes[:2]] == [["a", "made"], ["b", "made"]]
    assert [note[:2] for note in notes[2:]] == [["a", "step"], ["b", "step"]] * (WARM_UP + 3)
    assert len({note[2] for note in notes} | {str(os.getpid())}) == 3  # one for each, and this one takes no step
    assert {tuple(note[3:]) for note in notes} == {(str(torch.get_num_threads()), "medium")}
    assert [len(times) for times in seconds.values()] == [3, 3]


def _failing() -> Callable[[], None]:
    raise InputError("no such encoder")


def test_a_way_that_cannot_be_made_says_why() -> None:
    with pytest.raises(InputError, match="no such encoder"):
        time_in_turn({"a": _failing}, 2)


def test_all_ways_get_the_same_batches_inside_the_vocabulary(inputs: dict[str, str]) -> None:
    seen = defaultdict(list)
    for way in ("plain", "ensemble, sampled"):
        step = ways.stepper(way, inputs["model"], "cpu", 4, 8, seed=3, fused=way == "plain")
        with torch.nn.modules.module.register_module_forward_pre_hook(
            lambda module, args: seen[way].append(args[0]) if isinstance(module, torch.nn.Embedding) else None  # noqa: B023
        ):
            for _ in range(2):
                step()
    ids = [[part for part in seen[way] if part.shape == (4, 8)] for way in seen]
    first, second = ids[0][0], next(part for part in ids[0] if not torch.equal(part, ids[0][0]))
    assert any(torch.equal(first, part) for part in ids[1]) and any(torch.equal(second, part) for part in ids[1])


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
        monkeypatch.setattr(ways, "stepper", lambda *rest, size=size, **more: lambda: torch.ones(size).sum())
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
