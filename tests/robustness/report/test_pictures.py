"""The pictures of the report: few methods, each with one look, intervals and courses as a reader needs them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex

from rose_peft.robustness.command_line import main
from rose_peft.robustness.estimate import Estimate, paired_difference
from rose_peft.robustness.plotting import styles_of
from rose_peft.robustness.report import write_report
from rose_peft.robustness.report.frame import Run, gather
from rose_peft.robustness.report.pictures import draw
from rose_peft.robustness.results import Result, Row

# Name -> number of seeds and robust accuracy; the best is neither among the first nor of most seeds.
METHODS = {
    "plain": (1, 0.30), "poor": (2, 0.20), "a": (2, 0.40), "b": (2, 0.41), "c": (2, 0.42), "d": (2, 0.43),
    "e": (2, 0.44), "once": (1, 0.90),
}  # fmt: skip
CHOSEN = list(METHODS)[:6]


def runs() -> list[Result]:
    found = []
    for number, (method, (seeds, robust)) in enumerate(METHODS.items()):
        for seed in range(seeds):
            clean = 0.80 + 0.01 * number + 0.004 * seed
            rows = [
                Row("clean_accuracy", Estimate(clean, 100, clean - 0.05, clean + 0.05)),
                Row("robust_accuracy", Estimate(robust + 0.02 * seed, 50, robust - 0.1, robust + 0.1), "AdvGLUE"),
                Row("noise_accuracy", Estimate(clean - 0.1, 100), "typos", 0.1),
            ]
            history = [
                {"clean": {"accuracy": 0.6 + step}, "robust": {"AdvGLUE": {"accuracy": robust - step}}}
                for step in (0.0, 0.1, 0.05)
            ]
            found.append(Result(method, "sst2", seed, rows, config={"history": history}))
    return found


def drawn() -> dict[str, Any]:
    frame = gather([Run(Path(f"{number}.result.json"), one) for number, one in enumerate(runs())], [])
    courses = {"AdvGLUE": {m: {0: [(0.6, 0.4), (0.7, 0.3), (0.65, 0.35)]} for m in METHODS}}
    pictures = draw(frame, styles_of(CHOSEN), courses, "sst2")
    return {name: picture for name, (_, picture) in pictures.items()}


def test_a_method_looks_the_same_in_all_pictures() -> None:
    pictures = drawn()
    assert set(pictures) == {"scatter", "noise", "course AdvGLUE"}
    looks: dict[str, dict[str, tuple[str, Any]]] = {}
    for name in ("scatter", "noise"):
        (legend,) = pictures[name].legends
        labels = [text.get_text() for text in legend.get_texts()]
        for label, line in zip(labels, legend.legend_handles, strict=True):
            if not label.startswith("band"):
                looks.setdefault(label, {})[name] = (to_hex(line.get_color()), line.get_marker())
    for axes in pictures["course AdvGLUE"].axes:
        for line in axes.lines:
            if line.get_label() in METHODS:
                assert line.get_label() == axes.get_title()
                looks[axes.get_title()]["course"] = (to_hex(line.get_color()), line.get_marker())
    assert set(looks) == set(CHOSEN)
    for by_picture in looks.values():
        assert set(by_picture) == {"scatter", "noise", "course"} and len(set(by_picture.values())) == 1
    assert len({by_picture["noise"] for by_picture in looks.values()}) == 6
    assert len({by_picture["noise"][0] for by_picture in looks.values()}) == 6


def test_the_page_shows_the_first_six_of_the_order_and_says_what_it_leaves_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, one in enumerate(runs()):
        one.save(tmp_path / f"{number:02d}.result.json")
    page = write_report([tmp_path], tmp_path / "out", order=list(METHODS)).page.read_text()
    assert "The pictures show the first 6 of 8 methods. Left out of them: e, once." in page
    command = ["report", str(tmp_path), "--output_dir", str(tmp_path / "asked"), "--methods", "once", "e", "nobody"]
    assert main(command) == 0
    assert "methods='nobody': no result is of this method." in capsys.readouterr().err
    page = (tmp_path / "asked" / "report.md").read_text()
    assert page.index("| plain (1 seed) |") < page.index("| once (1 seed) |") < page.index("| e (2 seeds) |")
    assert "Left out of them: c, d." in page  # the baseline comes first, asked for or not
    for number, one in enumerate(runs()):
        if one.method in ("poor", "once"):
            (tmp_path / f"{number:02d}.result.json").unlink()
    assert "Left out of them" not in write_report([tmp_path], tmp_path / "out").page.read_text()


def test_the_scatter_has_the_intervals_of_the_means() -> None:
    axes = drawn()["scatter"].axes[0]
    bars = {to_hex(container.lines[0].get_color()): container for container in axes.containers}
    styles = styles_of(CHOSEN)
    across, along = bars[styles["a"]["color"]].lines[2]
    expected = paired_difference([0.40, 0.42], [0.0, 0.0])
    assert np.array(along.get_segments()[0])[:, 1] == pytest.approx([100 * expected.low, 100 * expected.high])
    # One seed has the interval within its run, in both directions.
    across, along = bars[styles["plain"]["color"]].lines[2]
    assert np.array(along.get_segments()[0])[:, 1] == pytest.approx([20.0, 40.0])
    assert np.array(across.get_segments()[0])[:, 0] == pytest.approx([75.0, 85.0])


def test_a_course_is_a_line_in_the_order_of_the_epochs() -> None:
    axes = drawn()["course AdvGLUE"].axes[2]
    (line,) = [line for line in axes.lines if line.get_label() == "a"]
    assert list(line.get_xdata()) == pytest.approx([60, 70, 65]) and line.get_linestyle() == "-"
    (last,) = [line for line in axes.lines if line.get_label() == "_last"]
    assert list(last.get_xdata()) == pytest.approx([65])


def test_noise_explains_its_bands_and_labels_its_ticks_truly() -> None:
    picture = drawn()["noise"]
    picture.draw_without_rendering()
    assert "band: lowest to highest seed" in [text.get_text() for text in picture.legends[0].get_texts()]
    for axis in (picture.axes[0].xaxis, picture.axes[0].yaxis):
        labels = [label.get_text() for label in axis.get_ticklabels()]
        assert all(label.endswith(" %") and ".0 " not in label for label in labels)
        assert [float(label.rstrip("%").replace("\N{MINUS SIGN}", "-")) / 100 for label in labels] == pytest.approx(
            list(axis.get_ticklocs())
        )
