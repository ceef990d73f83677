"""Mixtures of experts: an expert that no token went to says nothing, and is taken neither for robust nor for risky."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from torch import nn

from rose_peft import ROSEConfig, RoseInactiveError, attach_rose, get_selector
from rose_peft.decision import Gathered
from tests.helpers import reference
from tests.helpers.experts import few_kinds, tiny_mixture
from tests.helpers.training import train_watched

FUSED = int(tf.__version__.split(".")[0]) >= 5
one_by_one = pytest.mark.skipif(FUSED, reason="transformers 5 keeps the experts of a layer in one tensor")
STEPS, UPPER = 6, 0.6
SAMPLED = {"risk_pass": "sampled", "risk_interval": 2, "risk_fraction": 0.5}
WAYS: dict[str, dict[str, Any]] = {
    "first order": {"strategy": "first_order"},
    "second order": {"strategy": "second_order"},
    "ensemble": {"strategy": "ensemble"},
    "first order, sampled": {"strategy": "first_order", **SAMPLED},
    "ensemble, sampled": {"strategy": "ensemble", **SAMPLED},
}


def expected_masks(risk: list[float], norms: list[float | None], momenta: list[float], strategy: str) -> list[float]:
    """The masks where units that say nothing are kept and move no threshold.

    Args:
        risk: Mean squared norms of the divergence gradients.
        norms: Of the gradients; None for a missing one.
        momenta: Norms of the momenta, zero where there is none.
        strategy: `ROSEConfig.strategy`.
    """
    absent = [norm is None for norm in norms]
    silent = [away or value == 0 for away, value in zip(absent, risk, strict=True)]
    first = reference.band([value**0.5 for value in risk], 0.0, UPPER, silent)[0]
    unknown = [not norm or momentum == 0 for norm, momentum in zip(norms, momenta, strict=True)]
    scores = [
        0.0 if out else reference.second_order_score(norm or 0.0, momentum)
        for norm, momentum, out in zip(norms, momenta, unknown, strict=True)
    ]
    second = reference.band(scores, 0.0, UPPER, unknown)[0]
    masks = {"first_order": first, "second_order": second, "ensemble": reference.mix(first, second, 0.5)}[strategy]
    return [0.0 if away else mask for away, mask in zip(absent, masks, strict=True)]


@one_by_one
@pytest.mark.parametrize("kind", ["mixtral", "olmoe"])
@pytest.mark.parametrize("way", WAYS)
def test_an_expert_without_tokens_is_kept_and_not_ranked(kind: str, way: str, monkeypatch) -> None:
    """Mixtral leaves out experts without tokens, whose gradient is None; OLMoE runs them on none, and it is zero."""
    model = tiny_mixture(kind)
    selector = attach_rose(model, ROSEConfig(task_type="CAUSAL_LM", upper_quantile=UPPER, **WAYS[way]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    seen: list[Gathered] = []
    decide = selector.decide
    monkeypatch.setattr(
        selector, "decide", lambda steered, gathered: decide(steered, seen.append(gathered) or gathered)
    )
    params = [param for unit in selector.units for param in unit.parameters()]
    assert len(params) == len(selector.units)
    silent = frozen = 0
    for step in range(STEPS):
        torch.manual_seed(step)
        model(**few_kinds(2, seed=step // 2)).loss.backward()
        norms = [None if param.grad is None else float(param.grad.double().norm()) for param in params]
        states = [optimizer.state.get(param, {}) for param in params]
        momenta = [float(state["exp_avg"].double().norm()) if state else 0.0 for state in states]
        before, scores = [param.detach().clone() for param in params], selector.state.second_scores.clone()
        optimizer.step()
        optimizer.zero_grad()
        risk = seen[-1].facts.risk
        risk = [0.0] * len(params) if risk is None else risk.tolist()
        masks = expected_masks(risk, norms, momenta, WAYS[way]["strategy"])
        assert selector.state.last_mask.tolist() == masks, step
        for param, old, mask in zip(params, before, masks, strict=True):
            assert torch.equal(param, old) == (mask == 0)
        without = [index for index, norm in enumerate(norms) if not norm]
        torch.testing.assert_close(selector.state.second_scores[without], scores[without], equal_nan=True)
        assert kind == "mixtral" or None not in norms
        silent += len(without)
        frozen += sum(mask == 0 and norm is not None for mask, norm in zip(masks, norms, strict=True))
    assert silent > STEPS and frozen > STEPS


@one_by_one
def test_what_an_expert_scored_stays_where_a_pass_does_not_reach_it() -> None:
    """With smoothing its average stays, so that it is ranked by that; without one ever its score is not known."""
    model = tiny_mixture()
    config = ROSEConfig(strategy="first_order", risk_pass="sampled", risk_interval=1, risk_fraction=1.0)
    selector = attach_rose(model, config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    found = []
    for seed in (0, 4):
        torch.manual_seed(seed)
        model(**few_kinds(1, seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append([unit.first_order_score for unit in selector.statistics().units.values()])
    reached = [{index for index, score in enumerate(scores) if score == score} for scores in found]
    assert reached[0] < reached[1] and len(reached[1]) < len(selector.units)
    assert 0 not in [*found[0], *found[1]]
    assert any(one == two for one, two in zip(*found, strict=True))


@one_by_one
@pytest.mark.parametrize("risk_pass", ["paired", "sampled"])
def test_few_experts_in_a_small_pass_are_no_alarm(risk_pass: str) -> None:
    """A row of one kind of tokens goes to 4 of 32 experts, while the batch goes to most of them."""
    model = tiny_mixture(experts=16)
    often = {"risk_interval": 1, "risk_fraction": 0.1} if risk_pass == "sampled" else {}
    selector = attach_rose(model, ROSEConfig(strategy="first_order", risk_pass=risk_pass, **often))
    rows = [few_kinds(1, seed, rows=1) for seed in range(12)]
    inputs = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    if risk_pass == "paired":  # another process's tokens leave gradients too, as DDP does
        inputs = {name: rows[:1] for name, rows in inputs.items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(2):
        torch.manual_seed(step)
        model(**inputs).loss.backward()
        for param in model.parameters():
            param.grad = torch.full_like(param, 1e-3) if param.grad is None else param.grad
        optimizer.step()
        optimizer.zero_grad()
    assert selector.statistics().steps == 2


@one_by_one
def test_reentrant_checkpointing_is_an_alarm_all_the_same() -> None:
    model = tiny_mixture()
    attach_rose(model, ROSEConfig(strategy="first_order"))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(RoseInactiveError, match="use_reentrant"):
        model(**few_kinds(2, 0)).loss.backward()
        torch.optim.AdamW(model.parameters()).step()


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("kind", ["mixtral", "olmoe"])
@pytest.mark.parametrize("way", ["ensemble", "ensemble, sampled"])
def test_masks_act_on_mixtures(kind: str, way: str, adapter: bool) -> None:
    """Also on the tensors that hold all experts of a layer, as transformers 5 has them."""
    model = tiny_mixture(kind)
    many = few_kinds(29, 0, rows=16, length=16)  # tokens for every expert, so that what is kept moves
    inner = adapter_config(model) if adapter else None
    wrapped = get_peft_model(model, ROSEConfig(task_type="CAUSAL_LM", base_config=inner, **WAYS[way]))
    masks = train_watched(wrapped, many, steps=4)
    assert any((mask == 0).any() for mask in masks)
    experts = [unit.name for unit in get_selector(wrapped).units if "experts" in unit.name]
    assert len(experts) == (2 * 2 if FUSED else 2 * 8 * 3)


def adapter_config(model: nn.Module) -> LoraConfig:
    if FUSED:
        parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        return LoraConfig(r=2, target_modules=["q_proj"], target_parameters=parameters)
    modules = ["q_proj", "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj"]
    return LoraConfig(r=2, target_modules=modules, lora_dropout=0.0)
