"""Trainings in which ROSE acts as it should: none of them may end in an error, and errors there are name the cause."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from transformers import Trainer, TrainingArguments

from rose_peft import (
    RoseCallback,
    ROSEConfig,
    RoseError,
    RoseInactiveError,
    UnsupportedOptimizerError,
    attach_rose,
    get_selector,
)
from tests.helpers.tiny import batch, tiny_bert
from tests.helpers.training import loss_of, optimizer_of, step, train_watched

LORA = {"r": 2, "target_modules": ["query", "value"], "lora_dropout": 0.1}

# Resuming in the same process ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("taken, resumed_at", [(4, 2), (6, 2)])
def test_resuming_from_an_earlier_checkpoint_in_the_same_process(
    taken: int, resumed_at: int, tmp_path: Path, fresh_accelerate: None
) -> None:
    """The count of steps goes back with the checkpoint, and may end where it was before."""
    model = get_peft_model(tiny_bert(), ROSEConfig(task_type="SEQ_CLS"))
    inputs = batch(model, size=16)
    rows = [{name: tensor[index] for name, tensor in inputs.items()} for index in range(16)]

    def trainer(steps: int) -> Trainer:
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=steps,
            save_steps=2,
            per_device_train_batch_size=4,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
        )
        return Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[RoseCallback()])

    trainer(taken).train()
    assert get_selector(model).statistics().steps == taken
    trainer(4).train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{resumed_at}"))
    assert get_selector(model).statistics().steps == 4


# Optimizers whose momentum cannot be read ---------------------------------------------------------------------------


class EightBitAdam(torch.optim.Optimizer):
    """Keeps both moments as bytes with one scale per tensor, under the names that 8-bit optimizers use."""

    def __init__(self, params: Any, lr: float = 1e-2, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": 1e-6, "weight_decay": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state["step"] = 0
                    for name in ("1", "2"):
                        state["state" + name] = torch.full_like(param, 128, dtype=torch.uint8)
                        state["absmax" + name] = torch.zeros(())
                state["step"] += 1
                moments = []
                for name, beta, new in zip("12", group["betas"], (param.grad, param.grad.square()), strict=True):
                    old = (state["state" + name].float() - 128) / 127 * state["absmax" + name]
                    moment = beta * old + (1 - beta) * new
                    scale = moment.abs().max()
                    state["absmax" + name].copy_(scale)
                    state["state" + name].copy_((moment / scale.clamp(min=1e-30) * 127 + 128).round().byte())
                    moments.append(moment)
                param.mul_(1 - group["lr"] * group["weight_decay"])
                param.sub_(group["lr"] * moments[0] / (moments[1].clamp(min=0).sqrt() + group["eps"]))


class ScheduleFreeLike(torch.optim.Optimizer):
    """Has betas and no `exp_avg`: weights lie between an average and a fast sequence `z`."""

    def __init__(self, params: Any, lr: float = 1e-2, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": 1e-6, "weight_decay": 0.1, "k": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["k"] += 1
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state["z"], state["exp_avg_sq"] = param.clone(), torch.zeros_like(param)
                state["exp_avg_sq"].lerp_(param.grad.square(), 1 - group["betas"][1])
                move = param.grad / (state["exp_avg_sq"].sqrt() + group["eps"]) + group["weight_decay"] * param
                param.lerp_(state["z"], 1 / group["k"])
                param.sub_(group["lr"] * group["betas"][0] * move)
                state["z"].sub_(group["lr"] * move)


def schedule_free(params: Any) -> torch.optim.Optimizer:
    optimizer = pytest.importorskip("schedulefree").AdamWScheduleFree(params, lr=1e-2, weight_decay=0.1)
    optimizer.train()
    return optimizer


every_unreadable = pytest.mark.parametrize("make", [EightBitAdam, ScheduleFreeLike, schedule_free])


@every_unreadable
@pytest.mark.parametrize("lora", [False, True])
def test_first_order_needs_no_readable_momentum(make: Any, lora: bool) -> None:
    inner = LoraConfig(**LORA) if lora else None
    model = get_peft_model(tiny_bert(), ROSEConfig(strategy="first_order", base_config=inner)).train()
    optimizer = make([param for param in model.parameters() if param.requires_grad])
    selector = get_selector(model)
    torch.manual_seed(1)
    for index in range(5):
        before = {id(param): param.detach().clone() for param in model.parameters()}
        mask = step(model, optimizer, batch(model))
        assert 0 < mask.sum() < len(mask)
        for unit, share in zip(selector.units, mask.tolist(), strict=True):
            same = all(torch.equal(param, before[id(param)]) for param in unit.parameters())
            assert same == (share == 0), f"{unit.name} has mask {share} in step {index}"
    assert selector.statistics().steps == 5


@every_unreadable
@pytest.mark.parametrize("strategy", ["second_order", "ensemble"])
def test_what_compares_with_the_momentum_says_that_it_cannot(make: Any, strategy: str) -> None:
    model = get_peft_model(tiny_bert(), ROSEConfig(strategy=strategy)).train()
    optimizer = make([param for param in model.parameters() if param.requires_grad])
    with pytest.raises(UnsupportedOptimizerError, match="first_order") as caught:
        for _ in range(3):
            step(model, optimizer, batch(model))
    assert type(optimizer).__name__ in str(caught.value)


# Other optimizers' steps --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["first_order", "second_order", "ensemble"])
def test_adversarial_inner_loops_under_accumulation(strategy: str) -> None:
    """An optimizer of the perturbation steps often, with new passes and new gradients, before ours does."""
    model = get_peft_model(tiny_bert(), ROSEConfig(strategy=strategy)).train()
    optimizer = optimizer_of(model)
    inputs = batch(model)
    embeddings = model.get_base_model().bert.embeddings.word_embeddings(inputs.pop("input_ids")).detach()
    torch.manual_seed(1)
    for _ in range(3):
        optimizer.zero_grad()
        for _ in range(4):
            delta = torch.zeros_like(embeddings, requires_grad=True)
            adversary = torch.optim.SGD([delta], lr=0.1, maximize=True)
            for _ in range(8):
                adversary.zero_grad()
                model(inputs_embeds=embeddings + delta, **inputs).loss.backward()
                adversary.step()
        optimizer.step()
    statistics = get_selector(model).statistics()
    assert statistics.steps == 3
    assert statistics.last_kept_share < 1


@pytest.mark.parametrize("set_to_none", [False, True])
@pytest.mark.parametrize("strategy", ["first_order", "second_order", "ensemble"])
def test_two_towers_in_turn(strategy: str, set_to_none: bool) -> None:
    """Both are cleared at each step, and one of them is trained for a while."""
    towers = [get_peft_model(tiny_bert(seed), ROSEConfig(strategy=strategy)).train() for seed in (0, 1)]
    optimizers = [optimizer_of(tower) for tower in towers]
    torch.manual_seed(1)
    for tower, optimizer in [(towers[0], optimizers[0]), (towers[1], optimizers[1]), (towers[0], optimizers[0])]:
        for _ in range(25):
            for each in optimizers:
                each.zero_grad(set_to_none=set_to_none)
            loss_of(tower(**batch(tower))).backward()
            optimizer.step()
    assert [get_selector(tower).statistics().steps for tower in towers] == [50, 25]
    assert all(get_selector(tower).statistics().last_kept_share < 1 for tower in towers)


def test_two_towers_of_one_loss_with_an_optimizer_each() -> None:
    towers = [get_peft_model(tiny_bert(seed), ROSEConfig()).train() for seed in (0, 1)]
    optimizers = [optimizer_of(tower) for tower in towers]
    for turn in range(60):
        for each in optimizers:
            each.zero_grad(set_to_none=False)
        sum(loss_of(tower(**batch(tower))) for tower in towers).backward()  # type: ignore[union-attr]
        optimizers[turn % 2].step()
    assert [get_selector(tower).statistics().steps for tower in towers] == [30, 30]
    with pytest.raises(RoseError, match=r"2 parts of this ModuleList \('0.*', '1.*'\)"):
        get_selector(nn.ModuleList(towers))


# Adapters that are gone or not in use -------------------------------------------------------------------------------


def delete_the_only_one(model: PeftModel) -> None:
    model.delete_adapter("default")


def delete_the_active_of_two(model: PeftModel) -> None:
    model.add_adapter("other", _adapter_config(model))
    model.delete_adapter("default")


def activate_one_that_is_frozen(model: PeftModel) -> None:
    model.add_adapter("other", _adapter_config(model))
    model.set_adapter("other")
    model.set_requires_grad("other", False)


def disable(model: PeftModel) -> None:
    model.base_model.disable_adapter_layers()


def freeze(model: PeftModel) -> None:
    model.requires_grad_(False)


def merge(model: PeftModel) -> None:
    model.merge_adapter()


def _adapter_config(model: PeftModel) -> Any:
    return LoraConfig(**LORA) if model.peft_type == "LORA" else ROSEConfig(target_modules=["query", "value"])


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("strategy", ["first_order", "second_order", "ensemble"])
@pytest.mark.parametrize(
    "what", [delete_the_only_one, delete_the_active_of_two, activate_one_that_is_frozen, disable, freeze, merge]
)
@pytest.mark.parametrize("differentiable", [False, True])
@pytest.mark.filterwarnings("ignore:Adapter default was active")
def test_forward_in_train_mode_without_an_adapter_that_trains(
    lora: bool, strategy: str, what: Any, differentiable: bool
) -> None:
    """Also where the output has a gradient of something else, such as the input's."""
    fields = {"base_config": LoraConfig(**LORA)} if lora else {"target_modules": ["query", "value"]}
    model = get_peft_model(tiny_bert(), ROSEConfig(strategy=strategy, **fields)).train()
    train_watched(model, batch(model))
    embed = model.get_base_model().bert.embeddings.word_embeddings
    what(model)
    inputs = batch(tiny_bert())
    embedded = embed(inputs.pop("input_ids")).detach().requires_grad_(differentiable)
    for _ in range(3):
        output = model.base_model(inputs_embeds=embedded, **inputs)
        assert torch.isfinite(output.loss)
    if differentiable:
        output.loss.backward()
        assert embedded.grad is not None


