"""Robust accuracy at equal clean accuracy: against least squares, and where it must refuse to compare."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rose_peft.robustness.estimate import Estimate
from rose_peft.robustness.report import write_report
from rose_peft.robustness.report.equal_clean import difference_at_equal_clean, gather_courses
from rose_peft.robustness.results import Result, Row

Pairs = list[tuple[float, float]]


def course(start: float, slope: float = -1.0, lift: float = 0.0, seeds: int = 5, epochs: int = 4) -> dict[int, Pairs]:
    """Runs whose robust accuracy falls by the slope as they learn, with a lift above the common line."""
    cleans = {seed: [start + 0.02 * epoch + 0.003 * seed for epoch in range(epochs)] for seed in range(seeds)}
    return {seed: [(c, 0.4 + lift + slope * (c - 0.8)) for c in values] for seed, values in cleans.items()}


def bounds(estimate: Estimate) -> tuple[float | None, ...]:
    return estimate.value, estimate.low, estimate.high


def test_learning_less_is_not_being_more_robust() -> None:
    plain, slow = course(0.80), course(0.78)
    final_gain = np.mean([slow[seed][-1][1] - plain[seed][-1][1] for seed in plain])
    assert final_gain == pytest.approx(0.02)  # seems more robust at the end
    interval = difference_at_equal_clean(slow, plain)
    assert interval is not None and bounds(interval) == pytest.approx((0.0, 0.0, 0.0), abs=1e-9)


def test_a_lift_shows_whatever_was_learnt() -> None:
    for start in (0.78, 0.80, 0.82):
        interval = difference_at_equal_clean(course(start, lift=0.03), course(0.80))
        assert interval is not None and bounds(interval) == pytest.approx((0.03, 0.03, 0.03), abs=1e-9)


accuracies = st.tuples(st.integers(700, 900), st.integers(200, 500)).map(lambda pair: (pair[0] / 1000, pair[1] / 1000))
runs = st.lists(st.lists(accuracies, min_size=3, max_size=5), min_size=3, max_size=5)


@settings(max_examples=100, deadline=None)
@given(runs, runs)
def test_it_is_the_coefficient_of_least_squares(first: list[Pairs], second: list[Pairs]) -> None:
    ours, theirs = dict(enumerate(first)), dict(enumerate(second))
    interval = difference_at_equal_clean(ours, theirs, resamples=50)
    common = sorted(set(ours) & set(theirs))
    groups = [np.array([pair for seed in common for pair in group[seed]]) for group in (ours, theirs)]
    low, high = max(g[:, 0].min() for g in groups), min(g[:, 0].max() for g in groups)
    kept = [g[(g[:, 0] >= low) & (g[:, 0] <= high)] for g in groups]
    if min(map(len, kept)) < 3:
        assert interval is None
        return
    design = np.vstack(
        [np.column_stack([np.ones(len(g)), g[:, 0], np.full(len(g), 1 - n)]) for n, g in enumerate(kept)]
    )
    shared = [seed for seed in common if all(any(low <= c <= high for c, _ in g[seed]) for g in (ours, theirs))]
    if np.linalg.matrix_rank(design) < 3 or not shared:
        return
    expected = np.linalg.lstsq(design, np.concatenate([g[:, 1] for g in kept]), rcond=None)[0][2]
    assert interval is not None and interval.value == pytest.approx(expected, abs=1e-6)
    assert interval.n == len(shared)
    assert interval.low is None if interval.n == 1 else interval.low <= interval.high


def test_courses_that_do_not_overlap_are_not_compared() -> None:
    assert difference_at_equal_clean(course(0.6), course(0.8)) is None
    assert difference_at_equal_clean({7: course(0.8)[0]}, course(0.8)) is None  # no common seed
    assert difference_at_equal_clean({0: []}, {0: []}) is None


def test_seeds_without_a_comparable_epoch_do_not_count() -> None:
    far = {seed: [(clean + 0.5, robust) for clean, robust in pairs] for seed, pairs in course(0.80).items()}
    one = {**far, 0: course(0.80, lift=0.1)[0]}
    interval = difference_at_equal_clean(one, course(0.80))
    assert interval is not None and interval.value == pytest.approx(0.1) and interval.n == 1 and interval.low is None
    near, above, below = course(0.80)[0], [(0.95, 0.3)], [(0.5, 0.3)]
    assert difference_at_equal_clean({0: near, 1: below}, {0: above, 1: near}) is None


def test_the_interval_resamples_runs_not_epochs() -> None:
    """A seed that was lucky in all its epochs is one observation: many epochs make it no surer."""
    lucky = course(0.80, epochs=20)
    lucky[0] = [(clean, robust + 0.1) for clean, robust in lucky[0]]
    interval = difference_at_equal_clean(lucky, course(0.80, epochs=20))
    assert interval is not None
    assert interval.value == pytest.approx(0.02, abs=0.005)
    assert interval.low < 1e-9 and interval.high > 0.05


def test_each_robust_set_has_its_course() -> None:
    history = [
        {"clean": {"accuracy": 0.8}},
        {"clean": {"accuracy": 0.9}, "robust": {"AdvGLUE": {"accuracy": 0.4}, "revised": {"accuracy": 0.5}}},
    ]
    results = [Result("rose", "sst2", 3, config={"history": history}), Result("plain", "sst2", 3)]
    assert gather_courses(results, ["plain", "rose"]) == {
        "AdvGLUE": {"rose": {3: [(0.9, 0.4)]}},
        "revised": {"rose": {3: [(0.9, 0.5)]}},
    }


def test_the_report_says_it(tmp_path: Path) -> None:
    for method, runs_of in (("plain", course(0.80)), ("slow", course(0.78)), ("better", course(0.80, lift=0.05))):
        for seed, pairs in runs_of.items():
            history = [
                {"epoch": n, "clean": {"accuracy": c}, "robust": {"AdvGLUE": {"accuracy": r}}}
                for n, (c, r) in enumerate(pairs)
            ]
            result = Result(method, "sst2", seed, [Row("clean_accuracy", Estimate(pairs[-1][0], 100))])
            result.config["history"] = history
            result.save(tmp_path / method / f"seed{seed}.result.json")
    report = write_report([tmp_path], tmp_path / "report")
    page = report.page.read_text()
    assert "| better | +5.0 [+5.0, +5.0] (5) |" in page  # not emphasised: the bootstrap is too narrow for that
    assert "| slow | +0.0 [" in page or "| slow | -0.0 [" in page
    assert tmp_path / "report" / "report_sst2_course-advglue.png" in report.pictures
