"""Result files and the report: what is written is read back, what cannot be read is named, and numbers are right."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas
import pytest

from rose_peft.robustness.errors import ResultFileError
from rose_peft.robustness.estimate import Estimate, bootstrap_paired_difference, paired_difference, share
from rose_peft.robustness.plotting import style_of, styles_of
from rose_peft.robustness.report import find_results, write_report
from rose_peft.robustness.report.frame import Run, gather
from rose_peft.robustness.report.page import _methods
from rose_peft.robustness.report.pictures import noise, scatter
from rose_peft.robustness.report.tables import differences
from rose_peft.robustness.results import SCHEMA_VERSION, Result, Row, load_result
from tests.helpers.victims import REPOSITORY


def result(method: str = "plain", seed: int = 0, task: str = "sst2", clean: float = 0.9, **values: float) -> Result:
    """A result with a clean accuracy and further measures by name; `adv` is the accuracy on AdvGLUE."""
    rows = [Row("clean_accuracy", Estimate(clean, 100, 0.8, 0.95))]
    if "adv" in values:
        rows.append(Row("robust_accuracy", Estimate(values.pop("adv"), 50), "AdvGLUE"))
    rows += [Row(name, Estimate(value, 50)) for name, value in values.items()]
    return Result(method, task, seed, rows, config={"lr": 2e-5})


def frame_of(results: list[Result]) -> Any:
    return gather([Run(Path(f"{number}.result.json"), one) for number, one in enumerate(results)], [])


def test_results_come_back_as_they_were(tmp_path: Path) -> None:
    saved = result(adv=0.4)
    saved.rows += [Row("noise_accuracy", share([]), "typos", 0.1)]
    saved.save(tmp_path / "a" / "r.result.json")
    assert load_result(tmp_path / "a" / "r.result.json") == saved
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["r.result.json"]
    entry = json.loads((tmp_path / "a" / "r.result.json").read_text())["rows"][-1]
    assert entry == {
        "measure": "noise_accuracy", "part": "typos", "rate": 0.1, "value": None, "n": 0, "low": None, "high": None
    }  # fmt: skip
    assert saved.get("robust_accuracy", "AdvGLUE").value == 0.4 and saved.get("robust_accuracy") is None


def test_a_result_that_the_report_would_not_find_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ResultFileError, match=r"must end in \.result\.json"):
        result().save(tmp_path / "r.json")
    with pytest.raises(ResultFileError, match="measure='speed' is unknown"):
        Row("speed", Estimate(1.0))


def test_numbers_json_cannot_hold_become_undefined(tmp_path: Path) -> None:
    diverged = result()
    diverged.rows = [Row("loss", Estimate(float("nan"), 3, float("-inf"), float("inf")))]
    diverged.save(tmp_path / "r.result.json")
    assert load_result(tmp_path / "r.result.json").get("loss") == Estimate(None, 3)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    result().save(tmp_path / "r.result.json")
    broken = result(clean=0.1)
    broken.config["unwritable"] = object()
    with pytest.raises(TypeError):
        broken.save(tmp_path / "r.result.json")
    assert load_result(tmp_path / "r.result.json") == result()
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResultFileError, match=r"cannot be written \(.*\); choose another folder"):
        result().save(tmp_path / "file" / "r.result.json")


def test_every_truncation_is_one_clear_line(tmp_path: Path) -> None:
    result().save(tmp_path / "r.result.json")
    whole = (tmp_path / "r.result.json").read_bytes()
    for length in range(0, len(whole) - 2, 7):
        (tmp_path / "cut.json").write_bytes(whole[:length])
        with pytest.raises(ResultFileError, match=r"cut\.json: is truncated or no result file") as caught:
            load_result(tmp_path / "cut.json")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"schema_version": SCHEMA_VERSION + 1}, "this version of the kit reads"),
        ({"schema_version": None}, "schema_version=None"),
        ([1, 2], "is truncated or no result file"),
        ({"model_type": "bert"}, "is truncated or no result file"),
        ({"schema_version": SCHEMA_VERSION, "rows": [{"measure": "loss"}]}, "is truncated or no result file"),
    ],
)
def test_foreign_files_are_named(tmp_path: Path, content: Any, message: str) -> None:
    (tmp_path / "r.result.json").write_text(json.dumps(content))
    with pytest.raises(ResultFileError, match=message) as caught:
        load_result(tmp_path / "r.result.json")
    assert "\n" not in str(caught.value)


PLAIN = [0.30, 0.34, 0.29, 0.33, 0.35]
ROSE = [0.36, 0.37, 0.34, 0.41, 0.38]


def save_runs(folder: Path) -> list[Result]:
    runs = []
    for seed, (plain, rose) in enumerate(zip(PLAIN, ROSE, strict=True)):
        for method, robust in (("rose", rose), ("plain", plain)):
            one = result(method, seed, adv=robust, clean=0.9 - 0.01 * (method == "rose"))
            one.save(folder / f"{method}-{seed}.result.json")
            rows = [Row("noise_accuracy", Estimate(robust + 0.4 - rate, 50), "typos", rate) for rate in (0.1, 0.3)]
            dataclasses.replace(one, rows=rows).save(folder / f"{method}-{seed}-noise.result.json")
            runs.append(one)
    return runs


def test_the_page_has_the_right_numbers(tmp_path: Path) -> None:
    runs = save_runs(tmp_path / "runs")
    report = write_report([tmp_path / "runs"], tmp_path / "out", as_html=True)
    assert report.problems == []
    assert report.runs == 10
    lines = report.page.read_text().splitlines()
    average, spread = 100 * statistics.fmean(PLAIN), 100 * statistics.stdev(PLAIN)
    found = paired_difference(ROSE, PLAIN)
    value, low, high = 100 * found.value, 100 * found.low, 100 * found.high
    start = lines.index("| method | clean accuracy (%) | AdvGLUE accuracy (%) | noise mean accuracy (%) |")
    noise_mean = f"{average + 20:.1f} ± {spread:.1f}"
    assert lines[start + 2] == f"| plain (5 seeds) | 90.0 ± 0.0 | {average:.1f} ± {spread:.1f} | {noise_mean} |"
    assert lines[start + 3].startswith("| rose (5 seeds) | 89.0 ± 0.0 |")
    start = lines.index(
        "| method | clean accuracy (points) | AdvGLUE accuracy (points) | noise mean accuracy (points) |"
    )
    cell = f"**{value:+.1f} [{low:+.1f}, {high:+.1f}]** (5)"
    assert lines[start + 2] == f"| rose | **-1.0 [-1.0, -1.0]** (5) | {cell} | {cell} |"
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"<strong>{value:+.1f} [{low:+.1f}, {high:+.1f}]</strong> (5)</td>" in page
    for picture in report.pictures:
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert picture.name in report.page.read_text() and picture.name in page
    names = {"report_sst2_scatter.png", "report_sst2_noise.png"}
    assert {picture.name for picture in report.pictures} == names
    table = pandas.read_csv(tmp_path / "out" / "differences.csv").set_index("measure")
    assert table.loc["robust_accuracy", ["n", "low"]].tolist() == pytest.approx([5, found.low])
    bootstrap = bootstrap_paired_difference(ROSE, PLAIN)
    assert table.loc["robust_accuracy", "bootstrap_high"] == pytest.approx(bootstrap.high)
    assert len(runs) == 10


def test_large_figures_are_written_out(tmp_path: Path) -> None:
    result(hessian_trace=1478.6).save(tmp_path / "plain.result.json")
    result("rose", hessian_trace=1900.2).save(tmp_path / "rose.result.json")
    page = write_report([tmp_path], tmp_path / "report").page.read_text()
    assert "| 1479 |" in page and "| 1900 |" in page and "| +422 (1) |" in page
    assert page.splitlines()[2].startswith("2 runs: 2 methods, 1 task, seeds 0.")


def test_few_seeds_are_shown_but_never_emphasised(tmp_path: Path) -> None:
    for seed in range(3):
        result("plain", seed, adv=0.3).save(tmp_path / f"p{seed}.result.json")
        result("rose", seed, adv=0.4 + seed / 100).save(tmp_path / f"r{seed}.result.json")
    result("once", 0, adv=0.5).save(tmp_path / "o.result.json")
    page = write_report([tmp_path], tmp_path / "out").page.read_text()
    assert "| once | +0.0 (1) | +20.0 (1) |" in page
    assert "| rose | +0.0 [+0.0, +0.0] (3) | +11.0 [+8.5, +13.5] (3) |" in page


def test_methods_come_in_the_order_asked_for_and_details_in_a_table_of_their_own(tmp_path: Path) -> None:
    for method in ("c", "b", "a", "plain"):
        one = result(method)
        one.rows.append(Row("attack_queries", Estimate(7.0, 50), "x"))
        one.save(tmp_path / f"{method}.result.json")
    lines = write_report([tmp_path], tmp_path / "out", order=["b", "c"]).page.read_text().splitlines()
    tables = [at for at, line in enumerate(lines) if line.startswith("| method | ")]
    assert [lines[at] for at in tables[:3]] == [
        "| method | clean accuracy (%) |",
        "| method | clean accuracy (points) |",
        "| method | x queries |",
    ]
    first = [line.split()[1] for line in lines[tables[0] + 2 : tables[0] + 6]]
    assert first == ["plain", "b", "c", "a"]


def test_pairs_are_formed_by_seed_not_by_order() -> None:
    runs = [result("plain", seed, loss=1.0, worst_loss_increase=seed / 10) for seed in (0, 1, 2)]
    runs += [result("rose", seed, worst_loss_increase=seed / 10 + 0.05) for seed in (2, 0, 7)]
    found = differences(frame_of(runs), ["plain", "rose"], "plain").set_index("measure")
    assert found.loc["worst_loss_increase", ["value", "n", "low", "high"]].tolist() == pytest.approx(
        [0.05, 2, 0.05, 0.05]
    )
    assert differences(frame_of(runs), ["plain", "rose"], "absent").empty


def test_bad_files_are_listed_and_the_others_reported(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    save_runs(runs)
    (runs / "cut.result.json").write_bytes((runs / "rose-0.result.json").read_bytes()[:90])
    (runs / "empty.result.json").write_text("")
    foreign = json.loads((runs / "rose-0.result.json").read_text()) | {"schema_version": 99}
    (runs / "old.result.json").write_text(json.dumps(foreign))
    (runs / "config.json").write_text('{"model_type": "bert"}')
    report = write_report([runs, tmp_path / "absent.json"], tmp_path / "out")
    assert report.runs == 10
    named = [Path(line.partition(": ")[0]).name for line in report.problems]
    assert sorted(named) == ["absent.json", "cut.result.json", "empty.result.json", "old.result.json"]
    assert all(line in report.page.read_text() for line in report.problems)
    with pytest.raises(ResultFileError, match=r"cut\.result\.json"):
        write_report([runs / "cut.result.json"], tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5000, "{", "\0" * 301, '{"a": 1}\n{"a": 2}\n', "\udcff"])
def test_one_odd_file_does_not_stop_the_report(tmp_path: Path, text: str) -> None:
    result().save(tmp_path / "plain.result.json")
    (tmp_path / "odd.result.json").write_bytes(text.encode(errors="surrogateescape"))
    report = write_report([tmp_path], tmp_path / "out")
    assert "| plain (1 seed) |" in report.page.read_text()
    assert [Path(line.partition(": ")[0]).name for line in report.problems] == ["odd.result.json"]
    assert "\n" not in report.problems[0]


def test_links_and_folders_do_not_stop_the_report(tmp_path: Path) -> None:
    result().save(tmp_path / "plain.result.json")
    (tmp_path / "dangling.result.json").symlink_to("gone")
    (tmp_path / "loop.result.json").symlink_to("loop.result.json")
    (tmp_path / "folder.result.json").mkdir()
    report = write_report([tmp_path], tmp_path / "out")
    named = sorted(Path(line.partition(": ")[0]).name for line in report.problems)
    assert named == ["dangling.result.json", "folder.result.json", "loop.result.json"]


def test_names_that_are_no_text_do_not_stop_the_report(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    one = result()
    one.images = {"Masks": "masks.png"}
    one.save(folder / "plain.result.json")
    (folder / "masks.png").write_bytes(b"\x89PNG picture")
    (folder / "cut.result.json").write_text("{")
    page = write_report([folder], tmp_path, as_html=True).page.read_text()
    assert "caf%E9/masks.png" in page and "caf\\udce9/cut.result.json: is truncated" in page


def test_names_are_no_formulas_and_no_markup(tmp_path: Path) -> None:
    one = result("$\\foo$ <b>|", task="$\\bar$", adv=0.4)
    one.rows.append(Row("noise_accuracy", Estimate(0.5, 50), "typos", 0.1))
    one.save(tmp_path / "r.result.json")
    assert len(write_report([tmp_path], tmp_path, as_html=True).pictures) == 2
    assert "<b>" not in (tmp_path / "report.html").read_text()


def test_only_files_of_the_ending_are_taken_from_folders(tmp_path: Path) -> None:
    result().save(tmp_path / "deep" / "plain.result.json")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "results.json").write_text('{"schema_version": 1, "best": {}}')
    assert find_results([tmp_path]) == [tmp_path / "deep" / "plain.result.json"]


def test_conflicts_and_a_missing_baseline_are_said(tmp_path: Path) -> None:
    result("rose", 0, adv=0.4).save(tmp_path / "a.result.json")
    result("rose", 0, adv=0.5).save(tmp_path / "b.result.json")
    report = write_report([tmp_path], tmp_path / "out")
    assert any("AdvGLUE accuracy of rose, sst2, seed 0 is 0.5 here and 0.4" in line for line in report.problems)
    assert any("baseline='plain': no result is of this method" in line for line in report.problems)


def test_clean_accuracies_of_one_run_that_differ_are_said_but_those_of_samples_need_not_agree(tmp_path: Path) -> None:
    for name, value, n in (("a", 0.9, 100), ("b", 0.7, 100), ("sample", 0.5, 10)):
        one = Result("rose", "sst2", 0, [Row("clean_accuracy", Estimate(value, n))])
        one.save(tmp_path / f"{name}.result.json")
    problems = write_report([tmp_path], tmp_path / "out").problems
    told = [line for line in problems if "clean accuracy of rose, sst2, seed 0 is 0.7 here and 0.9" in line]
    assert len(told) == 1 and not any("is 0.5 here" in line for line in problems)


Noise = dict[tuple[str, float], float]


def save_noise(folder: Path, method: str, seed: int, noise: Noise) -> None:
    one = result(method, seed)
    one.rows = [Row("noise_accuracy", Estimate(value, 872), kind, rate) for (kind, rate), value in noise.items()]
    one.save(folder / f"{method}-{seed}.result.json")


def noise_means(report: Any) -> dict[tuple[str, int], float]:
    rows = report.rows[report.rows["measure"] == "noise_mean_accuracy"]
    return {(row.method, row.seed): row.value for row in rows.itertuples()}


def test_the_mean_over_noise_is_over_what_all_runs_have(tmp_path: Path) -> None:
    wide: Noise = {("typos", 0.1): 0.8, ("typos", 0.3): 0.6, ("casing", 0.1): 0.9}
    save_noise(tmp_path, "plain", 0, wide)
    save_noise(tmp_path, "rose", 0, wide)
    result("clean only").save(tmp_path / "clean.result.json")
    same = write_report([tmp_path], tmp_path / "out")
    assert same.problems == []
    assert noise_means(same) == pytest.approx({("plain", 0): 2.3 / 3, ("rose", 0): 2.3 / 3})
    save_noise(tmp_path, "rose", 1, {("typos", 0.3): 0.5, ("casing", 0.1): 0.7, ("typos", 0.05): 0.1})
    mixed = write_report([tmp_path], tmp_path / "out")
    assert noise_means(mixed) == pytest.approx({("plain", 0): 0.75, ("rose", 0): 0.75, ("rose", 1): 0.6})
    (line,) = mixed.problems
    assert "over the noise that all runs have (typos at 0.3, casing at 0.1)" in line
    assert "it leaves out typos at 0.1, typos at 0.05" in line
    assert "| rose (2 seeds) | - | 67.5 ± 10.6 |" in mixed.page.read_text()
    save_noise(tmp_path, "rose", 2, {("swaps", 0.1): 0.5})
    none = write_report([tmp_path], tmp_path / "out")
    assert "sst2: noise mean accuracy is undefined, as no noise is common to all runs" in none.problems[0]
    assert noise_means(none) == {}


def test_noise_in_several_files_has_one_mean(tmp_path: Path) -> None:
    save_noise(tmp_path / "one", "plain", 0, {("typos", 0.1): 0.8})
    save_noise(tmp_path / "two", "plain", 0, {("typos", 0.3): 0.6, ("casing", 0.1): 0.4})
    report = write_report([tmp_path], tmp_path / "out")
    assert report.problems == []
    assert noise_means(report) == {("plain", 0): pytest.approx(0.6)}


def save_attack(folder: Path, method: str, seed: int, n: int, budget: int | None, errors: int = 0) -> None:
    one = result(method, seed)
    one.rows += [
        Row("attack_clean_accuracy", Estimate(0.9, n), "pwws"),
        Row("accuracy_under_attack", Estimate(0.1, n - errors), "pwws"),
        Row("attack_success_rate", Estimate(0.9, n - 10 - seed), "pwws"),
        Row("attack_queries", Estimate(120.0, n - 10 - seed), "pwws"),
        Row("attack_errors", Estimate(errors), "pwws"),
    ]
    one.config = {"query_budget": budget} if method == "plain" else {"evaluation": {"query_budget": budget}}
    one.save(folder / f"{method}-{seed}.result.json")


def test_figures_over_other_data_are_named(tmp_path: Path) -> None:
    for seed in range(2):
        save_attack(tmp_path, "plain", seed, 200, None)
    save_attack(tmp_path, "rose", 0, 200, None)
    assert write_report([tmp_path], tmp_path / "out").problems == []
    save_attack(tmp_path, "rose", 1, 20, 500)
    small = result("rose", 2, adv=0.3)
    small.rows[0] = Row("clean_accuracy", Estimate(0.9, 64))
    small.save(tmp_path / "small.result.json")
    assert write_report([tmp_path], tmp_path / "out").problems == [
        "sst2: clean accuracy cannot be compared: it is over n=64 for rose (seed 2), and 100 for the others; "
        "evaluate all on the same examples.",
        "sst2: accuracy under pwws cannot be compared: it is over n=20 for rose (seed 1), and 200 for the others; "
        "evaluate all on the same examples.",
        "sst2: attack pwws cannot be compared: it had query_budget=500 for rose (seed 1), and None for the others; "
        "attack all with the same one.",
    ]


def test_other_settings_and_seeds_are_named(tmp_path: Path) -> None:
    for method, seed, settings in (("plain", 0, {"max_length": 64}), ("rose", 0, {"evaluation": {"max_length": 384}})):
        one = result(method, seed)
        one.config = {**settings, "products": "float32"}
        one.save(tmp_path / f"{method}-{seed}.result.json")
    report = write_report([tmp_path], tmp_path / "out")
    assert report.problems == [
        "sst2: runs were not evaluated alike: with max_length=384 for rose (seed 0), and 64 for the others."
    ]
    assert "different seeds" not in report.page.read_text()
    for seed, settings in ((1, {"noise_seed": 7}), (2, {"noise_seed": 0, "dtype": "bfloat16", "data": "1"})):
        other = result("rose", seed)
        other.config = settings
        other.save(tmp_path / "out" / f"{seed}.result.json")
    # A second file about other numbers of the same run hides nothing.
    steady = result("plain", 0)
    steady.rows = [Row("flipped_share", Estimate(0.1, 100), "typos")]
    steady.config = {"max_length": 384}
    steady.save(tmp_path / "out" / "a.result.json")
    assert write_report([tmp_path / "out"], tmp_path / "page").problems[-1:] == [
        "sst2: runs were not evaluated alike: with noise_seed=0 for rose (seed 2), and 7 for the others."
    ]
    result("rose", 1).save(tmp_path / "more.result.json")
    assert "Methods have different seeds here" in write_report([tmp_path], tmp_path / "out").page.read_text()


def test_attacks_that_broke_are_named(tmp_path: Path) -> None:
    save_attack(tmp_path, "plain", 0, 200, None)
    save_attack(tmp_path, "rose", 1, 200, None, errors=3)
    report = write_report([tmp_path], tmp_path / "out")
    (line,) = report.problems  # the examples are the same, so the figures can be compared
    assert line.startswith("attack pwws of rose, sst2, seed 1 broke on 3 of 200 examples")
    assert line in report.page.read_text()


def test_sources_of_adv_glue_have_a_table(tmp_path: Path) -> None:
    for method, seed, value in (("plain", 0, 0.25), ("plain", 1, 0.35), ("rose", 0, 0.5)):
        one = result(method, seed)
        one.rows += [
            Row("source_accuracy", Estimate(value, 20, value - 0.2, value + 0.2), "textfooler"),
            Row("source_accuracy", Estimate(value + 0.1, 20), "human"),
        ]
        one.save(tmp_path / f"{method}-{seed}.result.json")
    lines = write_report([tmp_path], tmp_path / "out").page.read_text().splitlines()
    start = lines.index("AdvGLUE accuracy (%) by the attack behind the examples:")
    assert lines[start + 2 : start + 6] == [
        "| method | human | textfooler |",
        "| --- | ---: | ---: |",
        "| plain (2 seeds) | 40.0 ± 7.1 | 30.0 ± 7.1 |",
        "| rose (1 seed) | 60.0 | 50.0 [30.0, 70.0] |",
    ]


def test_one_run_shows_the_interval_within_it(tmp_path: Path) -> None:
    one = result(adv=0.3)
    one.rows[0] = Row("clean_accuracy", Estimate(0.8604, 872, 0.8351, 0.8817))
    one.rows.append(Row("hessian_trace", Estimate(926.0, 8, -12.345, 1900.0)))
    one.save(tmp_path / "plain.result.json")
    cost = Row("step_time", Estimate(1.02, 12, 0.9, 1.1), "plain")
    dataclasses.replace(one, rows=[cost], seed=7).save(tmp_path / "cost.result.json")
    page = write_report([tmp_path], tmp_path / "out").page.read_text()
    assert "| plain (1 seed) | 86.0 [83.5, 88.2] | 30.0 | 926 [-12.3, 1900] |" in page
    assert "1 run: 1 method, 1 task, seeds 0." in page
    assert "| method | time of a step, x plain |\n| --- | ---: |\n| plain | 1.02 [0.9, 1.1] |" in page
    few = Row("step_time", Estimate(1.02, 12), "plain")  # too few rounds for an interval
    dataclasses.replace(one, rows=[few], seed=7).save(tmp_path / "cost.result.json")
    assert "| plain | 1.02 |" in write_report([tmp_path], tmp_path / "out").page.read_text()
    dataclasses.replace(one, seed=1).save(tmp_path / "second.result.json")
    page = write_report([tmp_path], tmp_path / "out").page.read_text()
    assert "| plain (2 seeds) | 86.0 ± 0.0 | 30.0 ± 0.0 | 926 ± 0 |" in page


@pytest.mark.filterwarnings("ignore:Glyph")  # the font has no such letters
def test_each_picture_has_a_file_of_its_own(tmp_path: Path) -> None:
    tasks = ["情感", "問答", "情感 sst2", "SST2", "sst2", "sst2-2", "my task"]
    for task in tasks:
        one = result(task=task, adv=0.3)
        one.images = {"情": "a.png", "問": "b.png"}
        one.save(tmp_path / "runs" / task / "r.result.json")
        for name in "ab":
            (tmp_path / "runs" / task / f"{name}.png").write_bytes(f"{task} {name}".encode())
    report = write_report([tmp_path / "runs"], tmp_path / "out")
    assert len(set(report.pictures)) == len(report.pictures) == 3 * len(tasks)
    page = report.page.read_text()
    for task, slug in (("sst2", "sst2"), ("sst2-2", "sst2-2"), ("my task", "my-task")):
        assert f"![Clean against robust accuracy, {task}](report_{slug}_scatter.png)" in page
    copies = {path.read_bytes().decode() for path in report.pictures if "image" in path.name}
    assert copies == {f"{task} {name}" for task in tasks for name in "ab"}


def test_pictures_of_results_are_shown(tmp_path: Path) -> None:
    one = result()
    one.images = {"Masks": "masks.png", "Gone": "gone.png"}
    one.save(tmp_path / "runs" / "r.result.json")
    (tmp_path / "runs" / "masks.png").write_bytes(b"\x89PNG picture")
    report = write_report([tmp_path / "runs"], tmp_path / "out")
    (copied,) = [path for path in report.pictures if "masks" in path.name]
    assert copied.read_bytes() == b"\x89PNG picture"
    assert f"![Masks: plain, sst2, seed 0]({copied.name})" in report.page.read_text()
    assert any("image 'gone.png' is not there" in line for line in report.problems)
    # Below the page there is no need for a copy.
    beside = write_report([tmp_path / "runs"], tmp_path)
    assert "![Masks: plain, sst2, seed 0](runs/masks.png)" in beside.page.read_text()
    assert not list(tmp_path.glob("report_image*"))


@pytest.mark.parametrize("kind", ["scatter", "noise"])
def test_legends_do_not_cover_panels_or_labels(kind: str) -> None:
    runs = []
    for number, method in enumerate(["plain", "two-pass", "random masks", "ROSE first order", "ROSE ensemble"]):
        for seed in range(2):
            one = result(method, seed, clean=0.9 + seed / 100, adv=0.3 + number / 50)
            for kind_ in ("typos", "swaps", "deletions", "casing", "synonyms"):
                one.rows += [Row("noise_accuracy", Estimate(0.9 - rate, 50), kind_, rate) for rate in (0.1, 0.3)]
            runs.append(one)
    frame = frame_of(runs)
    picture = (scatter if kind == "scatter" else noise)(frame, styles_of(_methods(frame, "plain")), "sst2")
    picture.draw_without_rendering()
    (legend,) = picture.legends
    assert len(legend.get_texts()) == 5 + (kind == "noise")  # the band has a line of its own
    box = legend.get_window_extent()
    for axes in picture.axes:
        if axes.get_visible():
            assert not box.overlaps(axes.get_tightbbox())
    assert picture.bbox.contains(box.x0 + 1, box.y0 + 1) and picture.bbox.contains(box.x1 - 1, box.y1 - 1)


def test_the_command_line_writes_the_page(tmp_path: Path) -> None:
    save_runs(tmp_path / "runs")
    command = [
        sys.executable,
        "-m",
        "rose_peft.robustness",
        "report",
        str(tmp_path / "runs"),
        "--output_dir",
        str(tmp_path / "o"),
    ]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()) == tmp_path / "o" / "report.md"
    failed = subprocess.run(
        [*command[:4], "absent.json", *command[5:]], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert failed.returncode == 2
    assert failed.stderr.strip() == "error: absent.json: cannot be read (No such file or directory); check the path."


def test_a_report_beside_its_sources_does_not_read_itself(tmp_path: Path) -> None:
    save_runs(tmp_path)
    first = write_report([tmp_path], tmp_path).page.read_text()
    assert write_report([tmp_path], tmp_path).page.read_text() == first
    assert find_results([tmp_path, tmp_path / "rose-0.result.json"]) == sorted(tmp_path.glob("*.json"))


def test_methods_look_different() -> None:
    looks = [style_of(number) for number in range(40)]
    assert len({(look["color"], look["marker"]) for look in looks}) == 40
    assert len({(look["color"], look["linestyle"]) for look in looks}) == 40
