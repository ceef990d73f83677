"""One config for several models: it is never written to, and what one model had frozen does not freeze the next."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import BertConfig, BertForTokenClassification

from rose_peft import ROSEConfig, attach_rose, detach_rose, get_selector
from tests.helpers.tiny import SIZES, batch, tiny_bert
from tests.helpers.training import outputs, train, trainable


def with_frozen_embeddings() -> nn.Module:
    model = tiny_bert()
    model.bert.embeddings.requires_grad_(False)
    return model


def tagger() -> nn.Module:
    torch.manual_seed(0)
    return BertForTokenClassification(BertConfig(**SIZES)).train()


def fields(config: ROSEConfig) -> dict[str, Any]:
    """Everything but what PEFT itself writes into a config of any method: the base model's name."""
    values = {**vars(config), "base_model_name_or_path": None}
    return copy.deepcopy(values)


def test_what_one_model_had_frozen_trains_in_the_next() -> None:
    config = ROSEConfig()
    first = get_peft_model(with_frozen_embeddings(), config)
    second = get_peft_model(tiny_bert(), config)
    fresh = get_peft_model(tiny_bert(), ROSEConfig())
    assert not [name for name in trainable(first) if "embeddings" in name]
    assert [name for name in trainable(second) if "embeddings" in name]
    assert trainable(second) == trainable(fresh)


def test_what_one_model_had_frozen_trains_in_a_further_adapter() -> None:
    config = ROSEConfig()
    get_peft_model(with_frozen_embeddings(), config)
    model = get_peft_model(tiny_bert(), ROSEConfig())
    model.add_adapter("other", config)
    model.set_adapter("other")
    assert [name for name in trainable(model) if "embeddings" in name]


EXCLUDED: list[Any] = [None, ["pooler"], r".*pooler.*"]


@pytest.mark.parametrize("exclude", EXCLUDED, ids=str)
def test_frozen_modules_are_not_written_into_the_config(exclude: Any) -> None:
    config = ROSEConfig(exclude_modules=exclude)
    before = fields(config)
    get_peft_model(with_frozen_embeddings(), config)
    assert fields(config) == before


def test_all_linear_is_found_anew_in_each_model() -> None:
    config = ROSEConfig(target_modules="all-linear")
    before = fields(config)
    get_peft_model(tiny_bert(num_hidden_layers=1), config)
    assert fields(config) == before
    model = get_peft_model(tiny_bert(num_hidden_layers=3), config)
    assert [unit.name for unit in get_selector(model).units if ".layer.2." in unit.name]
    assert fields(config) == before


def test_attaching_to_a_plain_model_writes_nothing() -> None:
    config = ROSEConfig(target_modules="all-linear", modules_to_save=["classifier"])
    before = fields(config)
    model = tiny_bert()
    attach_rose(model, config)
    train(model, batch(model))
    detach_rose(model)
    assert fields(config) == before


def test_composition_writes_neither_config() -> None:
    inner = LoraConfig(r=2, target_modules="all-linear")
    config = ROSEConfig(base_config=inner)
    before, inner_before = fields(config), copy.deepcopy(vars(inner))
    models = [get_peft_model(tiny_bert(num_hidden_layers=layers), config) for layers in (1, 3)]
    assert fields(config) == before
    assert vars(inner) == inner_before
    assert [len(get_selector(model).units) for model in models] == [8, 20]


def test_the_models_settings_are_its_own() -> None:
    """The config in `peft_config` is what was made of the user's for this model, and is saved with the adapter."""
    config = ROSEConfig()
    first, second = get_peft_model(with_frozen_embeddings(), config), get_peft_model(tiny_bert(), config)
    assert first.peft_config["default"] is not second.peft_config["default"]
    assert first.peft_config["default"] is not config


def test_a_list_of_the_users_is_not_written_to() -> None:
    """PEFT extends `modules_to_save` by the heads of the task, in place."""
    saved = ["pooler"]
    get_peft_model(tiny_bert(), ROSEConfig(task_type="SEQ_CLS", modules_to_save=saved))
    assert saved == ["pooler"]


@pytest.mark.parametrize("build, task_type", [(tiny_bert, "SEQ_CLS"), (tagger, "TOKEN_CLS")], ids=["SEQ", "TOKEN"])
def test_heads_are_named_once_however_often_a_config_is_used(build: Any, task_type: str, tmp_path) -> None:
    config = ROSEConfig(task_type=task_type)
    models = [get_peft_model(build(), config) for _ in range(3)]
    for model in models:
        saved = model.peft_config["default"].modules_to_save
        assert sorted(saved) == sorted(set(saved))
    assert trainable(models[2]) == trainable(get_peft_model(build(), ROSEConfig(task_type=task_type)))


def test_an_adapter_with_frozen_parts_still_loads(tmp_path) -> None:
    config = ROSEConfig()
    model = get_peft_model(with_frozen_embeddings(), config)
    get_peft_model(tiny_bert(), config)
    train(model, batch(model))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_bert(), tmp_path)
    assert torch.equal(outputs(loaded, batch(model)), outputs(model, batch(model)))


def test_a_config_given_for_inference_is_the_models_own(tmp_path) -> None:
    """There is nothing to be found out about the model, and PEFT promises the object itself."""
    get_peft_model(with_frozen_embeddings(), ROSEConfig()).save_pretrained(tmp_path)
    config = ROSEConfig.from_pretrained(tmp_path)
    before = fields(config)
    loaded = PeftModel.from_pretrained(tiny_bert(), tmp_path, config=config)
    assert loaded.peft_config["default"] is config
    assert fields(config) == {**before, "inference_mode": True}
