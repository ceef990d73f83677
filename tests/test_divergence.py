"""The divergence of two outputs, per kind of head, against formulas written out."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from transformers.modeling_outputs import QuestionAnsweringModelOutput, SequenceClassifierOutput

from rose_peft import UnsupportedModelError
from rose_peft.divergence import divergence, logits_divergence
from rose_peft.outputs import head_kind, logits_of, loss_of, with_loss


def output_divergence(first, second, *facts):
    return logits_divergence(logits_of(first), logits_of(second), *facts)


def logits(*shape: int, seed: int = 0, grad: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(*shape, generator=generator, dtype=torch.float64)).requires_grad_(grad)


def symmetric_kl(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """[KL(P1 || P2) + KL(P2 || P1)] / 4 summed over rows, from torch's own KL divergence of distributions."""
    one, two = (torch.distributions.Categorical(logits=z) for z in (first, second))
    kl = torch.distributions.kl_divergence
    return (kl(one, two) + kl(two, one)).sum() / 4


def both(first, second, inputs=None, problem_type=None, causal=False) -> torch.Tensor:
    return output_divergence(first, second, inputs or {}, problem_type, causal)[0]


# Kinds of heads ---------------------------------------------------------------------------------------------------


@given(st.integers(1, 5), st.integers(2, 6), st.integers(0, 50))
def test_softmax(batch, classes, seed):
    one, two = logits(batch, classes, seed=seed), logits(batch, classes, seed=seed + 1000)
    torch.testing.assert_close(divergence(one, two, "softmax"), symmetric_kl(one, two))


def test_softmax_by_hand():
    one, two = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 0.0]])
    p = float(torch.sigmoid(torch.tensor(1.0)))
    # (1/2 - p) log(1/2 / p) + (1/2 - (1 - p)) log(1/2 / (1 - p)), over 4
    expected = ((0.5 - p) * torch.tensor(0.5 / p).log() + (p - 0.5) * torch.tensor(0.5 / (1 - p)).log()) / 4
    torch.testing.assert_close(divergence(one, two, "softmax"), expected)


def test_softmax_is_summed_over_the_batch():
    one, two = logits(3, 4), logits(3, 4, seed=1)
    rows = sum(float(divergence(one[i : i + 1], two[i : i + 1], "softmax")) for i in range(3))
    assert float(divergence(one, two, "softmax")) == pytest.approx(rows, rel=1e-12)


def test_classes_of_pixels_lie_in_the_second_dimension():
    one, two = logits(2, 4, 5, 3), logits(2, 4, 5, 3, seed=1)
    rows = symmetric_kl(one.reshape(-1, 3), two.reshape(-1, 3))
    torch.testing.assert_close(both(one.movedim(-1, 1), two.movedim(-1, 1)), rows)


def test_multi_label_is_one_bernoulli_variable_per_label():
    one, two = logits(3, 4), logits(3, 4, seed=1)
    first, second = (torch.distributions.Bernoulli(logits=z) for z in (one, two))
    kl = torch.distributions.kl_divergence
    expected = (kl(first, second) + kl(second, first)).sum() / 4
    torch.testing.assert_close(both(one, two, problem_type="multi_label_classification"), expected)
    assert not torch.isclose(expected, symmetric_kl(one, two))


def test_regression_is_the_mean_squared_difference():
    one, two = logits(5, 1), logits(5, 1, seed=1)
    expected = sum(float(a - b) ** 2 for a, b in zip(one, two, strict=True)) / 5
    assert float(both(one, two)) == pytest.approx(expected, rel=1e-12)  # one output is a regression
    several, others = logits(5, 3), logits(5, 3, seed=1)
    assert float(both(several, others, problem_type="regression")) == pytest.approx(
        float(((several - others) ** 2).mean()), rel=1e-12
    )


@pytest.mark.parametrize(
    "shape, problem_type, kind",
    [
        ((4, 3), None, "softmax"),
        ((4, 3), "single_label_classification", "softmax"),
        ((4, 1), None, "regression"),
        ((4, 3), "regression", "regression"),
        ((4, 3), "multi_label_classification", "multi_label"),
        ((4, 3, 2, 1), None, "softmax"),  # pictures one pixel wide
        ((4, 1, 2, 2), None, "multi_label"),
        ((4, 1, 2, 2), "regression", "regression"),
    ],
)
def test_head_kind(shape, problem_type, kind):
    assert head_kind(torch.zeros(shape), problem_type) == kind


