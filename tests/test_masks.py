"""Selection against its slow twin, its invariants, and the published mask cases."""

from __future__ import annotations

import json
import math

import numpy
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from safetensors.torch import load_file

from rose_peft import masks
from tests.helpers import reference
from tests.helpers.traces import REFERENCE, needs_traces

KINDS = {torch.float32: numpy.float32, torch.float64: numpy.float64}

norms = st.floats(0, 1e3, allow_subnormal=False)
dtypes = st.sampled_from([torch.float32, torch.float64])


def scores_of(width: int, special: bool = False, max_size: int = 40) -> st.SearchStrategy:
    finite = st.floats(0, 1e6, width=width)
    ties = st.integers(0, 4).map(float)
    kinds = [finite, ties, st.just(0.0)]
    if special:
        kinds += [st.just(math.nan), st.just(math.inf)]
    return st.lists(st.one_of(*kinds), min_size=1, max_size=max_size)


@st.composite
def levels(draw) -> tuple[float, float]:
    lower = draw(st.one_of(st.just(0.0), st.integers(0, 98).map(lambda n: n / 100)))
    upper = draw(st.one_of(st.just(1.0), st.integers(round(lower * 100) + 1, 100).map(lambda n: n / 100)))
    return lower, upper


def band(scores, dtype, lower, upper, unranked=None) -> tuple[list, list]:
    flags = torch.tensor(unranked, dtype=torch.bool) if unranked is not None else None
    mask, thresholds = masks.quantile_band(torch.tensor(scores, dtype=dtype), lower, upper, flags)
    assert mask.dtype == torch.float32 and thresholds.dtype == dtype and thresholds.shape == (2,)
    return mask.tolist(), thresholds.tolist()


# The band against the twin -------------------------------------------------------------------------------------------


@given(scores_of(32, special=True), dtypes, levels(), st.data())
def test_band_equals_the_twin(scores, dtype, bounds, data):
    unranked = data.draw(st.none() | st.lists(st.booleans(), min_size=len(scores), max_size=len(scores)))
    mask, thresholds = band(scores, dtype, *bounds, unranked)
    expected, expected_thresholds = reference.band(scores, *bounds, unranked, kind=KINDS[dtype])
    assert mask == expected
    for value, wanted in zip(thresholds, expected_thresholds, strict=True):
        # One rounding: vectorised interpolation may fuse the multiplication and the addition.
        assert value == pytest.approx(float(wanted), rel=4 * float(numpy.finfo(KINDS[dtype]).eps), nan_ok=True)


@given(scores_of(32), dtypes, levels())
def test_finite_scores_follow_the_published_rule(scores, dtype, bounds):
    assert band(scores, dtype, *bounds)[0] == reference.published_band(scores, *bounds, kind=KINDS[dtype])[0]


@given(scores_of(32), dtypes, levels(), st.data())
def test_band_moves_with_its_units(scores, dtype, bounds, data):
    order = data.draw(st.permutations(range(len(scores))))
    unranked = data.draw(st.lists(st.booleans(), min_size=len(scores), max_size=len(scores)))
    mask, thresholds = band(scores, dtype, *bounds, unranked)
    permuted, permuted_thresholds = band([scores[i] for i in order], dtype, *bounds, [unranked[i] for i in order])
    assert permuted == [mask[i] for i in order]
    assert permuted_thresholds == pytest.approx(thresholds, nan_ok=True, rel=0, abs=0)


@given(scores_of(32), dtypes, levels(), st.integers(-20, 20))
def test_first_order_ranking_is_scale_free(scores, dtype, bounds, power):
    # Powers of two, so that scaling itself does not round; tiny scores would become subnormal.
    assume(all(score == 0 or score > 1e-20 for score in scores))
    assert band([score * 2.0**power for score in scores], dtype, *bounds)[0] == band(scores, dtype, *bounds)[0]


@given(scores_of(32), dtypes, levels())
def test_bounds_are_inclusive_and_ties_share_their_fate(scores, dtype, bounds):
    mask, (low, high) = band(scores, dtype, *bounds)
    values = torch.tensor(scores, dtype=dtype).tolist()
    for value, kept in zip(values, mask, strict=True):
        assert kept == float(low <= value <= high)
    assert len({(value, kept) for value, kept in zip(values, mask, strict=True)}) == len(set(values))


