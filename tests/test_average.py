"""What sampled passes say of a whole batch: the smoothed average, and vectors, whose rows agree."""

from __future__ import annotations

import itertools
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import IA3Config, LoraConfig, PeftConfig, get_peft_model
from torch import Tensor, nn

from rose_peft import ROSEConfig, attach_rose, get_selector
from rose_peft.average import RiskAverage, RiskFigures
from rose_peft.state import SelectionState
from tests.helpers.tiny import batch, tiny_bert
from tests.helpers.window import figures_of

positive = st.floats(1e-6, 1e6)
NO_VECTORS = torch.zeros(0, dtype=torch.int64)


def figures(
    squares: list[float], gradients: Tensor | None = None, finite: float = 1, more_rows: float = 3
) -> RiskFigures:
    gradient_sum = torch.zeros(0, dtype=torch.float64) if gradients is None else gradients
    return RiskFigures(torch.tensor(squares, dtype=torch.float64), gradient_sum, finite=finite, more_rows=more_rows)


def squares_of(average: RiskAverage) -> Tensor:
    found = average.squares()
    assert found is not None
    return found


# Matrices: a bias-corrected average of squared norms -----------------------------------------------------------------


@given(st.lists(st.lists(positive, min_size=3, max_size=3), min_size=1, max_size=12), st.floats(0, 0.99))
def test_the_average_is_bias_corrected(means: list[list[float]], smoothing: float) -> None:
    average = RiskAverage.empty(3, NO_VECTORS)
    for mean in means:
        average = average.after(figures([4 * value for value in mean], finite=4), smoothing)
    weights = torch.tensor([smoothing**age for age in range(len(means))][::-1], dtype=torch.float64)
    expected = (weights[:, None] * torch.tensor(means, dtype=torch.float64)).sum(0) / weights.sum()
    torch.testing.assert_close(squares_of(average), expected, rtol=1e-9, atol=0)


@given(positive, st.integers(1, 20), st.floats(0, 0.99))
def test_the_average_of_a_constant_is_the_constant(value: float, count: int, smoothing: float) -> None:
    average = RiskAverage.empty(1, NO_VECTORS)
    for _ in range(count):
        average = average.after(figures([value]), smoothing)
    assert float(squares_of(average)) == pytest.approx(value, rel=1e-9)


@given(st.lists(st.tuples(st.booleans(), positive), min_size=1, max_size=12), st.floats(0, 0.99))
def test_units_that_a_pass_does_not_reach_keep_theirs(passes: list[tuple[bool, float]], smoothing: float) -> None:
    """Unit 0 is reached by every pass, unit 1, an expert, by some: its average is that of those alone."""
    both, alone = RiskAverage.empty(2, torch.tensor([1])), RiskAverage.empty(1, torch.tensor([0]))
    for reached, value in passes:
        gradient = torch.tensor([value if reached else 0.0], dtype=torch.float64).sqrt()
        both = both.after(figures([1.0, value if reached else 0.0], gradient), smoothing)
        if reached:
            alone = alone.after(figures([value], gradient), smoothing)
    for one, other in ((both.linear[:, 1:], alone.linear), (both.quadratic[:, 1:], alone.quadratic)):
        assert torch.equal(one, other)
    assert torch.equal(both.gradients, alone.gradients)
    assert float(squares_of(both)[0]) == pytest.approx(1.0)
    # Where no pass has come there is nothing to be ranked by yet.
    assert float(squares_of(both)[1]) == (0 if alone.squares() is None else float(squares_of(alone)))


def test_nothing_is_changed_in_place() -> None:
    average = RiskAverage.empty(2, torch.tensor([1, 1])).after(figures([1.0, 2.0], torch.ones(2).double()), 0.5)
    before = [tensor.clone() for tensor in vars(average).values()]
    risk = figures([3.0, 5.0], torch.tensor([1.0, 2.0]).double())
    average.after(risk, 0.5).squares()
    assert all(map(torch.equal, vars(average).values(), before))
    assert risk.square_sum.tolist() == [3.0, 5.0] and risk.gradient_sum.tolist() == [1.0, 2.0]


def test_without_a_pass_nothing_is_known() -> None:
    assert RiskAverage.empty(3, torch.tensor([2])).squares() is None


# Vectors: what their rows have in common counts in full --------------------------------------------------------------

gradients = st.lists(st.lists(st.floats(-10, 10), min_size=3, max_size=3), min_size=2, max_size=8)


