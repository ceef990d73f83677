"""RoseSelector: the window of risk passes, the hooks, the state, and what is refused."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import math
import pickle
import subprocess
import sys
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from rose_peft import (
    AlreadyAttachedError,
    ROSEConfig,
    RoseConfigError,
    RoseError,
    RoseInactiveError,
    TargetModulesError,
    UnsupportedModelError,
    attach_rose,
    detach_rose,
    get_selector,
    hooks,
    masks,
    risk,
)
from rose_peft import state as statistics_module
from rose_peft import watchdog as watchdog_module
from rose_peft.decision import Decision
from rose_peft.state import SelectionState
from tests.helpers import reference
from tests.helpers.blocks import DropoutBlocks
from tests.helpers.held import held_tensors
from tests.helpers.steps import STRATEGIES, adamw, config, train_step
from tests.helpers.tiny import batch, tiny_bert
from tests.helpers.window import figures_of


def norms_of_one_pass(model: nn.Module, inputs: dict[str, Tensor], seed: int) -> list[float]:
    """Norms per unit of the divergence gradient, from scratch: two calls, the formula, autograd."""
    selector = attach_rose(model, config())
    units = {unit.name: index for index, unit in enumerate(selector.units)}
    selector.detach()
    torch.manual_seed(seed)
    one, two = (model(**inputs).logits for _ in range(2))
    p, q = one.log_softmax(-1), two.log_softmax(-1)
    value = ((p.exp() - q.exp()) * (p - q)).sum() / 4
    named = dict(model.named_parameters())
    grads = torch.autograd.grad(value, [named[name] for name in units], allow_unused=True)
    return [float(grad.norm()) for grad in grads]


# The window -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batches", [1, 2, 5])
def test_accumulation_ranks_by_the_root_mean_square(micro_batches):
    norms = [norms_of_one_pass(tiny_bert(), batch(tiny_bert(), seed=m), seed=m) for m in range(micro_batches)]
    model = tiny_bert()
    optimizer = adamw(model)
    selector = attach_rose(model, config("first_order"))
    for micro in range(micro_batches):
        torch.manual_seed(micro)
        (model(**batch(model, seed=micro)).loss / micro_batches).backward()
    optimizer.step()
    scores = [math.sqrt(sum(n[i] ** 2 for n in norms) / micro_batches) for i in range(len(selector.units))]
    assert selector.state.first_scores.tolist() == pytest.approx(scores, rel=1e-5)
    assert selector.state.last_mask.tolist() == reference.band(scores, 0.0, 0.5)[0]


def test_one_big_batch_and_micro_batches_give_the_same_gradients():
    """Dropout must be the same in both, so it is a fixed pattern that differs between passes only."""

    class Pattern(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            kept = torch.arange(x.shape[-1]) % 5 != self.calls % 2
            return x * kept

    def run(parts: int) -> tuple[list[Tensor], list[Tensor]]:
        model = tiny_bert()
        model.dropout = Pattern()  # type: ignore[assignment]
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        selector = attach_rose(model, config())
        inputs = batch(model, size=8)
        for part in range(parts):
            piece = {key: value.chunk(parts)[part] for key, value in inputs.items()}
            (model(**piece).loss / parts).backward()
        selector.detach()
        return [p.grad for p in model.parameters()]

    for whole, parts in zip(run(1), run(4), strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-6)


def scores_after(actions) -> list[float]:
    """First-order scores of one step after whatever `actions(model, optimizer)` did before its forward pass."""
    model = tiny_bert()
    optimizer = adamw(model)
    selector = attach_rose(model, config("first_order"))
    actions(model, optimizer)
    torch.manual_seed(7)
    model(**batch(model, seed=7)).loss.backward()
    optimizer.step()
    assert selector.statistics().steps == 1
    return selector.state.first_scores.tolist()


@pytest.mark.parametrize("set_to_none", [True, False])
def test_discarded_gradients_take_their_risk_passes_along(set_to_none):
    def discard(model, optimizer):
        torch.manual_seed(1)
        model(**batch(model, seed=1)).loss.backward()
        optimizer.zero_grad(set_to_none=set_to_none)

    def keep(model, optimizer):
        torch.manual_seed(1)
        model(**batch(model, seed=1)).loss.backward()

    untouched = scores_after(lambda model, optimizer: None)
    assert scores_after(discard) == untouched
    assert scores_after(keep) != untouched  # the same pass counts where its gradients do


@pytest.mark.parametrize("through", ["loss", "logits"])
def test_discarded_gradients_are_noticed_whatever_the_loss_was_made_of(through):
    """Label smoothing and distillation make their own loss from the logits, beside the one of the model."""

    def discard(model, optimizer):
        torch.manual_seed(1)
        output = model(**batch(model, seed=1))
        (output.loss if through == "loss" else output.logits.square().sum()).backward()
        optimizer.zero_grad()

    assert scores_after(discard) == scores_after(lambda model, optimizer: None)


def test_passes_without_training_do_nothing():
    def look(model, optimizer):
        model.eval()
        model(**batch(model, seed=1))
        model.train()
        with torch.no_grad():
            model(**batch(model, seed=1))
        with torch.inference_mode():
            model(**batch(model, seed=1))

    assert scores_after(look) == scores_after(lambda model, optimizer: None)


def test_evaluation_is_one_pass_with_the_plain_loss():
    model, plain = tiny_bert(), tiny_bert()
    attach_rose(model, config())
    calls = []
    model.bert.register_forward_hook(lambda *args: calls.append(1))
    model.eval()
    plain.eval()
    with torch.no_grad():
        one, two = model(**batch(model)), plain(**batch(model))
    assert len(calls) == 1 and torch.equal(one.loss, two.loss) and torch.equal(one.logits, two.logits)
    with torch.enable_grad():
        model(**batch(model)).loss.backward()
    assert len(calls) == 2
    model.train()
    model(**batch(model))
    assert len(calls) == 4


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_random_numbers_are_those_of_one_more_pass(strategy):
    model, plain = tiny_bert(), tiny_bert()
    selector = attach_rose(model, config(strategy))
    torch.manual_seed(0)
    model(**batch(model)).loss.backward()
    state = torch.get_rng_state()
    torch.manual_seed(0)
    for _ in range(2 if selector.config.needs_risk_pass else 1):
        plain(**batch(model))
    assert torch.equal(state, torch.get_rng_state())
    adamw(model).step()
    assert torch.equal(state, torch.get_rng_state())


def test_the_loss_is_the_mean_over_both_passes_and_the_logits_are_those_of_the_first():
    model, plain = tiny_bert(), tiny_bert()
    attach_rose(model, config())
    torch.manual_seed(0)
    output = model(**batch(model))
    torch.manual_seed(0)
    first, second = plain(**batch(model)), plain(**batch(model))
    assert torch.equal(output.loss, (first.loss + second.loss) / 2) and not torch.equal(first.loss, second.loss)
    assert torch.equal(output.logits, first.logits)
    output.loss.backward()
    ((first.loss + second.loss) / 2).backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-7)


def test_second_order_trains_on_the_loss_of_its_only_pass():
    model, plain = tiny_bert(), tiny_bert()
    attach_rose(model, config("second_order"))
    torch.manual_seed(0)
    output = model(**batch(model))
    torch.manual_seed(0)
    assert torch.equal(output.loss, plain(**batch(model)).loss)


def test_a_tuple_output_gets_the_mean_loss_too():
    model, plain = tiny_bert(), tiny_bert()
    attach_rose(model, config())
    torch.manual_seed(0)
    loss, logits = model(**batch(model), return_dict=False)
    torch.manual_seed(0)
    losses = [plain(**batch(model)).loss for _ in range(2)]
    assert torch.equal(loss, sum(losses) / 2) and logits.shape == (4, 2)


def test_no_gradient_is_touched_by_the_risk_pass():
    model = tiny_bert()
    attach_rose(model, config())
    kept = {name: torch.randn_like(param) for name, param in model.named_parameters()}
    for name, param in model.named_parameters():
        param.grad = kept[name]
    copies = {name: grad.clone() for name, grad in kept.items()}
    model(**batch(model))
    for name, param in model.named_parameters():
        assert param.grad is kept[name] and torch.equal(param.grad, copies[name])


def test_a_non_finite_risk_pass_is_skipped_counted_and_the_last_mask_kept():
    model = tiny_bert()
    optimizer = adamw(model)
    selector = attach_rose(model, config("first_order"))
    train_step(model, optimizer, 0)
    mask, scores = selector.state.last_mask.clone(), selector.state.first_scores.clone()
    genuine = risk.logits_divergence
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(risk, "logits_divergence", lambda *args: (genuine(*args)[0] * math.nan, torch.tensor(False)))
        train_step(model, optimizer, 1)
    assert selector.statistics().skipped_risk_passes == 1 and selector.statistics().steps == 2
    assert torch.equal(selector.state.last_mask, mask) and torch.equal(selector.state.first_scores, scores)
    train_step(model, optimizer, 2)
    assert selector.statistics().skipped_risk_passes == 1
    assert not torch.equal(selector.state.first_scores, scores)


def test_one_non_finite_pass_of_several_is_left_out_of_the_mean():
    """Three micro-batches, the middle one bad: the score is the mean over the two good ones."""
    norms = [norms_of_one_pass(tiny_bert(), batch(tiny_bert(), seed=m), seed=m) for m in (0, 2)]
    model = tiny_bert()
    optimizer = adamw(model)
    selector = attach_rose(model, config("first_order"))
    genuine = risk.logits_divergence
    for micro in range(3):
        torch.manual_seed(micro)
        with pytest.MonkeyPatch.context() as patch:
            if micro == 1:
                patch.setattr(risk, "logits_divergence", lambda *a: (genuine(*a)[0] * math.inf, torch.tensor(False)))
            model(**batch(model, seed=micro)).loss.backward()
    optimizer.step()
    scores = [math.sqrt((a**2 + b**2) / 2) for a, b in zip(*norms, strict=True)]
    assert selector.state.first_scores.tolist() == pytest.approx(scores, rel=1e-5)
    assert selector.statistics().skipped_risk_passes == 1


@pytest.mark.parametrize("task_type", [None, "SEQ_CLS"])
@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_peft_models_have_exactly_one_risk_pass(adapter, task_type):
    """PeftModel calls tuner or model, with or without their hooks, by version and task type."""
    lora = LoraConfig(target_modules=["query"], lora_dropout=0.1) if adapter == "lora" else None
    model = get_peft_model(tiny_bert(), config("first_order", base_config=lora, task_type=task_type))
    calls = []
    encoder = model.get_base_model().bert.encoder
    encoder.register_forward_hook(lambda *args: calls.append(1))
    optimizer = torch.optim.AdamW([param for param in model.parameters() if param.requires_grad])
    for step in range(3):
        inputs = batch(model.get_base_model(), seed=step)
        model(**inputs).loss.backward()
        assert len(calls) == 2 * (step + 1)
        assert figures_of(get_selector(model)).finite == 1
        optimizer.step()
        optimizer.zero_grad()
    assert get_selector(model).statistics().steps == 3


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_warm_up_updates_everything(strategy):
    model, plain = tiny_bert(), tiny_bert()
    optimizer, plain_optimizer = adamw(model), adamw(plain)
    selector = attach_rose(model, config(strategy, warmup_steps=2))
    shares = []
    for step in range(4):
        train_step(model, optimizer, step)
        shares.append(float(selector.state.last_mask.mean()))
        if strategy == "second_order":  # one pass, so that plain training is the same
            train_step(plain, plain_optimizer, step)
            same = all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
            assert same == (step < 2)
    assert shares[:2] == [1, 1] and all(share < 1 for share in shares[2:])


# What is refused --------------------------------------------------------------------------------------------------


def test_no_dropout_is_an_error_with_the_way_out():
    model = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    attach_rose(model, config("first_order"))
    with pytest.raises(RoseInactiveError, match=r"dropout=None.*ROSEConfig\(dropout=0.1\)"):
        train_step(model, adamw(model), 0)


def test_second_order_needs_no_dropout():
    model = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    selector = attach_rose(model, config("second_order"))
    optimizer = adamw(model)
    for step in range(3):
        train_step(model, optimizer, step)
    assert 0 < selector.statistics().last_kept_share < 1


def test_equal_outputs_for_a_long_time_are_an_error_even_with_dropout():
    """Dropout where the logits do not see it."""
    model = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model.extra = nn.Dropout(0.5)  # type: ignore[assignment]
    attach_rose(model, config("first_order"))
    optimizer = adamw(model)
    with pytest.raises(RoseInactiveError, match="both passes gave the same output"):
        for step in range(watchdog_module.IDLE_STEPS + 1):
            train_step(model, optimizer, step)
    assert step == watchdog_module.IDLE_STEPS


@pytest.mark.parametrize("how", ["inner model", "eval mode", "no hook"])
def test_a_bypassed_hook_is_an_error(how):
    model = tiny_bert()
    optimizer = adamw(model)
    attach_rose(model, config("first_order"))
    inputs = batch(model)
    if how == "eval mode":
        loss = model.eval()(**inputs).loss
    elif how == "inner model":
        labels = inputs.pop("labels")
        loss = nn.functional.cross_entropy(model.classifier(model.bert(**inputs).pooler_output), labels)
    else:
        loss = model.forward(**inputs).loss
    loss.backward()
    with pytest.raises(RoseInactiveError, match="no training pass went through the model"):
        optimizer.step()


def test_a_hook_bypassed_later_is_noticed_too():
    model = tiny_bert()
    optimizer = adamw(model)
    attach_rose(model, config("first_order"))
    train_step(model, optimizer, 0)
    model.forward(**batch(model)).loss.backward()
    with pytest.raises(RoseInactiveError, match="no training pass"):
        optimizer.step()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_optimizer_that_never_holds_the_units_is_an_error(strategy):
    model = tiny_bert()
    attach_rose(model, config(strategy))
    shadow = [nn.Parameter(param.detach().clone()) for param in model.parameters()]
    optimizer = torch.optim.SGD(shadow, lr=0.1)
    with pytest.raises(RoseInactiveError, match=r"change from one training pass to the next.*model.parameters"):
        for step in range(30):
            torch.manual_seed(step)
            model(**batch(model)).loss.backward()
            for param, copied in zip(model.parameters(), shadow, strict=True):
                copied.grad = param.grad
            optimizer.step()
            with torch.no_grad():
                for param, copied in zip(model.parameters(), shadow, strict=True):
                    param.copy_(copied)
            model.zero_grad()
    assert step <= 25


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_model_left_behind_does_not_disturb_another_one(strategy):
    left = tiny_bert()
    left_selector = attach_rose(left, config(strategy))
    optimizer = adamw(left)
    train_step(left, optimizer, 0)
    left(**batch(left)).loss.backward()  # gradients and a window that nobody will ever use
    model = tiny_bert()
    selector = attach_rose(model, config(strategy))
    optimizer = adamw(model)
    for step in range(20 + 5):
        train_step(model, optimizer, step)
    assert selector.statistics().steps == 20 + 5
    assert left_selector.statistics().steps == 1


def test_two_models_train_side_by_side():
    def run(together: bool) -> list[Tensor]:
        models = [tiny_bert(seed=0), tiny_bert(seed=1)]
        optimizers = []
        for model in models:
            attach_rose(model, config())
            optimizers.append(adamw(model))
        order = [(0, s) for s in range(3)] + [(1, s) for s in range(3)]
        for index, step in sorted(order, key=lambda pair: pair[1]) if together else order:
            train_step(models[index], optimizers[index], step)
        return [param.detach() for model in models for param in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(run(True), run(False), strict=True))


def test_reentrant_checkpointing_is_refused_and_the_other_kind_works():
    model = tiny_bert()
    plain = tiny_bert()
    selector, wanted = attach_rose(model, config("first_order")), attach_rose(plain, config("first_order"))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for one in (model, plain):
        torch.manual_seed(0)
        one(**batch(one)).loss.backward()
        adamw(one).step()
    torch.testing.assert_close(selector.state.first_scores, wanted.state.first_scores, rtol=1e-4, atol=0)
    assert torch.equal(selector.state.last_mask, wanted.state.last_mask)

    model = tiny_bert()
    attach_rose(model, config("first_order"))
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(RoseInactiveError, match="use_reentrant': False"):
        train_step(model, adamw(model), 0)


def test_an_output_without_logits_is_an_error():
    model = tiny_bert()
    encoder = model.bert
    attach_rose(encoder, config("first_order"))
    inputs = {key: value for key, value in batch(model).items() if key != "labels"}
    with pytest.raises(UnsupportedModelError, match=r"no logits.*second_order"):
        encoder(**inputs)
    detach_rose(encoder)
    attach_rose(encoder, config("second_order"))
    encoder(**inputs).pooler_output.sum().backward()


def test_logits_without_gradient_are_an_error():
    model = tiny_bert()
    genuine = model.forward

    def forward(**kwargs):
        output = genuine(**kwargs)
        output.logits = output.logits.detach()
        return output

    model.forward = forward
    attach_rose(model, config("first_order"))
    with pytest.raises(UnsupportedModelError, match="do not depend on any trainable parameter"):
        model(**batch(model))


def test_attaching_twice_is_an_error_and_changes_nothing():
    model = tiny_bert()
    selector = attach_rose(model, config())
    with pytest.raises(AlreadyAttachedError, match="detach_rose"):
        attach_rose(model, config(dropout=0.5))
    assert get_selector(model) is selector and model.dropout.p == 0.1
    wrapped = get_peft_model(tiny_bert(), config())
    with pytest.raises(AlreadyAttachedError):
        attach_rose(wrapped, config())
    lora = get_peft_model(tiny_bert(), config(base_config=LoraConfig(target_modules=["query"])))
    with pytest.raises(AlreadyAttachedError):
        attach_rose(lora, config())


def test_a_model_without_blocks_is_an_error():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with pytest.raises(TargetModulesError, match=r"target_modules.*Candidates|candidates"):
        attach_rose(model, config())


def test_detaching_what_is_not_attached_is_an_error():
    model = tiny_bert()
    with pytest.raises(RoseError, match="not attached"):
        detach_rose(model)
    attach_rose(model, config())
    detach_rose(model)
    with pytest.raises(RoseError, match="not attached"):
        get_selector(model)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"strategy": "third_order"}, "strategy='third_order'.*first_order, second_order, ensemble"),
        ({"upper_quantile": 70}, r"upper_quantile=70.*\[0, 1\].*70 percent is 0.7"),
        ({"upper_quantile": 1.5}, r"upper_quantile=1.5"),
        ({"lower_quantile": -0.1}, r"lower_quantile=-0.1"),
        ({"lower_quantile": 0.7, "upper_quantile": 0.7}, "lower_quantile=0.7 must be below upper_quantile=0.7"),
        ({"gamma": 2.0}, "gamma=2.0"),
        ({"gamma": math.nan}, "gamma=nan"),
        ({"warmup_steps": -1}, "warmup_steps=-1"),
        ({"warmup_steps": 1.5}, "warmup_steps=1.5"),
        ({"dropout": 0.0}, r"dropout=0.0.*\(0, 1\)"),
        ({"dropout": 1.0}, r"dropout=1.0"),
        ({"dropout": True}, r"dropout=True"),
    ],
)
def test_bad_values_are_named(options, message):
    with pytest.raises(RoseConfigError, match=message):
        ROSEConfig(**options)


# Taking it off ----------------------------------------------------------------------------------------------------


def inventory(model: nn.Module) -> dict[str, object]:
    """Everything of a model that attaching could change."""
    found: dict[str, object] = {}
    for name, module in model.named_modules():
        hooks = {k: len(v) for k, v in module.__dict__.items() if "hooks" in k and isinstance(v, dict)}
        plain = {k: v for k, v in module.__dict__.items() if isinstance(v, (int, float, str, bool))}
        found[name] = (type(module), hooks, plain, sorted(module.__dict__))
    for name, param in model.named_parameters():
        found[name + "!"] = (id(param), param.requires_grad, param._version, len(param._backward_hooks or {}))
    return found


@pytest.mark.parametrize("dropout", [None, 0.3])
def test_attach_and_detach_100_times_leaves_no_trace(dropout):
    model = tiny_bert()
    model.bert.embeddings.requires_grad_(False)
    before, state = inventory(model), copy.deepcopy(model.state_dict())
    live = count_global_hooks()[2]
    for _ in range(100):
        attach_rose(model, config(dropout=dropout))
        detach_rose(model)
    assert inventory(model) == before
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    pre, post, still_live = count_global_hooks()
    assert pre == post <= 1 and still_live == live
    attach_rose(model, config(dropout=dropout))
    assert inventory(model) != before
    assert model.dropout.p == (0.1 if dropout is None else 0.3)
    detach_rose(model)


def count_global_hooks() -> tuple[int, int, int]:
    from torch.optim import optimizer

    gc.collect()  # selectors of models that are gone
    pre, post = optimizer._global_optimizer_pre_hooks, optimizer._global_optimizer_post_hooks
    return len(pre), len(post), len(hooks._observers)


def test_any_number_of_models_has_one_pair_of_optimizer_hooks():
    models = [tiny_bert() for _ in range(5)]
    for model in models:
        attach_rose(model, config())
    pre, post, live = count_global_hooks()
    assert (pre, post) == (1, 1) and live >= 5
    for model in models:
        detach_rose(model)


def test_a_detached_model_trains_as_if_nothing_had_been():
    def run(attach: bool) -> list[Tensor]:
        model = tiny_bert()
        optimizer = adamw(model)
        if attach:
            attach_rose(model, config(dropout=0.4))
            detach_rose(model)
        for step in range(3):
            train_step(model, optimizer, step)
        return list(model.parameters())

    assert all(torch.equal(a, b) for a, b in zip(run(True), run(False), strict=True))


def test_a_dropped_model_is_freed():
    model = tiny_bert()
    attach_rose(model, config())
    train_step(model, adamw(model), 0)
    watch = weakref.ref(model)
    del model
    gc.collect()
    assert watch() is None


@pytest.mark.parametrize("strategy", ["first_order", "second_order"])
def test_units_frozen_by_the_user_take_no_part_until_they_are_thawed(strategy):
    """As in gradual unfreezing: the others are ranked as if these were not there."""
    model = DropoutBlocks(depth=6)
    optimizer = adamw(model, lr=0.01, weight_decay=0.5)
    selector = attach_rose(model, config(strategy))
    torch.manual_seed(0)

    def step() -> list[bool]:
        before = [layer.linear.weight.detach().clone() for layer in model.layers]
        model(torch.randn(4, 3, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        return [not torch.equal(x.linear.weight, old) for x, old in zip(model.layers, before, strict=True)]

    step()  # gives the optimizer its momenta
    model.layers[:2].requires_grad_(False)
    moved = step()
    scores = selector.state.first_scores if strategy == "first_order" else selector.state.second_scores
    kept = [mask > 0 for mask in reference.band(scores[2:].tolist(), 0.0, 0.5)[0]]
    assert moved == [False, False, *kept] and any(kept) and not all(kept)
    model.layers[:2].requires_grad_(True)
    moved = step()
    kept = [mask > 0 for mask in reference.band(scores.tolist(), 0.0, 0.5)[0]]
    assert moved == kept


def held_now(model: nn.Module) -> tuple[int, int, int, tuple[int, ...]]:
    """Tensors and their bytes, blocks of memory that Python has allocated, and hooks."""
    hooks = len(model._forward_hooks), len(model._forward_pre_hooks), *count_global_hooks()[:2]
    count, size = held_tensors()
    return count, size, sys.getallocatedblocks(), hooks


def test_500_steps_leak_nothing():
    model = DropoutBlocks(depth=3)
    optimizer = adamw(model)
    attach_rose(model, config())
    inputs = torch.randn(4, 3, dtype=torch.float64)
    held = []
    for step in range(1, 501):
        model(inputs).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0 and step > 100:  # caches of Python and torch have filled
            held.append(held_now(model))
    tensors, sizes, blocks, hooks = zip(*held, strict=True)
    assert len(set(tensors)) == len(set(sizes)) == len(set(hooks)) == 1
    # A leak of one object per step grows by 100 every time; a cache of somebody else grows now and then.
    assert min(later - before for before, later in itertools.pairwise(blocks)) < 50


def test_injected_dropout_of_a_model_without_any():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)

        def forward(self, x):
            return self.norm(self.linear(x))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers, self.head = nn.ModuleList([Block(), Block()]), nn.Linear(4, 2)

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return self.head(x)

    torch.manual_seed(0)
    model, x = Model(), torch.randn(8, 4)
    plain = model(x)
    selector = attach_rose(model, config("first_order", dropout=0.3))
    assert not torch.equal(model(x), model(x))
    model(x).sum().backward()
    torch.optim.AdamW(model.parameters()).step()
    assert selector.statistics().steps == 1 and (selector.state.first_scores > 0).all()
    # Only in front of matrices, and never in evaluation.
    assert [len(m._forward_pre_hooks) for m in (model.layers[0].linear, model.layers[0].norm, model.head)] == [1, 0, 0]
    model.load_state_dict(Model().state_dict() | {})
    selector.detach()
    torch.manual_seed(0)
    model.load_state_dict(Model().state_dict())
    assert torch.equal(model(x), plain)
    attach_rose(model, config("first_order", dropout=0.3))
    assert torch.equal(model.eval()(x), plain)


# Copies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", ["attach", "full", "lora"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copied_model_is_steered_by_its_own_selector(how, make):
    model = tiny_bert()
    if make == "attach":
        attach_rose(model, config())
    else:
        model = get_peft_model(
            model, config(base_config=LoraConfig(target_modules=["query"]) if make == "lora" else None)
        )
    copied = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    ours, theirs = get_selector(model), get_selector(copied)
    assert theirs is not ours and theirs.host is not ours.host and theirs.model is not ours.model
    own = {id(param) for param in copied.parameters()}
    assert all(id(param) in own for unit in theirs.units for param in unit.parameters())

    def trainable(one: nn.Module) -> list[nn.Parameter]:
        return [param for param in one.parameters() if param.requires_grad]

    def train(one: nn.Module) -> None:
        optimizer = torch.optim.AdamW(trainable(one), lr=1e-2)
        for step in range(3):
            torch.manual_seed(step)
            one(**batch(tiny, seed=step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    tiny = tiny_bert()
    train(copied)
    assert theirs.statistics().steps == 3 and ours.statistics().steps == 0
    train(model)
    assert ours.statistics().steps == 3 and theirs.statistics().steps == 3
    assert torch.equal(ours.state.history, theirs.state.history)
    assert all(torch.equal(a, b) for a, b in zip(trainable(model), trainable(copied), strict=True))
    detach_rose(copied)
    hooks = [m for m in copied.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert not hooks and get_selector(model) is ours


def test_a_model_is_copied_in_the_middle_of_a_window():
    model = tiny_bert()
    attach_rose(model, config("first_order"))
    torch.manual_seed(0)
    model(**batch(model)).loss.backward()
    copied = copy.deepcopy(model)
    for param, grads in zip(copied.parameters(), model.parameters(), strict=True):
        param.grad = grads.grad.clone()
    for one in (model, copied):
        adamw(one).step()
    assert torch.equal(get_selector(model).state.last_mask, get_selector(copied).state.last_mask)


# State and statistics ---------------------------------------------------------------------------------------------


def test_statistics_tell_what_happened():
    model = tiny_bert()
    optimizer = adamw(model)
    selector = attach_rose(model, config("ensemble", gamma=0.3))
    before = selector.statistics()
    assert before.steps == 0 and math.isnan(before.kept_share) and before.skipped_risk_passes == 0
    masks = []
    for step in range(5):
        train_step(model, optimizer, step)
        masks.append(selector.state.last_mask.tolist())
    after = selector.statistics()
    assert after.steps == 5
    assert list(after.units) == [unit.name for unit in selector.units]
    for index, unit in enumerate(after.units.values()):
        column = [row[index] for row in masks]
        assert unit.kept_share == pytest.approx(sum(column) / 5, rel=1e-6) and unit.last_mask == column[-1]
        assert unit.first_order_score == float(selector.state.first_scores[index])
        assert unit.second_order_score == float(selector.state.second_scores[index])
    assert after.kept_share == pytest.approx(sum(map(sum, masks)) / sum(map(len, masks)), rel=1e-6)
    assert after.last_kept_share == pytest.approx(sum(masks[-1]) / len(masks[-1]), rel=1e-6)
    low, high = after.first_order_thresholds
    scores = selector.state.first_scores.tolist()
    assert (low, high) == pytest.approx(reference.band(scores, 0.0, 0.5)[1], rel=1e-6)
    assert after.second_order_thresholds[0] <= after.second_order_thresholds[1]
    assert after.as_dict()["units"][selector.units[0].name]["last_mask"] == masks[-1][0]


def test_statistics_count_only_units_that_stepped():
    model = tiny_bert()
    optimizer = adamw(model)
    selector = attach_rose(model, config("second_order", upper_quantile=1.0))
    name = selector.units[0].name
    param = dict(model.named_parameters())[name]
    for step in range(4):
        torch.manual_seed(step)
        model(**batch(model)).loss.backward()
        if step % 2:
            param.grad = None
        optimizer.step()
        optimizer.zero_grad()
    statistics = selector.statistics()
    assert statistics.units[name].kept_share == 1.0 and statistics.kept_share == 1.0
    assert statistics.units[name].last_mask == 0.0 and statistics.last_kept_share == 1.0


def trained(strategy: str, steps: range, saved: dict | None = None, make=attach_rose, **options):
    """Train a model over some steps, from nothing or from a saved state."""
    model = tiny_bert()
    make(model, config(strategy, **options))
    optimizer = adamw(model)
    if saved is not None:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    for step in steps:
        train_step(model, optimizer, step)
    return model, optimizer


@pytest.mark.parametrize("interrupted_at", [1, 3])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_resumed_training_is_the_same_to_the_last_bit(strategy, interrupted_at):
    options = {"warmup_steps": 2, **({"gamma": 0.3} if strategy == "ensemble" else {})}
    whole, _ = trained(strategy, range(6), **options)
    first, optimizer = trained(strategy, range(interrupted_at), **options)
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second, _ = trained(strategy, range(interrupted_at, 6), saved, **options)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))
    ours, theirs = get_selector(whole).state.values, get_selector(second).state.values
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(theirs[key], value, rtol=0, atol=0, equal_nan=True)
    assert get_selector(second).statistics().steps == 6


def saved_values(state_dict: dict) -> dict:
    """ROSE's values in the state dict of an optimizer of one model."""
    (values,) = state_dict["param_groups"][0]["rose"].values()
    return values


