"""The baselines' objectives, against their definitions, alone and under ROSE."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from rose_peft import ROSEConfig, get_selector
from tests.helpers.tiny import batch, tiny_bert

pytest.importorskip("datasets")
from examples.benchmark.objectives import FGM, RDrop, cross_entropy

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def gradients(model: nn.Module, objective: Any, seed: int = 3) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one call."""
    model.zero_grad()
    torch.manual_seed(seed)
    loss = objective(model, batch(model), lambda value: value.backward())
    assert not loss.requires_grad
    return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("alpha", [0.0, 0.7])
def test_r_drop_is_the_mean_loss_and_the_symmetric_divergence_of_two_passes(alpha: float) -> None:
    model = tiny_bert()
    loss, found = gradients(model, RDrop(alpha))
    model.zero_grad()
    torch.manual_seed(3)
    inputs = batch(model)
    doubled = model(**{name: torch.cat([value, value]) for name, value in inputs.items()})
    one, two = doubled.logits.chunk(2)
    assert not torch.equal(one, two)  # dropout made them different
    plain = (F.cross_entropy(one, inputs["labels"]) + F.cross_entropy(two, inputs["labels"])) / 2
    first, second = one.log_softmax(-1), two.log_softmax(-1)
    there = F.kl_div(first, second, reduction="batchmean", log_target=True)
    back = F.kl_div(second, first, reduction="batchmean", log_target=True)
    expected = plain + alpha * (there + back) / 2
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    assert_equal(found, {name: p.grad for name, p in model.named_parameters() if p.grad is not None})


def test_without_dropout_two_passes_are_the_plain_loss() -> None:
    model = tiny_bert(**NO_DROPOUT)
    plain, expected = gradients(model, cross_entropy)
    loss, found = gradients(model, RDrop(5.0))
    torch.testing.assert_close(loss, plain)
    assert_equal(found, expected)


def test_fgm_adds_the_gradient_at_embeddings_moved_by_epsilon_along_theirs() -> None:
    model = tiny_bert(**NO_DROPOUT)
    loss, found = gradients(model, FGM(0.5))
    model.zero_grad()
    inputs = batch(model)
    ids = inputs.pop("input_ids")
    words = model.get_input_embeddings()(ids)
    clean = model(inputs_embeds=words, **inputs).loss
    (slope,) = torch.autograd.grad(clean, words, retain_graph=True)
    shift = 0.5 * slope / slope.flatten(1).norm(dim=1)[:, None, None]
    attacked = model(inputs_embeds=model.get_input_embeddings()(ids) + shift, **inputs).loss
    assert attacked > clean
    (clean + attacked).backward()
    torch.testing.assert_close(loss, clean.detach())
    assert_equal(found, {name: p.grad for name, p in model.named_parameters() if p.grad is not None})


def test_fgm_leaves_no_hook_behind_even_if_a_pass_fails() -> None:
    model = tiny_bert()
    gradients(model, FGM(0.5))
    with pytest.raises(ZeroDivisionError):
        FGM(0.5)(model, batch(model), lambda loss: 1 / 0)
    assert not model.get_input_embeddings()._forward_hooks


@pytest.mark.parametrize("objective", [RDrop(1.0), FGM(0.5)], ids=["r_drop", "fgm"])
@pytest.mark.parametrize("base", ["full", "lora"])
def test_objectives_go_with_rose(objective: Any, base: str) -> None:
    lora = LoraConfig(r=4, target_modules=["query", "value"]) if base == "lora" else None
    model = get_peft_model(tiny_bert(), ROSEConfig(task_type="SEQ_CLS", base_config=lora))
    selector = get_selector(model)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    torch.manual_seed(0)
    for _ in range(4):
        before = {id(p): p.detach().clone() for p in model.parameters()}
        objective(model, batch(model), lambda loss: loss.backward())
        optimizer.step()
        optimizer.zero_grad()
        masks = selector.state.last_mask.tolist()
        for unit, mask in zip(selector.units, masks, strict=True):
            if mask == 0:
                assert all(torch.equal(p, before[id(p)]) for p in unit.parameters())
    assert 0 < selector.statistics().kept_share < 1
    assert selector.statistics().steps == 4