@given(scores_of(32, special=True), dtypes, levels(), st.data())
def test_something_is_kept_and_nothing_non_finite(scores, dtype, bounds, data):
    unranked = data.draw(st.lists(st.booleans(), min_size=len(scores), max_size=len(scores)))
    mask, _ = band(scores, dtype, 0.0, bounds[1], unranked)
    ranked = [i for i, score in enumerate(scores) if math.isfinite(score) and not unranked[i]]
    if ranked:  # from quantile 0 up the smallest score is always inside
        smallest = min(scores[i] for i in ranked)
        assert all(mask[i] == 1 for i in ranked if scores[i] == smallest)
    assert all(mask[i] == 1 for i in range(len(scores)) if unranked[i])
    assert all(mask[i] == 0 for i in range(len(scores)) if not unranked[i] and not math.isfinite(scores[i]))


@given(scores_of(32, special=True), dtypes, st.floats(0.01, 1))
def test_a_score_that_cannot_be_ranked_does_not_move_the_others(scores, dtype, upper):
    finite = [score for score in scores if math.isfinite(score)]
    assume(finite)
    mask, thresholds = band(scores, dtype, 0.0, upper)
    alone, alone_thresholds = band(finite, dtype, 0.0, upper)
    assert [kept for kept, score in zip(mask, scores, strict=True) if math.isfinite(score)] == alone
    assert thresholds == alone_thresholds


@given(scores_of(32), dtypes)
def test_the_whole_range_keeps_everything(scores, dtype):
    assert band(scores, dtype, 0.0, 1.0)[0] == [1.0] * len(scores)


@given(st.integers(1, 200), st.integers(1, 100), dtypes)
@example(16, 70, torch.float32)
@example(96, 50, torch.float64)
def test_count_kept_without_ties(n, percent, dtype):
    kept = sum(band([float(i) for i in range(n)], dtype, 0.0, percent / 100)[0])
    exact = percent * (n - 1) // 100 + 1
    # At an integer rank, rounding may drop the boundary unit (accident 10 of the reference, kept as published).
    assert kept == exact or ((n - 1) * percent % 100 == 0 and kept == exact - 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_integer_ranks_round_as_published(dtype):
    # n, upper, kept in float32, kept in float64: from manifest.integer_rank_scan.
    for n, percent, *kept in [(51, 58, 30, 29), (76, 84, 63, 64), (91, 70, 64, 63), (101, 59, 59, 60)]:
        mask, _ = band([float(i) for i in range(n)], dtype, 0.0, percent / 100)
        assert sum(mask) == kept[dtype == torch.float64], (n, percent)


@pytest.mark.parametrize("scores", [[math.nan], [math.inf, math.nan]])
def test_nothing_to_rank(scores):
    mask, thresholds = band(scores, torch.float32, 0.0, 0.7)
    assert mask == [0.0] * len(scores) and all(map(math.isnan, thresholds))
    mask, thresholds = band(scores, torch.float32, 0.0, 0.7, [True] * len(scores))
    assert mask == [1.0] * len(scores) and all(map(math.isnan, thresholds))


# Scores and mixing ---------------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(norms, norms, st.floats(0.01, 1)), min_size=1, max_size=20),
)
@example([(0.0, 0.0, 0.1), (1.0, 0.0, 0.1), (0.0, 1.0, 0.1), (math.nan, 1.0, 0.1), (math.inf, 2.0, 0.1)])
def test_second_order_scores_equal_the_twin(rows):
    grads, momenta, fresh = (torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True))
    scores = masks.second_order_scores(grads, momenta, fresh).tolist()
    assert scores == pytest.approx([reference.second_order_score(*row) for row in rows], rel=1e-14, nan_ok=True)


def test_second_order_score_by_hand():
    grads, momenta = torch.tensor([10.0, 5.0, 30.0, 0.0]), torch.tensor([1.0, 1.0, 1.0, 2.0])
    scores = masks.second_order_scores(grads, momenta, torch.full((4,), 0.1))
    # A gradient ten times the momentum is an average contribution; smaller and larger ones score higher.
    torch.testing.assert_close(scores, torch.tensor([0.0, 0.5, 2.0, 1.0]))