def test_a_saved_state_does_not_change_while_training_goes_on():
    """Whoever copies `optimizer.state_dict()` to keep it in memory must get that moment's state."""
    model, optimizer = trained("ensemble", range(2))
    kept = copy.deepcopy(optimizer.state_dict())
    train_step(model, optimizer, 2)
    assert int(saved_values(kept)["steps"]) == 2
    assert int(saved_values(optimizer.state_dict())["steps"]) == 3


def test_the_state_of_other_units_is_refused():
    _, optimizer = trained("ensemble", range(1))
    model = tiny_bert(num_hidden_layers=3)
    attach_rose(model, config())
    other = adamw(model)
    groups = copy.deepcopy(optimizer.state_dict()["param_groups"])
    other.param_groups[0]["rose"] = groups[0]["rose"]
    with pytest.raises(RoseError, match=r"16 units.*24"):
        train_step(model, other, 0)


@pytest.mark.parametrize("break_it", [lambda v: v.pop("mask_sum"), lambda v: v.update(history=torch.zeros(3, 16))])
def test_the_state_of_another_version_is_refused_whole(break_it):
    _, optimizer = trained("ensemble", range(2))
    saved = copy.deepcopy(optimizer.state_dict()["param_groups"])[0]["rose"]
    break_it(next(iter(saved.values())))
    model = tiny_bert()
    selector = attach_rose(model, config())
    other = adamw(model)
    other.param_groups[0]["rose"] = saved
    with pytest.raises(RoseError, match="another version of rose_peft"):
        train_step(model, other, 0)
    assert int(selector.state.steps) == 0


