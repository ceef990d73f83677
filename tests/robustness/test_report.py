"""Result files and the report: what is written is read back, what cannot be read is named, and numbers are right."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from rose_peft.robustness.errors import ResultFileError
from rose_peft.robustness.intervals import bootstrap_paired_difference
from rose_peft.robustness.report import find_results, write_report
from rose_peft.robustness.results import SCHEMA_VERSION, Figure, Result, load_result, mean_figure, share_figure
from rose_peft.robustness.tables import paired_differences

from .conftest import REPOSITORY


def result(method: str = "plain", seed: int = 0, task: str = "sst2", **figures: float) -> Result:
    content = {"clean/accuracy": Figure(figures.pop("clean", 0.9), 100, 0.8, 0.95)}
    content |= {name.replace("__", "/"): Figure(value, 50) for name, value in figures.items()}
    return Result(method, task, seed, figures=content, cost={"seconds per step": 0.5}, config={"lr": 2e-5})


def test_results_come_back_as_they_were(tmp_path: Path) -> None:
    saved = result(adv_glue__accuracy=0.4)
    saved.figures["undefined"] = share_figure([])
    saved.save(tmp_path / "a" / "r.json")
    assert load_result(tmp_path / "a" / "r.json") == saved
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["r.json"]


def test_numbers_json_cannot_hold_become_undefined(tmp_path: Path) -> None:
    diverged = result()
    diverged.figures["loss"] = Figure(float("nan"), 3, float("-inf"), float("inf"))
    diverged.save(tmp_path / "r.json")
    assert load_result(tmp_path / "r.json").figures["loss"] == Figure(None, 3)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    result().save(tmp_path / "r.json")
    broken = result(clean=0.1)
    broken.config["unwritable"] = object()
    with pytest.raises(TypeError):
        broken.save(tmp_path / "r.json")
    assert load_result(tmp_path / "r.json") == result()
    assert len(list(tmp_path.iterdir())) == 1


def test_figures_carry_their_intervals() -> None:
    assert share_figure([True] * 81 + [False] * 182).low == pytest.approx(0.2553, abs=1e-4)
    assert mean_figure([1.0, 2.0, 3.0]).value == 2.0
    assert mean_figure([]) == Figure(None, 0)
    assert str(Figure(0.5, 4, 0.15, 0.85)) == "0.5 [0.15, 0.85] (n=4)"


def test_every_truncation_is_one_clear_line(tmp_path: Path) -> None:
    result().save(tmp_path / "r.json")
    whole = (tmp_path / "r.json").read_bytes()
    for length in range(0, len(whole) - 2, 7):
        (tmp_path / "cut.json").write_bytes(whole[:length])
        with pytest.raises(ResultFileError, match=r"cut\.json: truncated or not JSON") as caught:
            load_result(tmp_path / "cut.json")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": SCHEMA_VERSION + 1}, "this version of the kit reads"),
        ({"schema_version": None}, "schema_version=None"),
        ({"seed": "0"}, "seed='0' is no int"),
        ({"figures": {"x": 0.5}}, "figure 'x' is 0.5"),
        ({"figures": {"x": {"value": "high"}}}, "figure 'x' has value='high', which is no finite number"),
        ({"figures": {"x": {"value": float("nan")}}}, "figure 'x' has value=nan"),
        ({"figures": {"x": {"value": 0.5, "high": float("inf")}}}, "figure 'x' has high=inf"),
        ({"figures": {"x": {"value": 10**400}}}, "figure 'x' has value=1000"),
        ({"cost": {"step": "1.5 x"}}, "cost 'step' is '1.5 x', no finite number"),
        ({"versions": {"torch": None}}, "versions 'torch' is None, no text"),
        ({"images": {"m": None}}, "images 'm' is None, no text"),
        ({"surprise": 1}, "unknown keys"),
        ({"cost": 3}, "cost=3"),
    ],
)
def test_foreign_files_are_named(tmp_path: Path, change: dict, message: str) -> None:
    result().save(tmp_path / "r.json")
    content = json.loads((tmp_path / "r.json").read_text())
    (tmp_path / "r.json").write_text(json.dumps({**content, **change}))
    with pytest.raises(ResultFileError, match=message):
        load_result(tmp_path / "r.json")
    (tmp_path / "r.json").write_text("[1, 2]")
    with pytest.raises(ResultFileError, match="no schema_version"):
        load_result(tmp_path / "r.json")


PLAIN = [0.30, 0.34, 0.29, 0.33, 0.35]
ROSE = [0.36, 0.37, 0.34, 0.41, 0.38]


def save_runs(folder: Path) -> list[Result]:
    runs = []
    for seed, (plain, rose) in enumerate(zip(PLAIN, ROSE, strict=True)):
        for method, robust in (("rose", rose), ("plain", plain)):
            one = result(method, seed, adv_glue__accuracy=robust, clean=0.9 - 0.01 * (method == "rose"))
            one.save(folder / f"{method}-{seed}.json")
            noise = {f"noise/typos@{rate:g}/accuracy": Figure(robust + 0.4 - rate, 50) for rate in (0.1, 0.3)}
            dataclasses.replace(one, figures=noise).save(folder / f"{method}-{seed}-noise.json")
            runs.append(one)
    return runs


def test_the_page_has_the_right_numbers(tmp_path: Path) -> None:
    runs = save_runs(tmp_path / "runs")
    report = write_report([tmp_path / "runs"], tmp_path / "out", as_html=True)
    assert report.problems == []
    assert len(report.results) == 10
    lines = report.page.read_text().splitlines()
    mean, spread = 100 * statistics.fmean(PLAIN), 100 * statistics.stdev(PLAIN)
    value, low, high = (100 * part for part in bootstrap_paired_difference(ROSE, PLAIN))
    start = lines.index("| method | clean accuracy (%) | adv glue accuracy (%) |")
    assert lines[start + 2] == f"| plain (5 seeds) | 90.0 ± 0.0 | {mean:.1f} ± {spread:.1f} |"
    assert lines[start + 3].startswith("| rose (5 seeds) | 89.0 ± 0.0 |")
    start = lines.index("| method | clean accuracy (points) | adv glue accuracy (points) |")
    cells = f"**-1.0 [-1.0, -1.0]** (5) | **{value:+.1f} [{low:+.1f}, {high:+.1f}]** (5)"
    assert lines[start + 2] == f"| rose | {cells} |"
    interval, count = paired_differences(runs, "rose", "plain", "adv_glue/accuracy")
    assert count == 5 and interval.value == pytest.approx(statistics.fmean(ROSE) - statistics.fmean(PLAIN))
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"<td><b>{value:+.1f} [{low:+.1f}, {high:+.1f}]</b> (5)</td>" in page
    for picture in report.pictures:
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert picture.name in report.page.read_text() and picture.name in page
    assert {picture.name for picture in report.pictures} == {"report_sst2_scatter.png", "report_sst2_noise.png"}


def test_large_figures_are_written_out(tmp_path: Path) -> None:
    result(hessian_trace=1478.6).save(tmp_path / "plain.json")
    result("rose", hessian_trace=1900.2).save(tmp_path / "rose.json")
    page = write_report([tmp_path], tmp_path / "report").page.read_text()
    assert "| 1479 |" in page and "| 1900 |" in page and "| +422 (1) |" in page
    assert page.splitlines()[2].startswith("2 runs: 2 methods, 1 task, seeds 0.")


def test_few_seeds_are_shown_but_never_emphasised(tmp_path: Path) -> None:
    for seed in range(3):
        result("plain", seed, adv_glue__accuracy=0.3).save(tmp_path / f"p{seed}.json")
        result("rose", seed, adv_glue__accuracy=0.4 + seed / 100).save(tmp_path / f"r{seed}.json")
    result("once", 0, adv_glue__accuracy=0.5).save(tmp_path / "o.json")
    page = write_report([tmp_path], tmp_path / "out").page.read_text()
    assert "| once | +0.0 (1) | +20.0 (1) |" in page
    assert "| rose | +0.0 [+0.0, +0.0] (3) | +11.0 [+10.0, +12.0] (3) |" in page


def test_methods_come_in_the_order_asked_for_and_details_in_a_table_of_their_own(tmp_path: Path) -> None:
    for method in ("c", "b", "a", "plain"):
        result(method, 0, attack__x__queries=7).save(tmp_path / f"{method}.json")
    lines = write_report([tmp_path], tmp_path / "out", order=["b", "c"]).page.read_text().splitlines()
    tables = [at for at, line in enumerate(lines) if line.startswith("| method | ")]
    assert [lines[at] for at in tables[:3]] == [
        "| method | clean accuracy (%) |",
        "| method | clean accuracy (points) |",
        "| method | attack x queries |",
    ]
    first = [line.split()[1] for line in lines[tables[0] + 2 : tables[0] + 6]]
    assert first == ["plain", "b", "c", "a"]


def test_pairs_are_formed_by_seed_not_by_order(tmp_path: Path) -> None:
    runs = [result("plain", seed, x=seed / 10) for seed in (0, 1, 2)]
    runs += [result("rose", seed, x=seed / 10 + 0.05) for seed in (2, 0, 7)]
    interval, count = paired_differences(runs, "rose", "plain", "x")
    assert count == 2
    assert interval == pytest.approx((0.05, 0.05, 0.05))
    assert paired_differences(runs, "rose", "absent", "x") is None


def test_bad_files_are_listed_and_the_others_reported(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    save_runs(runs)
    (runs / "cut.json").write_bytes((runs / "rose-0.json").read_bytes()[:90])
    (runs / "empty.json").write_text("")
    foreign = json.loads((runs / "rose-0.json").read_text()) | {"schema_version": 99}
    (runs / "old.json").write_text(json.dumps(foreign))
    (runs / "config.json").write_text('{"model_type": "bert"}')
    report = write_report([runs, tmp_path / "absent.json"], tmp_path / "out")
    assert len(report.results) == 10
    named = [Path(line.partition(": ")[0]).name for line in report.problems]
    assert sorted(named) == ["absent.json", "cut.json", "empty.json", "old.json"]
    assert all(line in report.page.read_text() for line in report.problems)
    with pytest.raises(ResultFileError, match=r"cut\.json"):
        write_report([runs / "cut.json"], tmp_path / "none")
    assert not (tmp_path / "none").exists()


ODD = {
    "nan.json": {"figures": {"x": {"value": float("nan")}}},
    "rate.json": {"figures": {"noise/typos@1.2.3/accuracy": {"value": 0.5}}},
    "cost.json": {"cost": {"step": "1.5 x"}},
    "versions.json": {"versions": {"torch": None}},
    "images.json": {"images": {"m": None}},
    "half.json": {"method": "\ud800"},
    "long.json": {"images": {"m": "m" * 300}},
    "nested.json": "[" * 100_000,
    "digits.json": "9" * 5000,
    "brace.json": "{",
    "start.json": '{"schema_ver',
    "nuls.json": "\0" * 301,
    "lines.json": '{"a": 1}\n{"a": 2}\n',
}


def write_odd(path: Path, odd: str | dict) -> None:
    result("odd").save(path)
    path.write_text(odd if isinstance(odd, str) else json.dumps({**json.loads(path.read_text()), **odd}))


@pytest.mark.parametrize("name", ODD)
def test_one_odd_file_does_not_stop_the_report(tmp_path: Path, name: str) -> None:
    result().save(tmp_path / "plain.json")
    write_odd(tmp_path / name, ODD[name])
    report = write_report([tmp_path], tmp_path / "out")
    assert "| plain (1 seed) |" in report.page.read_text()
    if name != "rate.json":  # a figure of a name that says nothing
        assert [Path(line.partition(": ")[0]).name for line in report.problems] == [name]
        assert "\n" not in report.problems[0]


def test_links_folders_and_pipes_do_not_stop_the_report(tmp_path: Path) -> None:
    result().save(tmp_path / "plain.json")
    (tmp_path / "dangling.json").symlink_to("gone")
    (tmp_path / "loop.json").symlink_to("loop.json")
    (tmp_path / "folder.json").mkdir()
    os.mkfifo(tmp_path / "pipe.json")
    report = write_report([tmp_path, tmp_path / "pipe.json"], tmp_path / "out")
    named = [Path(line.partition(": ")[0]).name for line in report.problems]
    assert named == ["dangling.json", "loop.json", "pipe.json"]
    assert "pipe.json: cannot be read (no regular file)" in report.problems[2]


def test_names_that_are_no_text_do_not_stop_the_report(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    one = result()
    one.images = {"Masks": "masks.png"}
    one.save(folder / "plain.json")
    (folder / "masks.png").write_bytes(b"\x89PNG picture")
    (folder / "cut.json").write_text("{")
    page = write_report([folder], tmp_path, as_html=True).page.read_text()
    assert "caf%E9/masks.png" in page and "caf\\udce9/cut.json: truncated" in page


def test_names_are_no_formulas(tmp_path: Path) -> None:
    result("$\\foo$", task="$\\bar$", adv_glue__accuracy=0.4, **{"noise__typos@0.1__accuracy": 0.5}).save(
        tmp_path / "r.json"
    )
    assert len(write_report([tmp_path], tmp_path).pictures) == 2


def test_valid_json_of_another_kind_is_passed_over(tmp_path: Path) -> None:
    result().save(tmp_path / "plain.json")
    foreign = {
        "config": {"model_type": "bert"},
        "nested": {"info": {"schema_version": 2}},
        "search": [{"schema_version": 1}],
        "number": 3,
        "large": {"vocabulary": ["word"] * 200_000},
        "results": {"schema_version": 1, "method": "none", "best": {}, "history": [], "timing": {}, "steps": 6},
    }
    for name, content in foreign.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    assert find_results([tmp_path]) == [tmp_path / "plain.json"]
    with pytest.raises(ResultFileError, match=r"results\.json: is about a run of training"):
        load_result(tmp_path / "results.json")
    (tmp_path / "large.json").write_text(json.dumps(foreign["large"])[:-2])
    assert find_results([tmp_path]) == [tmp_path / "large.json", tmp_path / "plain.json"]


def test_results_are_found_whatever_the_order_of_their_keys_and_their_names(tmp_path: Path) -> None:
    result().save(tmp_path / "report.json")
    content = json.loads((tmp_path / "report.json").read_text())
    (tmp_path / "report.json").write_text(json.dumps(content, sort_keys=True))
    assert len(write_report([tmp_path], tmp_path).results) == 1


def test_conflicts_and_a_missing_baseline_are_said(tmp_path: Path) -> None:
    result("rose", 0, adv_glue__accuracy=0.4).save(tmp_path / "a.json")
    result("rose", 0, adv_glue__accuracy=0.5).save(tmp_path / "b.json")
    report = write_report([tmp_path], tmp_path / "out")
    assert any("adv_glue/accuracy of rose, sst2, seed 0 is 0.5 here and 0.4" in line for line in report.problems)
    assert any("baseline='plain': no result is of this method" in line for line in report.problems)


def save_noise(
    folder: Path, method: str, seed: int, noise: dict[str, float], n: int = 872, stored: float = 0.5
) -> None:
    one = result(method, seed)
    one.figures = {f"noise/{name}/accuracy": Figure(value, n) for name, value in noise.items()}
    one.figures["noise/mean/accuracy"] = Figure(stored)
    one.save(folder / f"{method}-{seed}.json")


def test_the_mean_over_noise_is_over_what_all_runs_have(tmp_path: Path) -> None:
    wide = {"typos@0.1": 0.8, "typos@0.3": 0.6, "casing@0.1": 0.9}
    save_noise(tmp_path, "plain", 0, wide)
    save_noise(tmp_path, "rose", 0, wide, stored=0.4)
    result("clean only").save(tmp_path / "clean.json")
    same = write_report([tmp_path], tmp_path / "out")
    assert same.problems == []
    assert [one.figures["noise/mean/accuracy"].value for one in same.results[1:]] == [0.5, 0.4]
    save_noise(tmp_path, "rose", 1, {"typos@0.3": 0.5, "casing@0.1": 0.7, "typos@0.05": 0.1})
    mixed = write_report([tmp_path], tmp_path / "out")
    means = {(one.method, one.seed): one.figures.get("noise/mean/accuracy") for one in mixed.results}
    assert means.pop(("clean only", 0)) is None
    assert {run: mean.value for run, mean in means.items()} == pytest.approx(
        {("plain", 0): 0.75, ("rose", 0): 0.75, ("rose", 1): 0.6}
    )
    (line,) = mixed.problems
    assert "over the noise that all runs have (typos@0.3, casing@0.1); it leaves out typos@0.1, typos@0.05" in line
    assert "| rose (2 seeds) | - | 67.5 ± 10.6 |" in mixed.page.read_text()
    save_noise(tmp_path, "rose", 2, {"swaps@0.1": 0.5})
    none = write_report([tmp_path], tmp_path / "out")
    assert "sst2: noise/mean/accuracy is undefined, as no noise is common to all runs" in none.problems[0]
    assert all(one.figures.get("noise/mean/accuracy", Figure(None)).value is None for one in none.results)


def test_noise_in_several_files_has_one_mean(tmp_path: Path) -> None:
    save_noise(tmp_path / "one", "plain", 0, {"typos@0.1": 0.8}, stored=0.8)
    save_noise(tmp_path / "two", "plain", 0, {"typos@0.3": 0.6, "casing@0.1": 0.4}, stored=0.5)
    report = write_report([tmp_path], tmp_path / "out")
    assert report.problems == []
    assert report.results[0].figures["noise/mean/accuracy"].value == pytest.approx(0.6)


def save_attack(folder: Path, method: str, seed: int, n: int, budget: int | None, errors: int = 0) -> None:
    one = result(method, seed)
    one.figures |= {
        "attack/pwws/clean_accuracy": Figure(0.9, n),
        "attack/pwws/accuracy_under_attack": Figure(0.1, n - errors),
        "attack/pwws/success_rate": Figure(0.9, n - 10 - seed),
        "attack/pwws/queries": Figure(120.0, n - 10 - seed),
        "attack/pwws/errors": Figure(errors),
    }
    one.config = {"query_budget": budget} if method == "plain" else {"evaluation": {"query_budget": budget}}
    one.save(folder / f"{method}-{seed}.json")


def test_figures_over_other_data_are_named(tmp_path: Path) -> None:
    for seed in range(2):
        save_attack(tmp_path, "plain", seed, 200, None)
    save_attack(tmp_path, "rose", 0, 200, None)
    assert write_report([tmp_path], tmp_path / "out").problems == []
    save_attack(tmp_path, "rose", 1, 20, 500)
    small = result("rose", 2, adv_glue__accuracy=0.3)
    small.figures["clean/accuracy"] = Figure(0.9, 64)
    small.save(tmp_path / "small.json")
    assert write_report([tmp_path], tmp_path / "out").problems == [
        "sst2: clean/accuracy cannot be compared: it is over n=64 for rose (seed 2), and 100 for the others; "
        "evaluate all on the same examples.",
        "sst2: attack/pwws/accuracy_under_attack cannot be compared: it is over n=20 for rose (seed 1), and 200 for "
        "the others; evaluate all on the same examples.",
        "sst2: attack/pwws cannot be compared: it had query_budget=500 for rose (seed 1), and None for the others; "
        "attack all with the same one.",
    ]


def test_attacks_that_broke_are_named(tmp_path: Path) -> None:
    save_attack(tmp_path, "plain", 0, 200, None)
    save_attack(tmp_path, "rose", 1, 200, None, errors=3)
    report = write_report([tmp_path], tmp_path / "out")
    (line,) = report.problems  # the examples are the same, so the figures can be compared
    assert line.startswith("attack/pwws of rose, sst2, seed 1 broke on 3 of 200 examples")
    assert line in report.page.read_text()


def test_sources_of_adv_glue_have_a_table(tmp_path: Path) -> None:
    for method, seed, value in (("plain", 0, 0.25), ("plain", 1, 0.35), ("rose", 0, 0.5)):
        one = result(method, seed)
        one.figures |= {
            "adv_glue/source/textfooler/accuracy": Figure(value, 20, value - 0.2, value + 0.2),
            "adv_glue/source/human/accuracy": Figure(value + 0.1, 20),
        }
        one.save(tmp_path / f"{method}-{seed}.json")
    lines = write_report([tmp_path], tmp_path / "out").page.read_text().splitlines()
    start = lines.index("AdvGLUE accuracy (%) by the attack behind the examples:")
    assert lines[start + 2 : start + 6] == [
        "| method | human | textfooler |",
        "| --- | ---: | ---: |",
        "| plain (2 seeds) | 40.0 ± 7.1 | 30.0 ± 7.1 |",
        "| rose (1 seed) | 60.0 | 50.0 [30.0, 70.0] |",
    ]


def test_one_run_shows_the_interval_within_it(tmp_path: Path) -> None:
    one = result(adv_glue__accuracy=0.3)
    one.figures["clean/accuracy"] = Figure(0.8604, 872, 0.8351, 0.8817)
    one.figures["landscape/hessian_trace"] = Figure(926.0, 8, -12.345, 1900.0)
    one.save(tmp_path / "plain.json")
    dataclasses.replace(one, figures={}).save(tmp_path / "cost.json")
    page = write_report([tmp_path], tmp_path / "out").page.read_text()
    assert "| plain (1 seed) | 86.0 [83.5, 88.2] | 30.0 | 926 [-12.3, 1900] |" in page
    dataclasses.replace(one, seed=1).save(tmp_path / "second.json")
    page = write_report([tmp_path], tmp_path / "out").page.read_text()
    assert "| plain (2 seeds) | 86.0 ± 0.0 | 30.0 ± 0.0 | 926 ± 0 |" in page


@pytest.mark.filterwarnings("ignore:Glyph")  # the font has no such letters
def test_each_picture_has_a_file_of_its_own(tmp_path: Path) -> None:
    tasks = ["情感", "問答", "情感 sst2", "SST2", "sst2", "sst2-2", "my task"]
    for task in tasks:
        one = result(task=task, adv_glue__accuracy=0.3)
        one.images = {"情": "a.png", "問": "b.png"}
        one.save(tmp_path / "runs" / task / "r.json")
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
    one.save(tmp_path / "runs" / "r.json")
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
def test_legends_do_not_cover_panels_or_labels(tmp_path: Path, kind: str) -> None:
    from rose_peft.robustness import report

    runs = []
    for number, method in enumerate(["plain", "two-pass", "random masks", "ROSE first order", "ROSE ensemble"]):
        for seed in range(2):
            one = result(method, seed, clean=0.9 + seed / 100, adv_glue__accuracy=0.3 + number / 50)
            for kind_ in ("typos", "swaps", "deletions", "casing", "synonyms"):
                one.figures |= {f"noise/{kind_}@{rate:g}/accuracy": Figure(0.9 - rate, 50) for rate in (0.1, 0.3)}
            runs.append(one)
    plot = report._plot_scatter if kind == "scatter" else report._plot_noise
    picture = plot(runs, report._methods(runs, "plain"), "sst2")
    picture.draw_without_rendering()
    (legend,) = picture.legends
    assert len(legend.get_texts()) == 5
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
        str(tmp_path / "runs"),
        "--output_dir",
        str(tmp_path / "o"),
    ]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()) == tmp_path / "o" / "report.md"
    failed = subprocess.run(
        [*command[:3], "absent.json", *command[4:]], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert failed.returncode == 1
    assert failed.stderr.strip() == "error: absent.json: cannot be read (No such file or directory); check the path."


def test_a_report_beside_its_sources_does_not_read_itself(tmp_path: Path) -> None:
    save_runs(tmp_path)
    first = write_report([tmp_path], tmp_path).page.read_text()
    assert write_report([tmp_path], tmp_path).page.read_text() == first
    assert find_results([tmp_path, tmp_path / "rose-0.json"]) == sorted(tmp_path.glob("*.json"))


def test_methods_look_different() -> None:
    from rose_peft.robustness.plotting import style_of

    looks = [style_of(number) for number in range(40)]
    assert len({(look["color"], look["marker"]) for look in looks}) == 40
    assert len({(look["color"], look["linestyle"]) for look in looks}) == 40
