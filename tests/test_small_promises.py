"""Promises too small for a file of their own."""

from __future__ import annotations

import importlib.resources
import json
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerControl, TrainerState
from transformers.trainer_callback import CallbackHandler

import rose_peft
from rose_peft import (
    AlreadyAttachedError,
    RoseCallback,
    ROSEConfig,
    RoseConfigError,
    RoseError,
    attach_rose,
    get_selector,
)
from tests.helpers.tiny import batch, tiny_bert
from tests.helpers.training import optimizer_of, step, train, train_watched

# The config ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "number", [numpy.float16, numpy.float32, numpy.float64, lambda x: numpy.asarray(x, dtype="float32")[()]]
)
def test_numbers_of_numpy_are_numbers(number: Any) -> None:
    config = ROSEConfig(
        upper_quantile=number(0.75),
        lower_quantile=number(0.25),
        gamma=number(0.5),
        dropout=number(0.25),
        warmup_steps=numpy.int64(3),
    )
    plain = ROSEConfig(upper_quantile=0.75, lower_quantile=0.25, gamma=0.5, dropout=0.25, warmup_steps=3)
    assert config.to_dict() == plain.to_dict()
    json.dumps(config.to_dict(), allow_nan=False)
    attach_rose(tiny_bert(), config)


@pytest.mark.parametrize(
    "fields",
    [
        {"upper_quantile": numpy.float32(1.5)},
        {"gamma": numpy.float64("nan")},
        {"gamma": numpy.bool_(True)},
        {"warmup_steps": numpy.float32(2.0)},
        {"warmup_steps": numpy.int64(-1)},
        {"dropout": numpy.float32(1.0)},
    ],
    ids=str,
)
def test_bad_numbers_of_numpy_are_refused_too(fields: dict[str, Any]) -> None:
    with pytest.raises(RoseConfigError, match=next(iter(fields))):
        ROSEConfig(**fields)


def test_an_unknown_head_is_refused() -> None:
    with pytest.raises(RoseConfigError, match=r"head='sigmoid'.*softmax, multi_label, regression, causal"):
        ROSEConfig(head="sigmoid")  # type: ignore[arg-type]
    for head in ("softmax", "multi_label", "regression", "causal", None):
        assert ROSEConfig(head=head).head == head  # type: ignore[arg-type]


# Statistics ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["first_order", "second_order", "ensemble"])
def test_statistics_are_strict_json_at_any_time(strategy: str) -> None:
    model = tiny_bert()
    selector = attach_rose(model, ROSEConfig(strategy=strategy))
    optimizer = optimizer_of(model)
    torch.manual_seed(1)
    for steps in range(3):
        values = json.loads(json.dumps(selector.statistics().as_dict(), allow_nan=False))
        assert values["steps"] == steps
        assert set(values["units"]) == {unit.name for unit in selector.units}
        step(model, optimizer, batch(model))


# Units --------------------------------------------------------------------------------------------------------------