def test_an_optimizer_state_without_rose_is_welcome():
    """A checkpoint of plain fine-tuning is continued with ROSE."""
    plain = tiny_bert()
    optimizer = adamw(plain)
    train_step(plain, optimizer, 0)
    model, _ = trained("ensemble", range(1, 3), {"model": plain.state_dict(), "optimizer": optimizer.state_dict()})
    assert get_selector(model).statistics().steps == 2


def test_a_state_with_rose_is_welcome_without_it():
    steered, optimizer = trained("ensemble", range(2))
    plain = tiny_bert()
    plain.load_state_dict(steered.state_dict())
    other = adamw(plain)
    other.load_state_dict(optimizer.state_dict())
    train_step(plain, other, 2)


@settings(max_examples=25)
@given(st.integers(1, 70), st.integers(1, 3), st.integers(0, 5))
def test_history_against_a_slow_twin(steps, units, seed):
    """When the table is full, neighbouring columns are averaged, so that it always covers all steps."""
    length = 8
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics_module, "HISTORY_LENGTH", length)
        state = SelectionState([f"unit{i}" for i in range(units)])
        generator = torch.Generator().manual_seed(seed)
        rows = []
        for _ in range(steps):
            mask = torch.randint(0, 2, (units,), generator=generator).float()
            rows.append(mask.tolist())
            state.put(state.after(Decision(mask, torch.ones(units, dtype=torch.bool)), risk_period=1))
        history, stride = state.mask_history()
    assert stride >= 1 and (stride & (stride - 1)) == 0
    assert len(history) == math.ceil(steps / stride) <= length
    assert stride == 1 or len(history) > length // 2
    for column, values in enumerate(history.tolist()):
        span = rows[column * stride : (column + 1) * stride]
        assert values == pytest.approx([sum(row[i] for row in span) / len(span) for i in range(units)], abs=1e-6)


