"""The experimental scores, against their definitions."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from rose_peft import FirstOrder, ROSEConfig, get_selector
from tests.helpers.tiny import batch, tiny_bert
from tests.helpers.training import optimizer_of, step

pytest.importorskip("datasets")
from examples.benchmark.scorers import MomentumChange, block_of, kind_of, use_variant


def build(strategy: str, variant: str | None, seed: int = 0, **options: float) -> nn.Module:
    model = get_peft_model(tiny_bert(), ROSEConfig(task_type="SEQ_CLS", strategy=strategy, **options))
    if variant is not None:
        use_variant(model, variant, seed)
    return model


def masks_of(model: nn.Module, steps: int = 6) -> Tensor:
    optimizer = optimizer_of(model)
    torch.manual_seed(0)
    return torch.stack([step(model, optimizer, batch(model, seed=index)) for index in range(steps)])


def test_random_masks_keep_as_many_as_second_order_but_not_the_same() -> None:
    random, second = masks_of(build("second_order", "random")), masks_of(build("second_order", None))
    assert torch.equal(random.sum(dim=1), second.sum(dim=1)) and random[1:].mean() < 1
    assert not torch.equal(random, second)
    assert len({tuple(row) for row in random[1:].tolist()}) > 1  # every step draws anew
    assert torch.equal(random, masks_of(build("second_order", "random")))
    assert not torch.equal(random, masks_of(build("second_order", "random", seed=1)))


def test_random_masks_do_not_touch_the_global_generator() -> None:
    model = build("second_order", "random")
    optimizer = optimizer_of(model)
    step(model, optimizer, batch(model))
    model(**batch(model)).loss.backward()
    before = torch.get_rng_state()
    optimizer.step()
    assert torch.equal(torch.get_rng_state(), before)


def test_momentum_change_is_the_relative_change_of_the_momentum() -> None:
    model = build("second_order", "momentum_change", warmup_steps=99)  # masks 1: momenta are the optimizer's own
    selector = get_selector(model)
    optimizer = optimizer_of(model)
    step(model, optimizer, batch(model, seed=0))
    for index in range(1, 4):
        before = {id(p): optimizer.state[p]["exp_avg"].clone() for unit in selector.units for p in unit.parameters()}
        step(model, optimizer, batch(model, seed=index))
        for unit, score in zip(selector.units, selector.state.second_scores.tolist(), strict=True):
            changes = [(optimizer.state[p]["exp_avg"] - before[id(p)]).norm() for p in unit.parameters()]
            lengths = [before[id(p)].norm() for p in unit.parameters()]
            expected = math.hypot(*map(float, changes)) / math.hypot(*map(float, lengths))
            assert score == pytest.approx(expected, rel=1e-3)


def test_size_normalised_divides_by_the_root_of_the_size() -> None:
    scores = {}
    for variant in (None, "size_normalised"):
        model = build("first_order", variant, warmup_steps=99)
        torch.manual_seed(5)
        step(model, optimizer_of(model), batch(model))
        selector = get_selector(model)
        scores[variant] = selector.state.first_scores.clone()
    sizes = torch.tensor([float(sum(p.numel() for p in unit.parameters())) for unit in selector.units])
    assert sizes.unique().numel() > 1
    torch.testing.assert_close(scores["size_normalised"], scores[None] / sizes.sqrt())


def test_a_variant_takes_the_place_of_a_score_and_adds_no_hook() -> None:
    model = build("ensemble", None)
    selector = get_selector(model)
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    use_variant(model, "momentum_change", 0)
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert get_selector(model) is selector and type(selector.scores.second_order) is MomentumChange
    assert type(selector.scores.first_order) is FirstOrder


def test_another_adapter_is_steered_by_the_same_variant() -> None:
    model = build("second_order", "random")
    variant = get_selector(model).scores
    model.add_adapter("two", ROSEConfig(task_type="SEQ_CLS", strategy="second_order", upper_quantile=0.4))
    model.set_adapter("two")
    assert get_selector(model).scores is variant and get_selector(model).config.upper_quantile == 0.4


@pytest.mark.parametrize(("variant", "group"), [("block_wise", block_of), ("kind_wise", kind_of)])
def test_what_belongs_together_is_scored_as_one_tensor_and_frozen_together(
    variant: str, group: Callable[[str], str]
) -> None:
    scores: dict[str | None, tuple[Tensor, Tensor]] = {}
    for name in (None, variant):
        model = build("ensemble", name, warmup_steps=99)  # masks 1, so that both see the same gradients
        masks_of(model, steps=3)
        state = get_selector(model).state
        scores[name] = state.first_scores.clone(), state.second_scores.clone()
    names = [unit.name for unit in get_selector(model).units]
    groups = [group(name) for name in names]
    assert 1 < len(set(groups)) < len(names)
    (first, _), (first_together, second_together) = scores[None], scores[variant]
    for one in set(groups):
        members = torch.tensor([each == one for each in groups])
        torch.testing.assert_close(first_together[members], first[members].norm().expand(int(members.sum())))
        assert second_together[members].unique().numel() == 1
    masks = masks_of(build("second_order", variant, upper_quantile=0.4))[1:]
    for one in set(groups):
        members = [at for at, each in enumerate(groups) if each == one]
        assert (masks[:, members] == masks[:, members[:1]]).all()
    assert 0 < masks.mean() < 1


def test_blocks_and_kinds_are_told_by_names() -> None:
    assert block_of("bert.encoder.layer.11.output.dense.weight") == "bert.encoder.layer.11"
    assert block_of("mlp.experts.3.layers.2.w.weight") == "mlp.experts.3"
    assert kind_of("bert.encoder.layer.11.output.dense.weight") == "bert.encoder.layer.*.output.dense.weight"
    assert kind_of("layers.3.0.weight") == "layers.*.*.weight"
    assert block_of("head.weight") == kind_of("head.weight") == "head.weight"


def test_by_weight_waits_for_the_end_of_the_warm_up() -> None:
    model = build("second_order", "by_weight", warmup_steps=3)
    optimizer = optimizer_of(model)
    params = [param for unit in get_selector(model).units for param in unit.parameters()]
    moved = []
    for seed in range(5):
        before = [param.detach().clone() for param in params]
        step(model, optimizer, batch(model, seed=seed))
        moved.append(min(float((param != old).float().mean()) for param, old in zip(params, before, strict=True)))
    assert min(moved[:3]) > 0.9 and max(moved[3:]) < 0.8


def test_by_weight_freezes_the_numbers_that_are_far_from_their_momentum() -> None:
    model = build("second_order", "by_weight", upper_quantile=0.6)
    selector = get_selector(model)
    optimizer = optimizer_of(model)
    step(model, optimizer, batch(model, seed=0))  # momenta begin: nothing to compare with
    params = [param for unit in selector.units for param in unit.parameters()]
    before = [(param.detach().clone(), optimizer.state[param]["exp_avg"].clone()) for param in params]
    gradients: list[Tensor] = []
    handle = optimizer.register_step_pre_hook(lambda *_: gradients.extend(param.grad.clone() for param in params))
    mask = step(model, optimizer, batch(model, seed=1))
    handle.remove()
    assert (mask == 1).all()  # no unit as a whole
    for param, (old, momentum), gradient in zip(params, before, gradients, strict=True):
        scores = (0.1 * gradient.abs() / momentum.abs() - 1).abs()
        far = scores > scores.flatten().sort().values[round(0.6 * scores.numel()) - 1]
        assert 0.3 < far.float().mean() < 0.5
        assert torch.equal(param[far], old[far]) and (param[~far] != old[~far]).float().mean() > 0.9