@given(gradients, st.floats(0.05, 0.95), st.sampled_from([0.125, 0.25, 0.5, 1.0]))
def test_pairs_of_passes_tell_what_rows_have_in_common(
    passes: list[list[float]], smoothing: float, fraction: float
) -> None:
    """By hand: the weighted mean of inner products of gradients of different passes, within its bounds."""
    found = torch.tensor(passes, dtype=torch.float64) + torch.tensor([20.0, 0.0, 0.0])  # none is all zeros
    average = RiskAverage.empty(2, torch.tensor([1, 1, 1]))
    for gradient in found:
        average = average.after(
            figures([1.0, float(gradient.square().sum())], gradient, more_rows=1 / fraction - 1), smoothing
        )
    weights = [smoothing**age for age in range(len(found))][::-1]
    pairs = list(itertools.permutations(range(len(found)), 2))
    products = sum(weights[a] * weights[b] * float(found[a] @ found[b]) for a, b in pairs)
    mean = sum(w * float(g.square().sum()) for w, g in zip(weights, found, strict=True)) / sum(weights)
    common = min(max(products / sum(weights[a] * weights[b] for a, b in pairs), 0.0), mean)
    expected = torch.tensor([1.0, mean + (1 / fraction - 1) * common], dtype=torch.float64)
    torch.testing.assert_close(squares_of(average), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("common", [0.0, 0.5, 2.0], ids="common={}".format)
def test_a_quarter_of_the_rows_scores_as_the_whole_batch_does(common: float) -> None:
    """Rows of a matrix differ, those of a vector agree in a part: their scores must stand as over all 32 rows."""
    generator = torch.Generator().manual_seed(0)
    rows, taken, size = 32, 8, 400

    def gradient(number: int, shift: float) -> Tensor:
        draws = torch.randn(number, size, generator=generator, dtype=torch.float64)
        return (draws + shift * torch.linspace(-1, 1, size, dtype=torch.float64)).mean(0)

    whole = torch.tensor(
        [[float(gradient(rows, shift).square().sum()) for shift in (0.0, common)] for _ in range(200)],
        dtype=torch.float64,
    ).mean(0)
    average = RiskAverage.empty(2, torch.ones(size, dtype=torch.int64))
    for _ in range(300):
        matrix, vector = gradient(taken, 0.0), gradient(taken, common)
        average = average.after(figures([float(g.square().sum()) for g in (matrix, vector)], vector), 0.98)
    squares = squares_of(average)
    assert float(squares[1] / squares[0]) == pytest.approx(float(whole[1] / whole[0]), rel=0.05)
    if common == 2.0:  # by norms alone it would stand at a fraction of that
        assert float(average.linear[0, 1] / average.linear[0, 0]) < 0.5 * float(whole[1] / whole[0])


@pytest.mark.parametrize("passes", [1, 3])
def test_one_step_alone_has_no_pairs(passes: int) -> None:
    average = RiskAverage.empty(1, torch.zeros(2, dtype=torch.int64))
    gradient = torch.tensor([3.0, 4.0], dtype=torch.float64)
    for smoothing in (0.8, 0.0):  # nor has one that forgets all others
        average = average.after(
            figures([25.0 * passes], gradient * passes, finite=passes, more_rows=3 * passes), smoothing
        )
        assert float(squares_of(average)) == pytest.approx(25.0)
        average = RiskAverage.empty(1, torch.zeros(2, dtype=torch.int64)) if smoothing else average


@pytest.mark.parametrize(("more_rows", "expected"), [(6, 4.0), (3, 2.5), (0, 1.0)])
def test_passes_over_the_whole_batch_need_no_more_rows(more_rows: int, expected: float) -> None:
    """All gradients equal 1: a quarter of the rows says 4 times its square, the whole batch says it as it is."""
    average = RiskAverage.empty(1, torch.zeros(1, dtype=torch.int64))
    for _ in range(6):
        average = average.after(figures([2.0], torch.tensor([2.0]).double(), finite=2, more_rows=more_rows), 0.5)
    assert float(squares_of(average)) == pytest.approx(expected)


# Units that are vectors ----------------------------------------------------------------------------------------------


def owners_of(model: nn.Module) -> tuple[list[str], list[int]]:
    units = get_selector(model).units
    owners = get_selector(model).state.owners
    counts = torch.bincount(owners, minlength=len(units)).tolist()
    assert owners.tolist() == sorted(owners.tolist())
    return [unit.name for unit, count in zip(units, counts, strict=True) if count], [n for n in counts if n]


def test_norm_weights_are_vectors_and_matrices_are_not() -> None:
    model = tiny_bert()
    attach_rose(model, ROSEConfig(strategy="ensemble", risk_pass="sampled"))
    names, counts = owners_of(model)
    width = model.config.hidden_size
    assert len(names) == 4 and all("LayerNorm" in name for name in names) and counts == [width] * 4


@pytest.mark.parametrize("fields", [{"risk_pass": "paired"}, {"strategy": "second_order"}], ids=str)
def test_no_gradients_are_kept_where_no_pass_is_sampled(fields: dict[str, str]) -> None:
    model = tiny_bert()
    attach_rose(model, ROSEConfig(**fields))
    assert owners_of(model) == ([], [])


@pytest.mark.parametrize(("base", "all_vectors"), [(LoraConfig(task_type="SEQ_CLS"), False), (IA3Config(), True)])
def test_adapters(base: PeftConfig, all_vectors: bool) -> None:
    """LoRA's units have two matrices each, all of IA3's are vectors."""
    model = get_peft_model(tiny_bert(), base)
    attach_rose(model, ROSEConfig(strategy="first_order", risk_pass="sampled", dropout=0.1))
    names, _ = owners_of(model)
    assert len(names) == (len(get_selector(model).units) if all_vectors else 0)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    model(**batch(model)).loss.backward()
    optimizer.step()
    assert get_selector(model).state.risk_gradients.count_nonzero() > 0 or not all_vectors


def test_gradients_go_with_their_units() -> None:
    """As when adapters or layers come and go: "a" and "c" stay, "d" changes its size."""
    before = SelectionState(["a", "b", "c", "d"], [2, 9, 1, 1], [True, False, True, True])
    before.values["risk_gradients"].copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    after = SelectionState(["d", "c", "new", "a"], [2, 1, 1, 2], [True] * 4)
    after.continue_from(before.values)
    assert after.risk_gradients.tolist() == [0, 0, 3, 0, 1, 2]
    assert after.owners.tolist() == [0, 0, 1, 2, 3, 3]


def test_micro_batches_are_averaged() -> None:
    """The gradient that is kept is the mean over the passes of a step, as over processes."""
    found = []
    for micro in (1, 4):
        model = tiny_bert()
        selector = attach_rose(model, ROSEConfig(strategy="first_order", risk_pass="sampled"))
        passes = []
        for _ in range(micro):
            torch.manual_seed(0)
            model(**batch(model, size=8)).loss.backward()
            passes.append(figures_of(selector).gradient_sum)
        assert torch.allclose(passes[-1], micro * passes[0], rtol=1e-4, atol=0)
        torch.optim.AdamW(model.parameters(), 1e-3).step()
        found.append(selector.state.risk_gradients.clone())
    assert found[0].abs().max() > 0
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=0)