@given(
    st.lists(st.tuples(st.sampled_from([0.0, 1.0]), st.sampled_from([0.0, 1.0])), min_size=1, max_size=10),
    st.one_of(st.sampled_from([0.0, 0.3, 0.5, 0.7, 1.0]), st.floats(0, 1)),
)
@example([(0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0)], 0.3)
def test_mix_equals_the_twin(pairs, gamma):
    first, second = (torch.tensor(column, dtype=torch.float32) for column in zip(*pairs, strict=True))
    mixed = masks.mix(first, second, gamma)
    assert mixed.dtype == torch.float32
    assert mixed.tolist() == reference.mix(first.tolist(), second.tolist(), gamma)


def test_gamma_weighs_the_first_order_mask():
    mixed = masks.mix(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), 0.3)
    assert mixed.tolist() == [float(numpy.float32(0.3)), float(numpy.float32(1) - numpy.float32(0.3))]


@given(st.floats(0, 1, width=32))
def test_a_unit_that_both_masks_keep_is_kept_fully(gamma):
    assert masks.mix(torch.ones(1), torch.ones(1), gamma).item() == 1.0


# The published cases -------------------------------------------------------------------------------------------------

# Non-finite scores or thresholds (accident 12 of the reference): the published rule keeps nothing at all, or counts
# the infinite score in the ranking. What ours keeps instead, and why.
EXCEPTIONS = {
    "one_nan": ([1, 1, 0, 1, 0], "the NaN is frozen, the other four are ranked"),
    "one_inf": ([1, 1, 1, 0, 0], "the infinite score no longer counts in the ranking, which changes nothing here"),
    "one_inf_u90": ([1, 1, 1, 0, 0], "no NaN threshold next to the infinite score"),
    "second_zero_history": ([0, 1, 1, 1, 1], "a unit without momentum is kept, or it would never get any"),
    "second_zero_history_u100": ([1, 1, 1, 1, 1], "no NaN threshold, and a unit without momentum is kept"),
    "second_zero_over_zero": ([0, 1, 1, 1, 1], "no NaN thresholds, and a unit without momentum is kept"),
}


@needs_traces
def test_all_published_mask_cases(record_figures):
    tensors = load_file(REFERENCE / "traces" / "mask_cases.safetensors")
    cases = json.loads((REFERENCE / "traces" / "manifest.json").read_text())["mask_cases"]["cases"]
    assert len(cases) == 92
    equal, excepted = 0, set()
    for case in cases:
        stored = {key: tensors[f"case{case['id']}/{key}"] for key in ("values", "mask", "thresholds")}
        scores, unranked = stored["values"], None
        assert scores.dtype == getattr(torch, case["dtype"]) and len(scores) == case["n"]
        if case["kind"] == "second":
            history = tensors[f"case{case['id']}/hist"]
            scores = masks.second_order_scores(scores, history, torch.full_like(history, 0.1))
            wanted = tensors[f"case{case['id']}/scores"]
            torch.testing.assert_close(scores, wanted, rtol=1e-6, atol=0, equal_nan=True)
            unranked = history == 0
        mask, thresholds = masks.quantile_band(scores, case["lower"] / 100, case["upper"] / 100, unranked)
        published, _ = reference.published_band(
            scores.tolist(), case["lower"] / 100, case["upper"] / 100, KINDS[scores.dtype]
        )
        assert published == stored["mask"].tolist(), case  # the twin tells what was published, accidents included
        if case["tag"] in EXCEPTIONS:
            excepted.add(case["tag"])
            assert mask.tolist() == EXCEPTIONS[case["tag"]][0], case
            assert thresholds.isfinite().all()
            assert not scores.isfinite().all(), case
        else:
            assert torch.equal(mask, stored["mask"]), case
            torch.testing.assert_close(thresholds, stored["thresholds"], rtol=1e-6, atol=0)
        equal += torch.equal(mask, stored["mask"])
    assert excepted == set(EXCEPTIONS) and equal == 82
    record_figures(f"mask cases: {equal} of 92 equal, {92 - equal} differ by name (non-finite scores)")