def test_history_is_bounded():
    state = SelectionState(["a", "b"])
    size = state.history.numel()
    for step in range(3 * statistics_module.HISTORY_LENGTH):
        decision = Decision(torch.tensor([1.0, float(step % 2)]), torch.ones(2, dtype=torch.bool))
        state.put(state.after(decision, risk_period=1))
    history, stride = state.mask_history()
    assert state.history.numel() == size and stride == 4
    torch.testing.assert_close(history, torch.tensor([1.0, 0.5]).expand_as(history))


def test_masks_follow_from_the_statistics():
    """What the statistics say is what was done: thresholds and scores give the mask."""
    model = tiny_bert()
    optimizer = adamw(model)
    selector = attach_rose(model, config("second_order", lower_quantile=0.1, upper_quantile=0.7))
    for step in range(4):
        train_step(model, optimizer, step)
    scores = selector.state.second_scores.float()
    mask, _ = masks.quantile_band(scores, 0.1, 0.7)
    assert torch.equal(selector.state.last_mask, mask)
    low, high = selector.statistics().second_order_thresholds
    assert torch.equal(mask == 1, (scores >= low) & (scores <= high))


# The import -------------------------------------------------------------------------------------------------------


def run_python(code: str, *options: str) -> str:
    done = subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_import_is_clean_of_warnings_and_may_be_repeated():
    code = (
        "import sys, peft, rose_peft; first = rose_peft.ROSEConfig\n"
        "for name in ('rose_peft', 'rose_peft.registration'): del sys.modules[name]\n"
        "import rose_peft; assert rose_peft.ROSEConfig is first\n"
        "assert list(peft.PeftType.__members__).count('ROSE') == 1\n"
        "from torch.nn.modules.module import _global_module_registration_hooks as hooks; assert len(hooks) == 1\n"
    )
    assert run_python(code, "-W", "error") == ""


def test_importing_loads_no_other_package_than_peft_does():
    """What is drawn, tabled or downloaded with is imported where it is called, so that the import stays short."""
    code = (
        "import sys, peft\n"
        "def packages(): return {name.partition('.')[0] for name in sys.modules} - sys.stdlib_module_names\n"
        "before = packages(); import rose_peft; print(*sorted(packages() - before))\n"
    )
    assert run_python(code).split() == ["rose_peft"]
