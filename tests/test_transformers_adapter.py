"""Adapters that transformers itself puts into a model: `model.add_adapter`, without any PeftModel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

from rose_peft import AlreadyAttachedError, RoseCallback, ROSEConfig, detach_rose, get_selector
from tests.helpers.tiny import batch, tiny_bert
from tests.helpers.training import changed, outputs, snapshot, train_watched, trainable

CASES = {
    "full": {},
    "targets": {"target_modules": ["query", "value"]},
    "lora": {"base_config": LoraConfig(r=2, target_modules=["query", "value"])},
    "norms": {"base_config": None, "target_modules": r".*layer\..*LayerNorm"},
}
every_case = pytest.mark.parametrize("fields", CASES.values(), ids=CASES)


def added(fields: dict[str, Any], **more: Any) -> nn.Module:
    model = tiny_bert()
    model.add_adapter(ROSEConfig(**fields, **more))
    return model


@every_case
@pytest.mark.parametrize("strategy", ["first_order", "second_order", "ensemble"])
def test_the_selector_is_found_and_steers(fields: dict[str, Any], strategy: str) -> None:
    model = added(fields, strategy=strategy)
    selector = get_selector(model)
    assert selector.config.strategy == strategy
    masks = torch.stack(train_watched(model, batch(model), steps=4))
    assert (masks < 1).any()
    assert selector.statistics().steps == 4


@every_case
def test_one_risk_pass_per_forward_call(fields: dict[str, Any]) -> None:
    model = added(fields, strategy="first_order")
    calls = []
    model.bert.register_forward_hook(lambda *_: calls.append(1))
    model.train()
    model(**batch(model))
    assert len(calls) == 2


@every_case
def test_injected_by_peft(fields: dict[str, Any]) -> None:
    model = inject_adapter_in_model(ROSEConfig(**fields), tiny_bert())
    assert type(model).__name__ == "BertForSequenceClassification"
    train_watched(model, batch(model))
    assert get_selector(model).statistics().steps == 3


@every_case
def test_adapters_are_switched_off_and_on(fields: dict[str, Any]) -> None:
    model = added(fields)
    plain = outputs(tiny_bert(), batch(model))
    train_watched(model, batch(model))
    trained = outputs(model, batch(model))
    model.disable_adapters()
    assert torch.equal(outputs(model, batch(model)), plain)
    model.enable_adapters()
    assert torch.equal(outputs(model, batch(model)), trained)


def test_only_the_adapter_trains() -> None:
    model = added(CASES["targets"])
    assert trainable(model) and all(".rose_copy.default." in name for name in trainable(model))
    before = snapshot(model)
    train_watched(model, batch(model))
    assert changed(model, before) <= trainable(model)


def test_saved_and_loaded_by_transformers(tmp_path) -> None:
    base = tmp_path / "base"
    tiny_bert().save_pretrained(base)
    model = AutoModelForSequenceClassification.from_pretrained(base)
    model.add_adapter(ROSEConfig(target_modules=["query", "value"]))
    train_watched(model, batch(model))
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoModelForSequenceClassification.from_pretrained(base)
    loaded.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(outputs(loaded, batch(model)), outputs(model, batch(model)))


@every_case
def test_a_second_one_is_refused_and_detaching_ends_it(fields: dict[str, Any]) -> None:
    model = added(fields)
    with pytest.raises(AlreadyAttachedError, match="detach_rose"):
        model.add_adapter(ROSEConfig(**fields), "other")
    detach_rose(model)
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_the_trainer_trains_it(tmp_path, fresh_accelerate) -> None:
    model = added(CASES["lora"])
    inputs = batch(model, size=8)
    rows = [{name: tensor[index] for name, tensor in inputs.items()} for index in range(8)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no"
    )
    Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[RoseCallback()]).train()
    assert get_selector(model).statistics().steps == 3