# Eval mode ----------------------------------------------------------------------------------------------------------


# A new LoRA layer is in train mode, with its dropout, whatever the model around it is in.
QUIET = {**LORA, "lora_dropout": 0.0}


def full(strategy: str, base: nn.Module) -> nn.Module:
    return get_peft_model(base, ROSEConfig(strategy=strategy))


def composed(strategy: str, base: nn.Module) -> nn.Module:
    return get_peft_model(base, ROSEConfig(strategy=strategy, base_config=LoraConfig(**QUIET)))


def with_task(strategy: str, base: nn.Module) -> nn.Module:
    return get_peft_model(base, ROSEConfig(strategy=strategy, task_type="SEQ_CLS", base_config=LoraConfig(**QUIET)))


def attached(strategy: str, base: nn.Module) -> nn.Module:
    attach_rose(base, ROSEConfig(strategy=strategy))
    return base


@pytest.mark.parametrize("build", [full, composed, with_task, attached])
@pytest.mark.parametrize("strategy", ["first_order", "ensemble"])
@pytest.mark.parametrize("wrapper_too", [False, True])
def test_in_eval_mode_the_message_says_train(build: Any, strategy: str, wrapper_too: bool) -> None:
    """`from_pretrained` returns models in eval mode, and what wraps them afterwards is in train mode."""
    model = build(strategy, tiny_bert().eval())
    if wrapper_too:
        model.eval()
    optimizer = optimizer_of(model)
    with pytest.raises(RoseInactiveError) as caught:
        for _ in range(60):
            step(model, optimizer, batch(model))
    message = str(caught.value)
    assert "model.train()" in message
    assert "no active dropout" not in message and "\n" not in message
    # What the message advises helps.
    optimizer.zero_grad()
    masks: list[Tensor] = train_watched(model.train(), batch(model))
    assert any((mask < 1).any() for mask in masks)


