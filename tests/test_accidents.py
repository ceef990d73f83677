"""The accidents of the published implementation, each beside a small function that still has it.

Every check is run on both: ours must pass it and the old behaviour must fail it, or the check shows nothing. Numbers
in the names are those of section 5 of the reference.
"""

from __future__ import annotations

import copy
import math

import numpy
import pytest
import torch
from torch import Tensor, nn

from rose_peft import ROSEConfig, RoseInactiveError, attach_rose, masks
from rose_peft.divergence import logits_divergence
from rose_peft.outputs import logits_of
from tests.helpers import reference
from tests.helpers.blocks import Blocks, DropoutBlocks, set_gradients, weights
from tests.helpers.tiny import batch, tiny_bert
from tests.helpers.window import figures_of


def risk_gradients(model: nn.Module, call) -> tuple[Tensor, dict[str, Tensor]]:
    """Two passes; the mean loss, still with its graph, and the gradient of the divergence, computed on the spot."""
    named = dict(model.named_parameters())
    first, second = call(), call()
    value, _ = logits_divergence(logits_of(first), logits_of(second), {})
    grads = torch.autograd.grad(value, list(named.values()), retain_graph=True, allow_unused=True)
    return (first.loss + second.loss) / 2, dict(zip(named, grads, strict=True))


# 7: accumulation loses gradients ----------------------------------------------------------------------------------

MICRO_BATCHES = 3


def accumulate_ours(model: nn.Module) -> None:
    selector = attach_rose(model, ROSEConfig(strategy="first_order"))
    for micro in range(MICRO_BATCHES):
        torch.manual_seed(micro)
        (model(**batch(model, seed=micro)).loss / MICRO_BATCHES).backward()
    selector.detach()


def accumulate_as_published(model: nn.Module) -> None:
    for micro in range(MICRO_BATCHES):
        torch.manual_seed(micro)
        inputs = batch(model, seed=micro)
        loss, _ = risk_gradients(model, lambda inputs=inputs: model(**inputs))
        model.zero_grad()  # takes the divergence gradient away, and the task gradients with it
        (loss / MICRO_BATCHES).backward()


def gradients_of_all_micro_batches_count(accumulate) -> bool:
    model, twin = tiny_bert(), tiny_bert()
    accumulate(model)
    total = {name: torch.zeros_like(param) for name, param in twin.named_parameters()}
    for micro in range(MICRO_BATCHES):
        torch.manual_seed(micro)
        inputs = batch(twin, seed=micro)
        loss = (twin(**inputs).loss + twin(**inputs).loss) / 2 / MICRO_BATCHES
        for (name, _), grad in zip(twin.named_parameters(), torch.autograd.grad(loss, twin.parameters()), strict=True):
            total[name] += grad
    return all(
        torch.allclose(param.grad, total[name], rtol=1e-4, atol=1e-6) for name, param in model.named_parameters()
    )


def test_7_accumulation_keeps_all_gradients():
    assert gradients_of_all_micro_batches_count(accumulate_ours)
    assert not gradients_of_all_micro_batches_count(accumulate_as_published)


# 11: the mask vector is addressed by a running position -----------------------------------------------------------


def moved_by_name(model: Blocks, before: list[Tensor]) -> list[bool]:
    return [not torch.equal(param, old) for param, old in zip(weights(model), before, strict=True)]


def published_positions(mask: list[float], has_gradient: list[bool]) -> list[bool]:
    """Which tensors the published step updates: the position advances only for tensors with a gradient."""
    moved, position = [], 0
    for present in has_gradient:
        moved.append(present and mask[position] > 0)
        position += present
    return moved