@pytest.mark.parametrize("kind", ["softmax", "multi_label", "regression"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_compared_in_float32(kind, dtype):
    one, two = logits(3, 4).to(dtype), logits(3, 4, seed=1).to(dtype)
    value = divergence(one, two, kind)
    assert value.dtype == torch.float32
    assert torch.equal(value, divergence(one.float(), two.float(), kind))


@pytest.mark.parametrize("kind", ["softmax", "multi_label", "regression"])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_outputs_of_two_dtypes_are_compared_in_the_wider(kind, half):
    """An engine may cast what the user's own pass returns, and not what ours does."""
    one, two = logits(3, 4, seed=1).float(), logits(3, 4, seed=2).to(half)
    assert torch.equal(divergence(one, two, kind), divergence(one, two.float(), kind))
    assert torch.equal(divergence(two, one, kind), divergence(two.float(), one, kind))


@pytest.mark.parametrize("kind", ["softmax", "multi_label", "regression"])
def test_extreme_logits_stay_finite(kind):
    one = torch.tensor([[1e4, -1e4, 0.0]]).requires_grad_()
    two = torch.tensor([[-1e4, 1e4, 0.0]]).requires_grad_()
    value = divergence(one, two, kind)
    assert value.isfinite() and value > 0
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(value, [one, two]))


@given(st.sampled_from(["softmax", "multi_label", "regression"]), st.integers(0, 30))
def test_divergence_is_symmetric_not_negative_and_zero_only_for_equals(kind, seed):
    one, two = logits(3, 4, seed=seed), logits(3, 4, seed=seed + 99)
    value = divergence(one, two, kind)
    torch.testing.assert_close(value, divergence(two, one, kind), rtol=1e-12, atol=1e-15)
    assert value > 0 and divergence(one, one, kind) == 0


@pytest.mark.parametrize("kind", ["softmax", "multi_label", "regression"])
def test_gradient_flows_to_both_passes_through_both_arguments(kind):
    one, two = logits(3, 4, grad=True), logits(3, 4, seed=1, grad=True)
    torch.autograd.gradcheck(lambda a, b: divergence(a, b, kind), (one, two))
    grads = torch.autograd.grad(divergence(one, two, kind), [one, two])
    assert all(grad.abs().min() > 0 for grad in grads)
    # Each pass is in both logarithms: with a stopped argument the gradient would be another one.
    if kind == "softmax":
        p, log_p = F.softmax(one, -1), F.log_softmax(one, -1)
        log_q = F.log_softmax(two.detach(), -1)
        (stopped,) = torch.autograd.grad((p * (log_p - log_q)).sum() / 4, one)
        assert not torch.allclose(stopped, grads[0])


# What counts ------------------------------------------------------------------------------------------------------


def test_ignored_label_positions_do_not_count():
    one, two = logits(2, 5, 3, grad=True), logits(2, 5, 3, seed=1)
    labels = torch.tensor([[0, 1, -100, 2, -100], [-100, -100, 1, 0, 2]])
    value = both(one, two, {"labels": labels})
    counted = labels != -100
    torch.testing.assert_close(value, symmetric_kl(one[counted], two[counted]))
    (grad,) = torch.autograd.grad(value, one)
    assert grad[~counted].abs().max() == 0 and grad[counted].abs().min() > 0


def test_causal_positions_are_shifted():
    """The logits at position t predict the label at t + 1; the last ones predict nothing."""
    one, two = logits(2, 5, 7, grad=True), logits(2, 5, 7, seed=1)
    labels = torch.tensor([[-100, -100, 1, 0, 2], [3, -100, 1, 0, -100]])
    value = both(one, two, {"labels": labels}, causal=True)
    expected = sum(
        symmetric_kl(one[b, t : t + 1], two[b, t : t + 1])
        for b in range(2)
        for t in range(4)
        if labels[b, t + 1] != -100
    )
    torch.testing.assert_close(value, expected)
    (grad,) = torch.autograd.grad(value, one)
    assert grad[:, 4].abs().max() == 0


def test_padding_does_not_count_where_there_are_no_labels():
    one, two = logits(2, 4, 3), logits(2, 4, 3, seed=1)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    expected = symmetric_kl(one[mask.bool()], two[mask.bool()])
    torch.testing.assert_close(both(one, two, {"attention_mask": mask}), expected)
    # In an encoder-decoder the logits belong to the decoder.
    inputs = {"attention_mask": torch.ones(2, 9), "decoder_attention_mask": mask}
    torch.testing.assert_close(both(one, two, inputs), expected)


def test_everything_counts_where_nothing_tells():
    one, two = logits(2, 4, 3), logits(2, 4, 3, seed=1)
    torch.testing.assert_close(both(one, two), symmetric_kl(one.flatten(0, 1), two.flatten(0, 1)))
    # Labels of a sequence head say nothing about positions.
    one, two = logits(4, 3), logits(4, 3, seed=1)
    inputs = {"labels": torch.tensor([0, -100, 1, 2]), "attention_mask": torch.ones(4, 3)}
    torch.testing.assert_close(both(one, two, inputs), symmetric_kl(one, two))


def test_no_counted_position_is_no_divergence():
    one, two = logits(2, 4, 3, grad=True), logits(2, 4, 3, seed=1)
    value = both(one, two, {"labels": torch.full((2, 4), -100)})
    assert value == 0 and value.requires_grad


# Forms of outputs -------------------------------------------------------------------------------------------------


def test_forms_of_outputs_give_the_same():
    one, two, loss = logits(3, 4), logits(3, 4, seed=1), torch.tensor(1.0)
    expected = symmetric_kl(one, two)
    forms = [
        lambda z: z,
        lambda z: (z,),
        lambda z: (loss, z),
        lambda z: (loss, z, (torch.ones(2, 2),)),
        lambda z: {"logits": z},
        lambda z: {"loss": loss, "logits": z, "hidden_states": (torch.ones(3),)},
        lambda z: SequenceClassifierOutput(loss=loss, logits=z),
    ]
    for form in forms:
        torch.testing.assert_close(both(form(one), form(two)), expected)


def test_question_answering_adds_start_and_end():
    one = QuestionAnsweringModelOutput(start_logits=logits(2, 6), end_logits=logits(2, 6, seed=1))
    two = QuestionAnsweringModelOutput(start_logits=logits(2, 6, seed=2), end_logits=logits(2, 6, seed=3))
    expected = symmetric_kl(one.start_logits, two.start_logits) + symmetric_kl(one.end_logits, two.end_logits)
    # Positions are the classes here, so an attention mask of the same shape must not take rows out.
    torch.testing.assert_close(
        both(one, two, {"attention_mask": torch.tensor([[1] * 6, [1] * 3 + [0] * 3])}), expected
    )


@pytest.mark.parametrize(
    "output",
    [{"last_hidden_state": torch.ones(2, 2)}, {"logits": None}, (torch.tensor(1.0),), SimpleNamespace(x=1), None],
    ids=["hidden", "none", "loss only", "object", "nothing"],
)
def test_an_output_without_logits_is_refused(output):
    with pytest.raises(UnsupportedModelError, match=r"logits.*second_order"):
        logits_of(output)


def test_equal_outputs_are_noticed():
    one = SequenceClassifierOutput(logits=logits(3, 4))
    other = SequenceClassifierOutput(logits=one.logits.clone())
    assert output_divergence(one, other, {}, None, False)[1]
    other.logits[2, 3] += 1e-12
    assert not output_divergence(one, other, {}, None, False)[1]
    # All heads have to be equal.
    same, one_seed, other_seed = torch.ones(2, 6), logits(2, 6), logits(2, 6, seed=1)
    for first, second in (
        ((same, one_seed), (same, other_seed)),
        ((one_seed, same), (other_seed, same)),
    ):
        spans = [QuestionAnsweringModelOutput(start_logits=s, end_logits=e) for s, e in (first, second)]
        assert not output_divergence(*spans, {}, None, False)[1]


def test_loss_of_and_with_loss():
    loss, new = torch.tensor(1.0), torch.tensor(2.0)
    assert loss_of(logits(3, 4)) is None and loss_of((logits(3, 4),)) is None and loss_of({"logits": 1}) is None
    assert loss_of((loss, logits(3, 4))) is loss and loss_of({"loss": loss}) is loss
    output = SequenceClassifierOutput(loss=loss, logits=logits(3, 4))
    assert loss_of(output) is loss and with_loss(output, new) is output
    assert output.loss is new and output["loss"] is new and output[0] is new
    changed = with_loss((loss, "rest"), new)
    assert changed == (new, "rest") and changed[0] is new


# Equal but for rounding -------------------------------------------------------------------------------------------

MASKS = [float("-inf"), torch.finfo(torch.float32).min, -1e30, -1e4]


@pytest.mark.parametrize("mask", MASKS)
def test_masked_logits_do_not_make_all_others_equal(mask: float) -> None:
    one = torch.tensor([[1.0, -2.0, mask], [0.5, mask, 3.0]])
    for change, expected in ((0.0, True), (1e-6, True), (1e-3, False)):
        two = torch.where(one > -100, one + change, one)
        assert bool(logits_divergence([one], [two], {}, rounding=2**-17)[1]) == expected
        assert bool(logits_divergence([one], [two], {})[1]) == (change == 0)


def test_nothing_equals_nan_and_large_targets_are_compared_one_by_one() -> None:
    nan = torch.tensor([[float("nan"), 1.0]])
    assert not logits_divergence([nan], [nan], {}, rounding=2**-17)[1]
    one = torch.tensor([[5e4], [2e3]])
    assert logits_divergence([one], [one * (1 + 1e-6)], {}, rounding=2**-17)[1]
    assert not logits_divergence([one], [one + torch.tensor([[0.0], [0.1]])], {}, rounding=2**-17)[1]