@pytest.mark.parametrize(("size", "expected"), [(1, 0.0), (2, 1.0), (3, 2.0), (8, 3.0), (10, 10 / 3 - 1)])
def test_how_many_more_rows_a_batch_has_is_counted_by_rows(size: int, expected: float) -> None:
    """Of few rows there is no quarter, and a single one is the whole batch."""
    model = tiny_bert()
    selector = attach_rose(model, ROSEConfig(strategy="first_order", risk_pass="sampled", risk_fraction=0.25))
    for seed in range(2):
        model(**batch(model, size=size, seed=seed)).loss.backward()
    assert figures_of(selector).more_rows == pytest.approx(2 * expected)
    assert figures_of(selector).whole == (2 if size == 1 else 0) and figures_of(selector).finite == 2


@pytest.mark.parametrize("to", ["sampled", "paired"])
def test_a_checkpoint_of_the_other_risk_pass_goes_on(to: str) -> None:
    """Its counts are taken over; the gradients of vectors, which one kind keeps and the other does not, are not."""
    kinds: list[Literal["sampled", "paired"]] = ["paired", "sampled"] if to == "sampled" else ["sampled", "paired"]
    saved: dict[str, Any] = {}
    for kind in kinds:
        model = tiny_bert()
        selector = attach_rose(model, ROSEConfig(strategy="first_order", risk_pass=kind))
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        if saved:
            optimizer.load_state_dict(saved)
        for seed in range(2):
            model(**batch(model, seed=seed)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        saved = optimizer.state_dict()
    assert selector.statistics().steps == 4
    assert len(selector.state.risk_gradients) == len(selector.state.owners)
    assert bool(selector.state.vectors.any()) == (to == "sampled")
    assert selector.state.last_mask.sum() < len(selector.units)