def test_11_a_missing_gradient_does_not_shift_the_mask():
    model = DropoutBlocks(depth=6)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    selector = attach_rose(model, ROSEConfig(strategy="first_order", upper_quantile=0.5))
    torch.manual_seed(3)
    model(torch.randn(8, 3, dtype=torch.float64)).square().sum().backward()
    weights(model)[1].grad = None
    before = [param.detach().clone() for param in weights(model)]
    optimizer.step()
    has_gradient = [param.grad is not None for param in weights(model)]
    scores = selector.state.first_scores.tolist()
    mask, _ = reference.band(scores, 0.0, 0.5, [not present for present in has_gradient])
    wanted = [kept > 0 and present for kept, present in zip(mask, has_gradient, strict=True)]
    assert moved_by_name(model, before) == wanted

    published, _ = reference.published_band(scores, 0.0, 0.5)
    assert published_positions(published, [True] * 6) == [kept > 0 for kept in published]
    shifted = published_positions(published, has_gradient)
    right = [kept > 0 and present for kept, present in zip(published, has_gradient, strict=True)]
    assert shifted != right  # the same mask by name would have been another update
    selector.detach()


class SidePath(DropoutBlocks):
    """The last blocks serve an auxiliary loss only, so the logits do not depend on them."""

    aside = 1

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        cut = len(self.layers) - self.aside
        for layer in self.layers[:cut]:
            x = nn.functional.dropout(layer(x), 0.3, training=self.training)
        side = x
        for layer in self.layers[cut:]:
            side = layer(side)
        return {"loss": self.head(x).square().sum() + side.square().sum(), "logits": self.head(x)}