# Gradients of zero, and steps that are none --------------------------------------------------------------------------


def test_blocks_that_are_frozen_later_and_keep_gradients_of_zero() -> None:
    model = tiny_bert(num_hidden_layers=4)
    attach_rose(model, ROSEConfig(strategy="first_order"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for number in range(5):
        if number == 2:
            for part in (model.bert.embeddings, *model.bert.encoder.layer[:2]):
                part.requires_grad_(False)
        optimizer.zero_grad(set_to_none=False)
        model(**batch(model)).loss.backward()
        optimizer.step()
    assert get_selector(model).statistics().steps == 5


@pytest.mark.parametrize("strategy", ["ensemble", "second_order"])
def test_a_state_loaded_into_a_new_optimizer_of_the_same_process(strategy: str) -> None:
    """torch takes a step of nothing to have a state to load into; it is none of the training's."""
    model = tiny_bert()
    selector = attach_rose(model, ROSEConfig(strategy=strategy))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(2):
        model(**batch(model)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    saved = get_optimizer_state_dict(model, optimizer)
    set_optimizer_state_dict(model, torch.optim.AdamW(model.parameters(), lr=1e-3), saved)
    assert int(selector.state.steps) == selector.steps_taken == 2


def test_gradients_that_have_a_graph_leave_none_in_the_state() -> None:
    """As gradient penalties and AdaHessian have them."""
    model = tiny_bert()
    selector = attach_rose(model, ROSEConfig())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(2):
        model(**batch(model)).loss.backward(create_graph=True)
        optimizer.step()
        optimizer.zero_grad()
    tensors = [value for value in selector.state.values.values() if isinstance(value, Tensor)]
    assert not any(tensor.requires_grad for tensor in tensors)
    copy.deepcopy(optimizer.state_dict())


@pytest.mark.parametrize("risk_pass", ["paired", "sampled"])
def test_tasks_in_turn_whose_gradients_are_set_to_zero(risk_pass: Any) -> None:
    """Zeros that an earlier task has left on its units are no gradients that the divergence would have to reach."""

    class Tasks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.tasks = nn.ModuleList(
                nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Dropout(0.2)) for _ in range(3))
                for _ in range(3)
            )
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor, labels: Tensor, task: int) -> dict[str, Tensor]:
            for layer in self.tasks[task]:
                x = layer(x)
            logits = self.head(x)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    model = Tasks().train()
    selector = attach_rose(model, ROSEConfig(risk_pass=risk_pass, upper_quantile=0.5))
    optimizer = torch.optim.AdamW(model.parameters())
    for turn in range(9):
        model(x=torch.randn(8, 8), labels=torch.randint(0, 3, (8,)), task=turn % 3)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    assert int(selector.state.steps) == 9


