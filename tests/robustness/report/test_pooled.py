"""The pooled figure of robustness, on made-up numbers whose answer is known."""

from __future__ import annotations

from pathlib import Path

import pandas
import pytest

from rose_peft.robustness.estimate import Estimate, bootstrap_mean, paired_difference
from rose_peft.robustness.report import write_report
from rose_peft.robustness.report.frame import Run, gather
from rose_peft.robustness.report.pooled import pooled_robustness
from rose_peft.robustness.results import Result, Row

Values = dict[str, list[float | None]]  # robust set -> accuracy by seed


def results(method: str, sets: Values, task: str = "sst2") -> list[Result]:
    seeds = range(max(map(len, sets.values())))
    return [
        Result(
            method,
            task,
            seed,
            [Row("robust_accuracy", Estimate(values[seed], 100), name) for name, values in sets.items()],
        )
        for seed in seeds
    ]


def pool(*groups: list[Result], methods: tuple[str, ...] = ("plain", "rose")) -> tuple[pandas.DataFrame, list[str]]:
    runs = [Run(Path("x"), result) for group in groups for result in group]
    return pooled_robustness(gather(runs, []), methods, "plain")


# Both sets vary by a standard deviation within methods that is easy to name: 0.01 and 0.1.
PLAIN: Values = {"narrow": [0.50, 0.51, 0.49], "wide": [0.50, 0.40, 0.60]}
ROSE: Values = {"narrow": [0.52, 0.54, 0.53], "wide": [0.40, 0.50, 0.60]}


def test_every_set_counts_the_same_in_units_of_its_own_spread() -> None:
    table, left_out = pool(results("plain", PLAIN), results("rose", ROSE))
    gains = [(2 - 1) / 2, (3 + 1) / 2, (4 + 0) / 2]  # narrow and wide, in standard deviations, by seed
    (row,) = table.to_dict("records")
    expected, other = paired_difference(gains, [0, 0, 0]), bootstrap_mean(gains)
    assert left_out == [] and row["method"] == "rose" and row["n"] == 3 and row["sets"] == 2
    assert [row[name] for name in ("value", "low", "high")] == pytest.approx([1.5, expected.low, expected.high])
    assert [row["bootstrap_low"], row["bootstrap_high"]] == pytest.approx([other.low, other.high])


def test_a_gain_does_not_change_its_own_unit() -> None:
    lifted: Values = {name: [float(value or 0) + 0.2 for value in values] for name, values in ROSE.items()}
    small, large = (pool(results("plain", PLAIN), results("rose", one))[0] for one in (ROSE, lifted))
    assert (large["value"] - small["value"]).tolist() == pytest.approx([(0.2 / 0.01 + 0.2 / 0.1) / 2])


def test_tasks_and_sets_of_one_name_are_different_sets() -> None:
    table, _ = pool(
        *(
            results(name, values, task)
            for task in ("sst2", "rte")
            for name, values in (("plain", PLAIN), ("rose", ROSE))
        )
    )
    assert table["sets"].tolist() == [4] and table["value"].tolist() == pytest.approx([1.5]) and table["n"][0] == 3


def test_a_seed_that_lacks_a_set_is_left_out_whole() -> None:
    holed: Values = {**ROSE, "wide": [0.40, None, 0.60]}
    table, _ = pool(results("plain", PLAIN), results("rose", holed))
    assert table["n"].tolist() == [2] and table["sets"].tolist() == [2]


def test_clean_accuracy_and_flips_are_no_test_sets() -> None:
    groups = results("plain", PLAIN), results("rose", ROSE)
    before = pool(*groups)[0]
    for number, one in enumerate(groups[0] + groups[1]):
        one.rows += [
            Row("clean_accuracy", Estimate(number / 10)),
            Row("flipped_share", Estimate(number / 10), "typos"),
        ]
    assert pool(*groups)[0].equals(before)


def test_what_does_not_vary_has_no_unit_and_is_named() -> None:
    flat: Values = {"flat": [0.5, 0.5, 0.5]}
    table, left_out = pool(results("plain", {**PLAIN, **flat}), results("rose", {**ROSE, "flat": [0.6, 0.6, 0.6]}))
    assert table["value"].tolist() == pytest.approx([1.5]) and table["sets"].tolist() == [2]
    assert left_out == ["sst2 flat accuracy"]


@pytest.mark.parametrize(("seeds", "known"), [((1, 1), False), ((2, 1), False), ((2, 2), False), ((3, 2), True)])
def test_a_spread_of_few_seeds_is_no_unit(seeds: tuple[int, int], known: bool) -> None:
    plain, rose = (
        results(name, {"x": [0.5, 0.51, 0.49][:n]}) for name, n in zip(("plain", "rose"), seeds, strict=True)
    )
    assert pool(plain, rose)[0].empty is not known


def test_the_report_says_it_once_for_all_tasks(tmp_path: Path) -> None:
    for task in ("sst2", "rte"):
        for method, values in (("plain", PLAIN), ("rose", ROSE)):
            for one in results(method, values, task):
                one.save(tmp_path / task / method / f"seed{one.seed}.result.json")
    report = write_report([tmp_path], tmp_path / "report")
    lines = report.page.read_text().splitlines()
    assert lines.count("## All test sets together") == 1
    (row,) = (line for line in lines if line.startswith("| rose | all | +1.50 |"))
    assert row.endswith("| 3 | 4 |")
    table = pandas.read_csv(tmp_path / "report" / "differences.csv").query("measure == 'pooled_robustness'")
    assert table["task"].tolist() == ["all", "rte", "sst2"] and table["value"].tolist() == pytest.approx([1.5] * 3)


def test_a_task_with_fewer_seeds_takes_none_from_another(tmp_path: Path) -> None:
    for task, seeds in (("sst2", 3), ("rte", 2)):
        for method, values in (("plain", PLAIN), ("other", PLAIN), ("rose", ROSE)):
            for one in results(method, {name: each[:seeds] for name, each in values.items()}, task):
                one.save(tmp_path / task / method / f"seed{one.seed}.result.json")
    report = write_report([tmp_path], tmp_path / "report", order=["plain", "rose", "other"])
    rows = [line for line in report.page.read_text().splitlines() if line.startswith(("| rose | ", "| other | "))]
    found = [tuple(line.split(" | ")[i].strip(" |") for i in (0, 1, -2, -1)) for line in rows if " to " in line][:6]
    assert found == [
        (method, task, seeds, sets)
        for method in ("rose", "other")
        for task, seeds, sets in (("all", "2", "4"), ("rte", "2", "2"), ("sst2", "3", "2"))
    ]


def test_one_task_alone_is_said_once(tmp_path: Path) -> None:
    for method, values in (("plain", PLAIN), ("rose", ROSE)):
        for one in results(method, values):
            one.save(tmp_path / method / f"seed{one.seed}.result.json")
    text = write_report([tmp_path], tmp_path / "report").page.read_text()
    assert text.count("| rose | all | +1.50 |") == 1 and "| rose | sst2 |" not in text