def test_11_a_unit_that_the_divergence_does_not_reach_is_kept_and_not_ranked():
    model = SidePath(depth=5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    selector = attach_rose(model, ROSEConfig(strategy="first_order", upper_quantile=0.7))
    torch.manual_seed(3)
    model(torch.randn(8, 3, dtype=torch.float64))["loss"].backward()
    optimizer.step()
    scores = selector.state.first_scores.tolist()
    assert math.isnan(scores[4]) and min(scores[:4]) > 0
    assert selector.state.last_mask.tolist() == [*reference.band(scores[:4], 0.0, 0.7)[0], 1.0]
    # The published rule would have ranked it as the most robust one, and moved the threshold for the others.
    assert reference.published_band([*scores[:4], 0.0], 0.0, 0.7)[0] != selector.state.last_mask.tolist()
    selector.detach()


def test_11_most_units_unreached_is_an_error():
    model = SidePath(depth=5)
    model.aside = 3
    selector = attach_rose(model, ROSEConfig(strategy="first_order", upper_quantile=0.5))
    model(torch.randn(8, 3, dtype=torch.float64))["loss"].backward()
    with pytest.raises(RoseInactiveError, match=r"3 of 5 units.*layers.2.linear.weight.*use_reentrant"):
        torch.optim.AdamW(model.parameters(), lr=0.01).step()
    selector.detach()


def test_11_state_of_some_units_only():
    """Units that join later have no optimizer state; the published score failed on the shapes."""
    model = Blocks(depth=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    selector = attach_rose(model, ROSEConfig(strategy="second_order", upper_quantile=0.5))
    set_gradients(model, 0)
    weights(model)[0].grad = None
    optimizer.step()
    momenta = [
        optimizer.state[param]["exp_avg"].norm().item() if optimizer.state[param] else 0.0 for param in weights(model)
    ]
    assert momenta[0] == 0
    set_gradients(model, 1)
    norms = [param.grad.norm().item() for param in weights(model)]
    optimizer.step()
    scores = [reference.second_order_score(g, m) for g, m in zip(norms, momenta, strict=True)]
    expected, _ = reference.band(scores, 0.0, 0.5, [m == 0 for m in momenta])
    assert selector.state.last_mask.tolist() == expected and expected[0] == 1

    with pytest.raises(RuntimeError, match="size"):  # as published: gradients of all, momenta of some
        torch.tensor(norms) / torch.tensor(momenta[1:])
    selector.detach()


# 12: zero momentum gives NaN thresholds, and everything freezes ---------------------------------------------------


@pytest.mark.parametrize("gradient", [1.0, 0.0], ids=["infinite score", "NaN score"])
@pytest.mark.parametrize("upper", [0.7, 1.0])
def test_12_zero_momentum_freezes_nobody(gradient, upper):
    model = Blocks(depth=5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    selector = attach_rose(model, ROSEConfig(strategy="second_order", upper_quantile=upper))
    set_gradients(model, 0)
    optimizer.step()
    optimizer.state[weights(model)[4]]["exp_avg"].zero_()
    set_gradients(model, 1)
    weights(model)[4].grad *= gradient
    norms = [(param.grad.norm().item(), optimizer.state[param]["exp_avg"].norm().item()) for param in weights(model)]
    optimizer.step()
    mask = selector.state.last_mask.tolist()
    assert mask[4] == 1  # or it would never get any momentum
    assert sum(mask[:4]) == (4 if upper == 1.0 else 3)
    assert selector.state.second_thresholds.isfinite().all()

    scores = [reference.second_order_score(*pair) for pair in norms]
    published, thresholds = reference.published_band(scores, 0.0, upper)
    poisoned = numpy.isnan(thresholds).any()
    assert poisoned == (gradient == 0.0 or upper == 1.0)
    if poisoned:
        assert sum(published) == 0
    selector.detach()


# 13: a NaN gradient poisons a frozen tensor -----------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD])
def test_13_a_bad_gradient_does_not_reach_a_frozen_unit(cls, bad):
    model = Blocks(depth=5)
    options = {"momentum": 0.9} if cls is torch.optim.SGD else {}
    optimizer = cls(model.parameters(), lr=0.01, weight_decay=0.1, **options)
    selector = attach_rose(model, ROSEConfig(strategy="second_order"))
    set_gradients(model, 0)
    optimizer.step()
    set_gradients(model, 1)
    frozen = weights(model)[2]
    frozen.grad[0, 0] = bad
    before = frozen.detach().clone()
    state = {
        key: value.clone() for key, value in optimizer.state[frozen].items() if key in ("exp_avg", "momentum_buffer")
    }
    optimizer.step()
    assert selector.state.last_mask[2] == 0 and selector.state.last_mask.sum() == 3
    assert torch.equal(frozen, before)
    for key, value in state.items():
        assert torch.equal(optimizer.state[frozen][key], value)
    assert all(value.isfinite().all() for value in optimizer.state[frozen].values() if isinstance(value, Tensor))
    # And it is fit for the next step.
    set_gradients(model, 2)
    optimizer.step()
    assert all(param.isfinite().all() for param in model.parameters())

    momentum = next(iter(state.values()))
    assert not (0 * frozen.new_tensor([bad]) + 1 * momentum).isfinite().any()  # the published blend
    selector.detach()


def test_13_first_order_freezes_without_looking_at_the_gradient():
    model = DropoutBlocks(depth=5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    selector = attach_rose(model, ROSEConfig(strategy="first_order", upper_quantile=0.5))
    torch.manual_seed(0)
    model(torch.randn(8, 3, dtype=torch.float64)).square().sum().backward()
    riskiest = int(figures_of(selector).square_sum.argmax())
    weights(model)[riskiest].grad.fill_(float("nan"))
    optimizer.step()
    assert selector.state.last_mask[riskiest] == 0
    assert all(param.isfinite().all() for param in model.parameters())
    selector.detach()


# 8, 9: data types -------------------------------------------------------------------------------------------------


def published_mask(norms: Tensor, upper: float) -> Tensor:
    """The published rule puts its levels in float32, whatever the dtype of the scores."""
    thresholds = torch.quantile(norms, torch.tensor([0.0, upper], dtype=torch.float32))
    return ((norms >= thresholds[0]) & (norms <= thresholds[1])).float()


@pytest.mark.parametrize("strategy", ["first_order", "second_order", "ensemble"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_8_9_every_dtype_trains(dtype, strategy):
    model = tiny_bert().to(dtype)
    before = copy.deepcopy(model.state_dict())
    # float16 has no 1e-8: epsilon must be one that it can hold.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)
    selector = attach_rose(model, ROSEConfig(strategy=strategy, upper_quantile=0.5))
    for step in range(3):
        torch.manual_seed(step)
        model(**batch(model, seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(param.isfinite().all() and param.dtype == dtype for param in model.parameters())
    share = selector.statistics().last_kept_share
    assert 0 < share < 1 and selector.statistics().skipped_risk_passes == 0
    frozen = [unit for unit, mask in zip(selector.units, selector.state.last_mask, strict=True) if mask == 0]
    assert frozen or strategy == "ensemble"
    assert not torch.equal(before["classifier.weight"], model.classifier.weight)

    with pytest.raises(RuntimeError):
        published_mask(torch.rand(8).to(dtype), 0.5)
    selector.detach()


# 8: the divergence is not scaled under fp16 autocast --------------------------------------------------------------


def tiny_divergence_model() -> nn.Module:
    """Little dropout and small weights: divergence gradients far below the smallest float16 number."""
    return tiny_bert(initializer_range=0.02, hidden_dropout_prob=0.02, attention_probs_dropout_prob=0.02)


def norms_in_float32(model: nn.Module) -> Tensor:
    selector = attach_rose(model, ROSEConfig(strategy="first_order"))
    torch.manual_seed(0)
    model(**batch(model))
    norms = figures_of(selector).square_sum.sqrt()
    selector.detach()
    return norms


def norms_unscaled(model: nn.Module) -> Tensor:
    """As published: half-precision divergence, no scale."""
    names = [unit.name for unit in attach_and_detach(model)]
    torch.manual_seed(0)
    inputs = batch(model)
    with torch.autocast("cpu", dtype=torch.float16):
        _, grads = risk_gradients(model, lambda: model(**inputs))
    return torch.stack([grads[name].norm() for name in names]).double()


def attach_and_detach(model: nn.Module) -> list:
    selector = attach_rose(model, ROSEConfig(strategy="first_order"))
    selector.detach()
    return selector.units


def norms_with_autocast_around_the_call(model: nn.Module) -> Tensor:
    selector = attach_rose(model, ROSEConfig(strategy="first_order"))
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.float16):
        model(**batch(model))
    norms = figures_of(selector).square_sum.sqrt()
    selector.detach()
    return norms


def norms_with_autocast_inside_the_call(model: nn.Module) -> Tensor:
    """As Accelerate does it: `forward` itself is wrapped, so hooks on the model run outside of autocast."""
    selector = attach_rose(model, ROSEConfig(strategy="first_order"))
    forward = model.forward
    model.forward = torch.autocast("cpu", dtype=torch.float16)(forward)
    torch.manual_seed(0)
    model(**batch(model))
    del model.forward
    norms = figures_of(selector).square_sum.sqrt()
    selector.detach()
    return norms


def ranked_as_in_float32(norms_of) -> bool:
    model = tiny_divergence_model()
    wanted, norms = norms_in_float32(model), norms_of(model)
    close = torch.allclose(norms, wanted, rtol=0.1, atol=0)
    ours, _ = masks.quantile_band(norms, 0.0, 0.5)
    theirs, _ = masks.quantile_band(wanted, 0.0, 0.5)
    return close and (ours != theirs).sum() <= 2


@pytest.mark.parametrize("norms_of", [norms_with_autocast_around_the_call, norms_with_autocast_inside_the_call])
def test_8_tiny_divergence_survives_fp16(norms_of):
    assert ranked_as_in_float32(norms_of)
    assert not ranked_as_in_float32(norms_unscaled)


def test_8_a_risk_pass_that_overflows_is_skipped_and_the_scale_comes_down():
    model = tiny_bert()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    selector = attach_rose(model, ROSEConfig(strategy="first_order", upper_quantile=0.5))

    def step(number: int) -> None:
        torch.manual_seed(number)
        with torch.autocast("cpu", dtype=torch.float16):
            loss = model(**batch(model, seed=number)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step(0)
    mask, scores = selector.state.last_mask.clone(), selector.state.first_scores.clone()
    assert 0 < mask.mean() < 1
    selector.state.risk_scale.fill_(2.0**24)
    step(1)
    assert selector.statistics().skipped_risk_passes == 1
    assert torch.equal(selector.state.last_mask, mask)  # the previous mask is kept
    assert torch.equal(selector.state.first_scores, scores)
    assert float(selector.state.risk_scale) == 2.0**23
    for number in range(2, 14):
        step(number)
    assert float(selector.state.risk_scale) < 2.0**22
    last = selector.statistics().skipped_risk_passes
    step(20)
    assert selector.statistics().skipped_risk_passes == last  # low enough now
    assert not torch.equal(selector.state.first_scores, scores)
    selector.detach()


# 16: masks mix with themselves when the optimizer steps twice -----------------------------------------------------


def test_16_stepping_twice_does_not_compound_the_mask():
    gamma = 0.3
    model = DropoutBlocks(depth=6)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    selector = attach_rose(model, ROSEConfig(strategy="ensemble", gamma=gamma, upper_quantile=0.5))
    allowed = set(reference.mix([0, 1, 0, 1], [0, 0, 1, 1], gamma))
    firsts, seen, published = [], set(), None
    published_values = set()
    torch.manual_seed(0)
    model(torch.randn(8, 3, dtype=torch.float64)).square().sum().backward()
    for _ in range(4):
        optimizer.step()
        firsts.append(selector.state.first_mask.tolist())
        seen |= set(selector.state.last_mask.tolist())
        # As published: the mix overwrites the stored first-order mask and is mixed again.
        second = masks.quantile_band(torch.nan_to_num(selector.state.second_scores, nan=0.0), 0.0, 0.5)[0]
        published = gamma * (selector.state.first_mask if published is None else published) + (1 - gamma) * second
        published_values |= set(published.tolist())
    assert selector.state.steps == 4
    assert all(first == firsts[0] for first in firsts) and set(firsts[0]) == {0.0, 1.0}
    assert seen <= allowed and len(seen) > 2
    close = torch.tensor(sorted(allowed))
    assert any(float((close - value).abs().min()) > 1e-3 for value in published_values)
    selector.detach()


# 2: the constant 0.1 ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta1", [0.5, 0.8, 0.9, 0.95])
def test_2_the_second_order_constant_is_read_from_the_optimizer(beta1):
    model = Blocks(depth=6)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, betas=(beta1, 0.98))
    selector = attach_rose(model, ROSEConfig(strategy="second_order", upper_quantile=0.5))
    for step in range(5):
        set_gradients(model, step, scale=1.0 + step)
        momenta = [optimizer.state[param]["exp_avg"].norm() if step else None for param in weights(model)]
        optimizer.step()
    ratios = [float(param.grad.norm() / m) for param, m in zip(weights(model), momenta, strict=True)]
    scores = [abs((1 - beta1) * ratio - 1) for ratio in ratios]
    assert selector.state.second_scores.tolist() == pytest.approx(scores, rel=1e-12)
    assert selector.state.last_mask.tolist() == reference.band(scores, 0.0, 0.5)[0]

    published = [abs(0.1 * ratio - 1) for ratio in ratios]
    assert (published == pytest.approx(scores, rel=1e-12)) == (beta1 == 0.9)
    selector.detach()


def test_2_a_changed_beta1_is_followed():
    """Schedules such as OneCycleLR change beta1 while training."""
    model = Blocks(depth=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    selector = attach_rose(model, ROSEConfig(strategy="second_order"))
    set_gradients(model, 0)
    optimizer.step()
    optimizer.param_groups[0]["betas"] = (0.6, 0.999)
    momenta = [optimizer.state[param]["exp_avg"].norm() for param in weights(model)]
    set_gradients(model, 1)
    optimizer.step()
    scores = [abs(0.4 * float(p.grad.norm() / m) - 1) for p, m in zip(weights(model), momenta, strict=True)]
    assert selector.state.second_scores.tolist() == pytest.approx(scores, rel=1e-12)
    selector.detach()