def test_an_adapter_over_one_that_is_merged_elsewhere() -> None:
    model = get_peft_model(
        tiny_bert(), ROSEConfig(strategy="first_order", base_config=LoraConfig(r=2, target_modules=["query"]))
    )
    model.add_adapter("other", LoraConfig(r=2, target_modules=["intermediate.dense"]))
    model.set_adapter("other")
    model.merge_adapter(["default"])
    train_watched(model, batch(model))


def test_a_loss_handed_to_step_is_no_closure() -> None:
    class Adaptive(torch.optim.AdamW):
        def step(self, loss: Any = None) -> None:  # type: ignore[override]
            super().step()

    model = tiny_bert()
    selector = attach_rose(model, ROSEConfig(strategy="second_order"))
    loss = model(**batch(model)).loss
    loss.backward()
    Adaptive(model.parameters()).step(loss)
    assert int(selector.state.steps) == 1


def test_a_parameter_that_the_model_returns_gathers_no_hooks() -> None:
    model = tiny_bert()
    model.temperature = nn.Parameter(torch.ones(()))
    forward = model.forward
    model.forward = lambda **inputs: {**forward(**inputs), "temperature": model.temperature}
    attach_rose(model, ROSEConfig(strategy="first_order"))
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(3):
        model(**batch(model))["loss"].backward()
        optimizer.step()
    assert not model.temperature._backward_hooks


def test_after_a_learning_rate_finder_everything_starts_anew() -> None:
    """Model and optimizer are put back to before the first step: the warm-up is still to come."""
    model = tiny_bert()
    selector = attach_rose(model, ROSEConfig(strategy="ensemble", risk_pass="sampled", warmup_steps=2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    before = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    kept = []
    for part in range(2):
        torch.manual_seed(5)
        for seed in range(4):
            model(**batch(model, seed=seed)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            kept.append((part, seed, selector.state.last_mask.tolist()))
        model.load_state_dict(before[0])
        optimizer.load_state_dict(copy.deepcopy(before[1]))
    assert [entry[1:] for entry in kept[:4]] == [entry[1:] for entry in kept[4:]]
    assert set(kept[0][2]) == {1.0} and set(kept[3][2]) != {1.0}


def test_an_optimizer_without_momenta_may_get_new_groups() -> None:
    """It has no state before its first step and none after it: that tells nothing of having been put back."""
    model = tiny_bert()
    selector = attach_rose(model, ROSEConfig(strategy="first_order"))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for seed in range(4):
        if seed == 2:
            optimizer.param_groups = [{**optimizer.defaults, "params": list(model.parameters())}]
        model(**batch(model, seed=seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert int(selector.state.steps) == 4


def test_two_calls_of_a_step_one_of_which_uses_frozen_units_alone() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.branches = nn.ModuleList(
                nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Dropout(0.2)) for _ in range(2))
                for _ in range(2)
            )
            self.head = nn.Linear(8, 3).requires_grad_(False)

        def forward(self, x: Tensor, branch: int) -> dict[str, Tensor]:
            for layer in self.branches[branch]:
                x = layer(x)
            return {"logits": self.head(x) * (1 + 9 * branch)}

    model = Branches().train()
    fields = {"strategy": "first_order", "risk_pass": "sampled", "skip_frozen_gradients": True, "upper_quantile": 0.5}
    selector = attach_rose(model, ROSEConfig(**fields))
    optimizer = torch.optim.AdamW([param for param in model.parameters() if param.requires_grad])
    for _ in range(10):
        x = torch.randn(8, 8)
        (model(x=x, branch=0)["logits"].square().mean() + model(x=x, branch=1)["logits"].square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert int(selector.state.steps) == 10