class Experts(nn.Module):
    """Several parameters of one module, as experts are stored."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(2, 6, 8) / 3)
        self.down = nn.Parameter(torch.randn(2, 8, 6) / 3)
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        for up, down in zip(self.up, self.down, strict=True):
            x = x + self.drop((x @ up).relu()) @ down
        return x


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Experts() for _ in range(2))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def test_unit_names_are_unique_with_target_parameters() -> None:
    torch.manual_seed(0)
    inner = LoraConfig(r=2, target_modules=["head"], target_parameters=["up", "down"])
    model = get_peft_model(Mixture(), ROSEConfig(strategy="second_order", base_config=inner))
    names = [unit.name for unit in get_selector(model).units]
    assert len(names) == 5
    assert len(set(names)) == 5
    inputs = {"x": torch.randn(5, 6, generator=torch.Generator().manual_seed(0))}
    train_watched(model, inputs)
    assert set(get_selector(model).statistics().units) == set(names)


# Attaching ----------------------------------------------------------------------------------------------------------


def whole(model: nn.Module) -> nn.Module:
    return model


def part(model: nn.Module) -> nn.Module:
    return model.bert


@pytest.mark.parametrize("first, second", [(whole, part), (part, whole)])
def test_a_model_and_a_part_of_it(first: Any, second: Any) -> None:
    """Two selectors would mask the same weights twice, at one step."""
    model = tiny_bert()
    attach_rose(first(model), ROSEConfig(strategy="second_order"))
    before = {id(module): (len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()}
    with pytest.raises(AlreadyAttachedError, match="detach_rose"):
        attach_rose(second(model), ROSEConfig(strategy="second_order"))
    now = {id(module): (len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()}
    assert now == before
    get_selector(first(model)).detach()
    attach_rose(second(model), ROSEConfig(strategy="second_order"))


def test_parts_that_share_nothing_are_welcome() -> None:
    model = nn.ModuleDict({"one": tiny_bert(0), "two": tiny_bert(1)})
    for tower in model.values():
        attach_rose(tower, ROSEConfig())
        train_watched(tower, batch(tower))


def test_all_linear_on_a_plain_model() -> None:
    model, wrapped = tiny_bert(), tiny_bert()
    config = ROSEConfig(target_modules="all-linear", task_type="SEQ_CLS")
    selector = attach_rose(model, config)
    expected = get_selector(get_peft_model(wrapped, ROSEConfig(target_modules="all-linear", task_type="SEQ_CLS")))
    names = [unit.name for unit in selector.units]
    assert names == [unit.name for unit in expected.units]
    assert "bert.pooler.dense.weight" in names
    assert not [name for name in names if "LayerNorm" in name or "classifier" in name]
    train_watched(model, batch(model))


@pytest.mark.parametrize("targets", [None, ["dense", "classifier"], r".*(dense|classifier)"], ids=str)
@pytest.mark.parametrize("saved", [["classifier"], ["intermediate"], ["layer.1.output", "classifier"]], ids=str)
def test_modules_to_save_of_a_plain_model_train_unmasked(targets: Any, saved: list[str]) -> None:
    def kept_aside(name: str) -> bool:
        return any(f".{each}." in f".{name}." for each in saved)

    everything = {unit.name for unit in attach_rose(tiny_bert(), ROSEConfig(target_modules=targets)).units}
    model = tiny_bert()
    selector = attach_rose(model, ROSEConfig(target_modules=targets, modules_to_save=saved))
    assert {unit.name for unit in selector.units} == {name for name in everything if not kept_aside(name)}
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    train(model, batch(model), steps=1)
    for name, param in model.named_parameters():
        if kept_aside(name):
            assert not torch.equal(param, before[name]), name


def test_modules_to_save_that_match_nothing_or_are_frozen() -> None:
    with pytest.raises(RoseConfigError, match=r"modules_to_save=\['clasifier'\].*matches no module"):
        attach_rose(tiny_bert(), ROSEConfig(modules_to_save=["clasifier"]))
    model = tiny_bert()
    model.classifier.requires_grad_(False)
    with pytest.raises(RoseConfigError, match=r"'classifier' is frozen"):
        attach_rose(model, ROSEConfig(modules_to_save=["classifier"]))
    with pytest.raises(RoseError, match="not attached"):
        get_selector(model)


def test_modules_to_save_over_an_adapter_are_the_adapters() -> None:
    def adapted() -> nn.Module:
        return get_peft_model(tiny_bert(), LoraConfig(target_modules=["query"], modules_to_save=["classifier"]))

    with pytest.raises(RoseConfigError, match=r"modules_to_save=\['pooler'\].*adapter"):
        attach_rose(adapted(), ROSEConfig(modules_to_save=["classifier", "pooler"]))
    model = adapted()
    attach_rose(model, ROSEConfig(modules_to_save=["classifier"]))
    train_watched(model, batch(model))


# The wrapping layer -------------------------------------------------------------------------------------------------


class Kinds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 5)
        self.conv = nn.Conv1d(3, 2, 1)
        self.emb = nn.Embedding(7, 4)
        self.norm = nn.LayerNorm(5)


@pytest.mark.parametrize("disabled", [False, True])
def test_a_layer_shows_what_the_wrapped_module_has_and_nothing_else(disabled: bool) -> None:
    model = get_peft_model(Kinds(), ROSEConfig(strategy="second_order", target_modules=["lin", "conv", "emb", "norm"]))
    if disabled:
        model.base_model.disable_adapter_layers()
    plain = Kinds()
    names = ("in_features", "out_features", "in_channels", "num_embeddings", "embedding_dim", "normalized_shape")
    for child in ("lin", "conv", "emb", "norm"):
        layer, module = getattr(model.base_model.model, child), getattr(plain, child)
        for name in (*names, "bias", "padding_idx", "no_such_thing"):
            assert hasattr(layer, name) == hasattr(module, name), (child, name)
            assert (name in dir(layer)) == (name in dir(module)) or name == "bias", (child, name)
            if name in names and hasattr(module, name):
                assert getattr(layer, name) == getattr(module, name)


# The optimizer's own copy of the weights ----------------------------------------------------------------------------


class MasterAdam(torch.optim.Optimizer):
    """Keeps float32 masters of half-precision weights in its state, and writes the weights from them."""

    def __init__(self, params: Any, lr: float = 1e-2, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": 1e-6})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state, grad = self.state[param], param.grad.float()
                if not state:
                    state["master_param"] = param.detach().float()
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(grad), torch.zeros_like(grad)
                state["exp_avg"].lerp_(grad, 1 - group["betas"][0])
                state["exp_avg_sq"].lerp_(grad.square(), 1 - group["betas"][1])
                state["master_param"].sub_(
                    group["lr"] * state["exp_avg"] / (state["exp_avg_sq"].sqrt() + group["eps"])
                )
                param.copy_(state["master_param"])


@pytest.mark.parametrize("strategy", ["first_order", "second_order", "ensemble"])
def test_a_master_copy_is_masked_with_the_weights(strategy: str) -> None:
    """A frozen unit whose master had moved would jump when it is next kept."""
    model = tiny_bert().to(torch.bfloat16)
    selector = attach_rose(model, ROSEConfig(strategy=strategy))
    optimizer = MasterAdam(model.parameters())
    torch.manual_seed(1)
    for index in range(6):
        before = {
            id(param): (param.detach().clone(), optimizer.state[param]["master_param"].clone() if index else None)
            for param in model.parameters()
        }
        mask = step(model, optimizer, batch(model))
        for unit, share in zip(selector.units, mask.tolist(), strict=True):
            for param in unit.parameters():
                weights, master = before[id(param)]
                now = optimizer.state[param]["master_param"]
                torch.testing.assert_close(now.to(param.dtype), param.detach(), rtol=0.01, atol=1e-3)
                if share == 0:
                    assert torch.equal(param, weights)
                    assert torch.equal(now, master if master is not None else weights.float())
    assert selector.statistics().last_kept_share < 1


# The package --------------------------------------------------------------------------------------------------------


def test_dir_knows_every_public_name() -> None:
    assert set(rose_peft.__all__) <= set(dir(rose_peft))
    for name in rose_peft.__all__:
        assert getattr(rose_peft, name) is not None


def test_types_are_shipped() -> None:
    assert importlib.resources.files("rose_peft").joinpath("py.typed").is_file()
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    assert 'rose_peft = ["py.typed"]' in project


def test_the_callback_reads_no_frames_of_its_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_bert()
    attach_rose(model, ROSEConfig())
    real = sys._getframe

    def watched(depth: int = 0) -> Any:
        asker = real(1).f_globals.get("__name__", "")
        assert not asker.startswith("rose_peft"), f"{asker} looks at its caller's frames"
        return real(depth + 1)

    monkeypatch.setattr(sys, "_getframe", watched)
    callback = RoseCallback()
    loader = DataLoader([0])
    handler = CallbackHandler([callback], model, None, torch.optim.SGD(model.parameters()), None)
    handler.train_dataloader = loader
    handler.on_train_begin(None, TrainerState(), TrainerControl())
