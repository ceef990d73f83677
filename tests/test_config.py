"""Bad settings end in one clear, typed error, and leave the model as it was."""

from __future__ import annotations

import pytest
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from rose_peft import (
    AlreadyAttachedError,
    ROSEConfig,
    RoseConfigError,
    RoseError,
    TargetModulesError,
    UnsupportedModelError,
    attach_rose,
    detach_rose,
)
from tests.tiny import tiny_bert

BAD = [
    ({"strategy": "third_order"}, r"strategy='third_order'.*first_order, second_order, ensemble"),
    ({"upper_quantile": 70}, r"upper_quantile=70 .*70 percent is 0\.7"),
    ({"upper_quantile": 1.1}, r"upper_quantile=1\.1"),
    ({"lower_quantile": -0.1}, r"lower_quantile=-0\.1"),
    ({"lower_quantile": 0.7}, r"lower_quantile=0\.7 must be below upper_quantile=0\.7"),
    ({"gamma": 2}, r"gamma=2"),
    ({"gamma": True}, r"gamma=True"),
    ({"warmup_steps": -1}, r"warmup_steps=-1"),
    ({"dropout": 0.0}, r"dropout=0\.0"),
    ({"dropout": 1.0}, r"dropout=1\.0"),
    ({"base_config": "lora"}, r"base_config='lora'"),
    ({"base_config": ROSEConfig()}, r"base_config is itself a ROSEConfig"),
    ({"base_config": PromptTuningConfig(num_virtual_tokens=2)}, r"PROMPT_TUNING is not supported"),
    ({"base_config": LoraConfig(), "target_modules": ["query"]}, r"target_modules=.* set target_modules on the Lora"),
]


@pytest.mark.parametrize(("fields", "message"), BAD, ids=[str(fields)[:40] for fields, _ in BAD])
def test_bad_fields_are_named(fields, message):
    with pytest.raises(RoseConfigError, match=message) as caught:
        ROSEConfig(**fields)
    assert isinstance(caught.value, (RoseError, ValueError)) and "\n" not in str(caught.value)


def state_of(model):
    names = [(name, type(module), len(module._forward_hooks)) for name, module in model.named_modules()]
    return names, [(name, param.requires_grad) for name, param in model.named_parameters()]


def test_targets_that_match_nothing_list_candidates_and_change_nothing():
    model = tiny_bert()
    before = state_of(model)
    with pytest.raises(TargetModulesError, match=r"target_modules=.*nothing.*Candidates: .*embeddings"):
        get_peft_model(model, ROSEConfig(target_modules=["nothing"]))
    assert state_of(model) == before


def test_a_quantized_base_is_refused_and_left_alone():
    model = tiny_bert()
    model.is_loaded_in_8bit = True
    before = state_of(model)
    with pytest.raises(UnsupportedModelError, match=r"is_loaded_in_8bit.*LoraConfig"):
        get_peft_model(model, ROSEConfig(task_type="SEQ_CLS"))
    assert state_of(model) == before


def test_attaching_twice_is_refused():
    model = tiny_bert()
    attach_rose(model, ROSEConfig())
    with pytest.raises(AlreadyAttachedError, match="detach_rose"):
        attach_rose(model, ROSEConfig())
    detach_rose(model)
    attach_rose(model, ROSEConfig())


def test_fields_survive_a_round_trip(tmp_path):
    config = ROSEConfig(strategy="first_order", upper_quantile=0.6, gamma=0.3, target_modules=["query"])
    config.save_pretrained(str(tmp_path))
    loaded = ROSEConfig.from_pretrained(str(tmp_path))
    for name in ("strategy", "upper_quantile", "lower_quantile", "gamma", "warmup_steps", "dropout"):
        assert getattr(loaded, name) == getattr(config, name)
    assert set(loaded.target_modules) == {"query"}
