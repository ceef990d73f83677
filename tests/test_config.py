"""Bad settings and unsuitable models end in one clear, typed error, and leave the model as it was."""

from __future__ import annotations

import dataclasses
import gc
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from rose_peft import (
    AlreadyAttachedError,
    ROSEConfig,
    RoseConfigError,
    RoseError,
    RoseInactiveError,
    TargetModulesError,
    UnsupportedModelError,
    UnsupportedOptimizerError,
    attach_rose,
    detach_rose,
    get_selector,
)
from rose_peft.hooks import _global_handles, observers
from tests.helpers.tiny import SIZES, batch, tiny_bert
from tests.helpers.training import optimizer_of, step, train, train_watched

LORA = {"r": 2, "target_modules": ["query", "value"]}


def fingerprint(model: nn.Module) -> list[Any]:
    """Everything that a half-made attachment would leave behind."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
    return [
        [(name, type(module)) for name, module in model.named_modules()],
        [(name, param.requires_grad, param.data_ptr()) for name, param in model.named_parameters()],
        [(name, len(getattr(module, kind))) for name, module in model.named_modules() for kind in kinds],
        [(name, module.p) for name, module in model.named_modules() if isinstance(module, nn.Dropout)],
        sorted(name for name in model.__dict__ if "rose" in name or name == "peft_config"),
        model.training,
    ]


def one_clear_message(error: BaseException) -> str:
    message = str(error)
    assert "\n" not in message
    assert 20 < len(message) < 700, message
    return message


# Fields -------------------------------------------------------------------------------------------------------------

SAMPLED = {"risk_pass": "sampled"}
BAD: list[tuple[dict[str, Any], list[str]]] = [
    ({"strategy": "third_order"}, ["strategy='third_order'", "first_order, second_order, ensemble"]),
    ({"strategy": "none"}, ["strategy='none'", "first_order, second_order, ensemble"]),
    ({"strategy": None}, ["strategy=None", "first_order, second_order, ensemble"]),
    ({"upper_quantile": 1.1}, ["upper_quantile=1.1", "[0, 1]"]),
    ({"upper_quantile": 70}, ["upper_quantile=70", "[0, 1]", "70 percent is 0.7"]),
    ({"upper_quantile": "0.7"}, ["upper_quantile='0.7'", "[0, 1]"]),
    ({"upper_quantile": True}, ["upper_quantile=True", "[0, 1]"]),
    ({"upper_quantile": float("nan")}, ["upper_quantile=nan", "[0, 1]"]),
    ({"upper_quantile": None}, ["upper_quantile=None", "[0, 1]"]),
    ({"lower_quantile": -0.1}, ["lower_quantile=-0.1", "[0, 1]"]),
    ({"lower_quantile": 10}, ["lower_quantile=10", "10 percent is 0.1"]),
    ({"lower_quantile": 0.7}, ["lower_quantile=0.7", "upper_quantile=0.7", "Lower the first or raise the second"]),
    ({"lower_quantile": 0.9}, ["lower_quantile=0.9", "upper_quantile=0.7"]),
    ({"gamma": -0.5}, ["gamma=-0.5", "[0, 1]"]),
    ({"gamma": 2}, ["gamma=2", "[0, 1]"]),
    ({"gamma": True}, ["gamma=True", "[0, 1]"]),
    ({"gamma": float("inf")}, ["gamma=inf", "[0, 1]"]),
    ({"gamma": 0.3, "strategy": "first_order"}, ["gamma=0.3", "no effect", "'first_order'", "choose 'ensemble'"]),
    ({"gamma": 0.3, "strategy": "second_order"}, ["gamma=0.3", "no effect", "'second_order'", "choose 'ensemble'"]),
    ({"head": "causal", "strategy": "second_order"}, ["head='causal'", "no effect", "'first_order' or 'ensemble'"]),
    ({"warmup_steps": -1}, ["warmup_steps=-1", "integer >= 0"]),
    ({"warmup_steps": 0.1}, ["warmup_steps=0.1", "integer >= 0"]),
    ({"warmup_steps": True}, ["warmup_steps=True", "integer >= 0"]),
    ({"dropout": 0}, ["dropout=0 ", "(0, 1)", "None for the model's own"]),
    ({"dropout": 0.0}, ["dropout=0.0", "(0, 1)", "None for the model's own"]),
    ({"dropout": 1.0}, ["dropout=1.0", "(0, 1)"]),
    ({"dropout": "0.1"}, ["dropout='0.1'", "(0, 1)"]),
    ({"dropout": True}, ["dropout=True", "(0, 1)"]),
    ({"dropout": float("nan")}, ["dropout=nan", "(0, 1)"]),
    ({"risk_pass": "half"}, ["risk_pass='half'", "paired, sampled"]),
    ({"risk_pass": None}, ["risk_pass=None", "paired, sampled"]),
    ({**SAMPLED, "risk_interval": 0}, ["risk_interval=0", "optimizer steps", "integer >= 1"]),
    ({**SAMPLED, "risk_interval": 2.0}, ["risk_interval=2.0", "integer >= 1"]),
    ({**SAMPLED, "risk_interval": True}, ["risk_interval=True", "integer >= 1"]),
    ({**SAMPLED, "risk_fraction": 0}, ["risk_fraction=0 ", "(0, 1]"]),
    ({**SAMPLED, "risk_fraction": 1.01}, ["risk_fraction=1.01", "(0, 1]"]),
    ({**SAMPLED, "risk_fraction": True}, ["risk_fraction=True", "(0, 1]"]),
    ({**SAMPLED, "risk_fraction": float("nan")}, ["risk_fraction=nan", "(0, 1]"]),
    ({**SAMPLED, "risk_smoothing": 1}, ["risk_smoothing=1 ", "[0, 1)"]),
    ({**SAMPLED, "risk_smoothing": -0.1}, ["risk_smoothing=-0.1", "[0, 1)"]),
    ({**SAMPLED, "risk_smoothing": "0.5"}, ["risk_smoothing='0.5'", "[0, 1)"]),
    ({**SAMPLED, "risk_smoothing": float("nan")}, ["risk_smoothing=nan", "[0, 1)"]),
    ({"risk_pass": "paired", "risk_interval": 2}, ["risk_interval=2", "risk_pass='paired'", "risk_pass='sampled'"]),
    ({"risk_pass": "paired", "risk_fraction": 1.0}, ["risk_fraction=1.0", "no effect", "risk_pass='sampled'"]),
    ({"risk_pass": "paired", "risk_smoothing": 0.9}, ["risk_smoothing=0.9", "no effect", "risk_pass='sampled'"]),
    ({**SAMPLED, "strategy": "second_order"}, ["risk_pass='sampled'", "second_order", "'first_order' or 'ensemble'"]),
    ({"base_config": "lora"}, ["base_config='lora'", "LoraConfig(r=8)"]),
    ({"base_config": ROSEConfig()}, ["base_config", "itself a ROSEConfig", "LoraConfig(r=8)"]),
    ({"base_config": peft.PromptTuningConfig(num_virtual_tokens=2)}, ["base_config", "PROMPT_TUNING", "LoraConfig"]),
    (
        {"base_config": LoraConfig(**LORA), "target_modules": ["key"]},
        ["target_modules={'key'}", "base_config", "set target_modules on the LoraConfig"],
    ),
    (
        {"base_config": LoraConfig(**LORA), "exclude_modules": "key"},
        ["exclude_modules='key'", "base_config", "set exclude_modules on the LoraConfig"],
    ),
    (
        {"base_config": LoraConfig(**LORA, task_type="SEQ_CLS"), "task_type": "TOKEN_CLS"},
        ["task_type='TOKEN_CLS'", "base_config.task_type='SEQ_CLS'", "one of them only"],
    ),
]


@pytest.mark.parametrize("fields, found", BAD, ids=[str(fields)[:60] for fields, _ in BAD])
def test_bad_fields_name_field_value_and_way_out(fields: dict[str, Any], found: list[str]) -> None:
    with pytest.raises(RoseConfigError) as caught:
        ROSEConfig(**fields)
    message = one_clear_message(caught.value)
    for part in found:
        assert part in message
    assert isinstance(caught.value, RoseError) and isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    "fields",
    [
        {"upper_quantile": 1, "lower_quantile": 0},
        {"upper_quantile": 1.0, "lower_quantile": 0.999},
        {"gamma": 0},
        {"gamma": 1},
        {"warmup_steps": 0},
        {"dropout": 1e-3},
        {"strategy": "first_order", "upper_quantile": 0.01},
        {**SAMPLED, "risk_interval": 1, "risk_fraction": 1, "risk_smoothing": 0},
        {**SAMPLED, "risk_interval": 1000, "risk_fraction": 1e-6, "risk_smoothing": 0.999},
    ],
    ids=str,
)
def test_values_at_the_border_are_fine(fields: dict[str, Any]) -> None:
    config = ROSEConfig(**fields)
    assert {name: getattr(config, name) for name in fields} == fields


def test_an_unknown_field_is_refused() -> None:
    with pytest.raises(TypeError, match="upper_quantil'"):
        ROSEConfig(upper_quantil=0.7)  # type: ignore[call-arg]


def test_every_field_has_help_and_defaults_are_those_of_the_readme() -> None:
    own = {field.name: field for field in dataclasses.fields(ROSEConfig)}
    for inherited in dataclasses.fields(peft.PeftConfig):
        own.pop(inherited.name, None)
    assert {name: field.default for name, field in own.items()} == {
        "strategy": "ensemble",
        "upper_quantile": 0.7,
        "lower_quantile": 0.0,
        "gamma": 0.5,
        "warmup_steps": 0,
        "risk_pass": "paired",
        "risk_interval": 8,
        "risk_fraction": 0.25,
        "risk_smoothing": 0.5,
        "skip_frozen_gradients": False,
        "dropout": None,
        "head": None,
        "target_modules": None,
        "exclude_modules": None,
        "modules_to_save": None,
        "original_weights": "keep",
        "base_config": None,
    }
    assert all(len(field.metadata.get("help", "")) > 20 for field in own.values())
    assert all(f"{name}:" in (ROSEConfig.__doc__ or "") for name in own)


# Models -------------------------------------------------------------------------------------------------------------


def refused(model: nn.Module, config: ROSEConfig, error: type[RoseError], attach: Any = get_peft_model) -> str:
    """The message; model and config must be what they were."""
    before, settings = fingerprint(model), config.to_dict()
    with pytest.raises(error) as caught:
        attach(model, config)
    assert fingerprint(model) == before
    assert config.to_dict() | {"task_type": None, "base_model_name_or_path": None} == settings | {
        "task_type": None,
        "base_model_name_or_path": None,
        "modules_to_save": config.modules_to_save,  # PEFT adds the heads of the task
    }
    return one_clear_message(caught.value)


def still_works(model: nn.Module) -> None:
    """After a refusal the same model can be attached properly and trained."""
    tuned = get_peft_model(model, ROSEConfig(task_type="SEQ_CLS"))
    train_watched(tuned, batch(tuned))


@pytest.mark.parametrize("targets", [["q_proj"], r".*\.q_proj", "query|", []])
def test_targets_that_match_nothing(targets: Any) -> None:
    model = tiny_bert()
    message = refused(model, ROSEConfig(target_modules=targets, dropout=0.3), TargetModulesError)
    assert "target_modules=" in message and "bert.embeddings.word_embeddings" in message
    still_works(model)


def test_targets_without_weights_to_mask() -> None:
    """The module exists and has parameters, but none that could be a unit."""
    model = tiny_bert()
    model.classifier.weight = None  # a head of biases only
    message = refused(model, ROSEConfig(target_modules=["classifier"], dropout=0.3), TargetModulesError)
    assert "target_modules={'classifier'} leaves no weight to mask" in message
    assert "bert.embeddings.word_embeddings" in message


def test_everything_excluded() -> None:
    model = tiny_bert()
    message = refused(model, ROSEConfig(exclude_modules=["bert", "classifier"]), TargetModulesError)
    assert "exclude_modules=" in message
    message = refused(model, ROSEConfig(exclude_modules=["encoder"], task_type="SEQ_CLS"), TargetModulesError)
    assert "leaves no weight to mask" in message
    still_works(model)


def test_everything_frozen() -> None:
    model = tiny_bert().requires_grad_(False)
    assert "every parameter of the model is frozen" in refused(model, ROSEConfig(), TargetModulesError)


class NoBlocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.drop = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.lin(x))


@pytest.mark.parametrize("attach", [get_peft_model, attach_rose])
def test_a_model_without_repeated_blocks(attach: Any) -> None:
    message = refused(NoBlocks(), ROSEConfig(dropout=0.5), TargetModulesError, attach)
    assert "target_modules=None" in message and "candidates: lin." in message


@pytest.mark.parametrize("attach", [get_peft_model, attach_rose])
@pytest.mark.parametrize("mark", ["is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized", "quantization_method"])
def test_a_quantized_base(mark: str, attach: Any) -> None:
    """Without a wrapper it is full fine-tuning all the same."""
    model = tiny_bert()
    setattr(model, mark, True)
    message = refused(model, ROSEConfig(), UnsupportedModelError, attach)
    assert f"model.{mark}=True" in message and "ROSEConfig(base_config=LoraConfig(...))" in message


@pytest.mark.parametrize("attach", [get_peft_model, attach_rose])
def test_a_base_with_integer_weights(attach: Any) -> None:
    model = tiny_bert()
    layer = model.bert.encoder.layer[0].output.dense
    layer.weight = nn.Parameter(torch.zeros(16, 32, dtype=torch.int8), requires_grad=False)
    message = refused(model, ROSEConfig(), UnsupportedModelError, attach)
    assert "bert.encoder.layer.0.output.dense.weight has an integer dtype" in message


def test_base_config_given_to_attach_rose() -> None:
    """attach_rose makes no adapter: without one, a base_config would silently mean full fine-tuning."""
    config = ROSEConfig(base_config=LoraConfig(**LORA))
    message = refused(tiny_bert(), config, RoseConfigError, attach_rose)
    assert "base_config=LoraConfig" in message and "get_peft_model" in message
    model = get_peft_model(tiny_bert(), LoraConfig(**LORA))
    attach_rose(model, config)  # the config that the adapter was made with may be used again
    train_watched(model, batch(model))


@pytest.mark.parametrize(
    ("base", "words"),
    [
        (LoraConfig(**{**LORA, "r": 7}), f"r=7 differs from the adapter's {LORA['r']}"),
        (LoraConfig(**LORA, use_dora=True), "use_dora=True differs from the adapter's False"),
        (IA3Config(), "IA3Config differs from the adapter's LoraConfig"),
    ],
)
def test_base_config_that_the_adapter_of_attach_rose_was_not_made_with(base: Any, words: str) -> None:
    model = get_peft_model(tiny_bert(), LoraConfig(**LORA))
    message = refused(model, ROSEConfig(base_config=base), RoseConfigError, attach_rose)
    assert words in message and "leave base_config out" in message


@pytest.mark.parametrize("spelled", ["all-linear", ".*(query|value)", ["query", "value"]])
def test_base_config_of_an_adapter_that_was_saved(spelled: Any, tmp_path: Path) -> None:
    """Saving and making an adapter spell modules out and leave notes, which is no other config."""
    config = ROSEConfig(task_type="SEQ_CLS", base_config=LoraConfig(r=2, lora_dropout=0.1, target_modules=spelled))
    get_peft_model(tiny_bert(), config).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny_bert(), tmp_path, is_trainable=True)
    attach_rose(model, config)
    train_watched(model, batch(model))


@pytest.mark.parametrize("where", ["cpu", "drop"])
def test_original_weights_given_to_attach_rose(where: Any) -> None:
    """It copies no weights, so there is nothing to put away; over the copies of get_peft_model it has been done."""
    config = ROSEConfig(original_weights=where)
    message = refused(tiny_bert(), config, RoseConfigError, attach_rose)
    assert f"original_weights={where!r} has no effect in attach_rose" in message and "get_peft_model" in message
    model = get_peft_model(tiny_bert(), config)
    detach_rose(model)
    attach_rose(model, config)
    train_watched(model, batch(model))


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
def test_modules_given_to_attach_rose_over_an_adapter(field: str) -> None:
    """Over an adapter its modules are the units; others would be ignored, so it says so."""
    model = get_peft_model(tiny_bert(), LoraConfig(**LORA))
    message = refused(model, ROSEConfig(**{field: ["query"]}), RoseConfigError, attach_rose)
    assert f"{field}={{'query'}} has no effect" in message and "adapter" in message


def test_modules_given_to_attach_rose_on_a_plain_model() -> None:
    model = tiny_bert()
    message = refused(model, ROSEConfig(exclude_modules=["query"]), RoseConfigError, attach_rose)
    assert "exclude_modules={'query'}" in message and "requires_grad_" in message
    selector = attach_rose(model, ROSEConfig(target_modules=["query"]))
    assert [unit.name for unit in selector.units] == [
        f"bert.encoder.layer.{i}.attention.self.query.weight" for i in (0, 1)
    ]
    train_watched(model, batch(model))


@pytest.mark.parametrize("inner", [None, "lora"])
def test_attaching_twice(inner: str | None) -> None:
    model = get_peft_model(tiny_bert(), ROSEConfig(base_config=LoraConfig(**LORA) if inner else None, dropout=0.2))
    assert "detach_rose(model)" in refused(model, ROSEConfig(dropout=0.4), AlreadyAttachedError, attach_rose)
    train_watched(model, batch(model))


# Training -----------------------------------------------------------------------------------------------------------


def test_a_model_without_logits() -> None:
    def headless() -> nn.Module:
        torch.manual_seed(0)
        return BertModel(BertConfig(**SIZES))

    model = get_peft_model(headless(), ROSEConfig()).train()
    inputs = {name: tensor for name, tensor in batch(tiny_bert()).items() if name != "labels"}
    with pytest.raises(UnsupportedModelError) as caught:
        model(**inputs)
    message = one_clear_message(caught.value)
    assert "no logits" in message and "strategy='second_order'" in message and "last_hidden_state" in message
    # What the message advises works.
    model = get_peft_model(headless(), ROSEConfig(strategy="second_order")).train()
    optimizer = optimizer_of(model)
    for _ in range(3):
        optimizer.zero_grad()
        model(**inputs).last_hidden_state.square().mean().backward()
        optimizer.step()
    assert (get_selector(model).state.last_mask == 0).any()


@pytest.mark.parametrize("strategy", ["first_order", "ensemble"])
def test_no_dropout_at_all(strategy: str) -> None:
    base = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = get_peft_model(base, ROSEConfig(strategy=strategy))
    with pytest.raises(RoseInactiveError) as caught:
        train(model, batch(model), steps=1)
    message = one_clear_message(caught.value)
    assert "dropout=None" in message and "ROSEConfig(dropout=0.1)" in message and "second_order" in message


@pytest.mark.parametrize("strategy", ["second_order", "ensemble"])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.RMSprop])
def test_no_momentum(strategy: str, kind: Any) -> None:
    model = get_peft_model(tiny_bert(), ROSEConfig(strategy=strategy)).train()
    optimizer = kind(model.parameters(), lr=0.1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UnsupportedOptimizerError) as caught:
        step(model, optimizer, batch(model))
    message = one_clear_message(caught.value)
    assert kind.__name__ in message and f"strategy='{strategy}'" in message and "first_order" in message
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()), "nothing stepped"


def test_a_closure() -> None:
    model = get_peft_model(tiny_bert(), ROSEConfig()).train()
    optimizer = optimizer_of(model)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(**batch(model)).loss
        loss.backward()
        return loss

    with pytest.raises(UnsupportedOptimizerError) as caught:
        optimizer.step(closure)
    assert "closure" in one_clear_message(caught.value)


def test_an_optimizer_that_holds_nothing_of_ours() -> None:
    """Made before get_peft_model: it steps the frozen originals, and ROSE never acts."""
    base = tiny_bert()
    optimizer = torch.optim.AdamW(base.parameters())
    model = get_peft_model(base, ROSEConfig()).train()
    with pytest.raises(RoseInactiveError) as caught:
        for _ in range(40):
            model(**batch(model)).loss.backward()
            optimizer.step()
    assert "after get_peft_model" in one_clear_message(caught.value)


def test_reentrant_checkpointing() -> None:
    model = get_peft_model(tiny_bert(), ROSEConfig())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(RoseInactiveError) as caught:
        train(model, batch(model), steps=1)
    assert "use_reentrant" in one_clear_message(caught.value)


def test_no_global_hook_outlives_the_last_model() -> None:
    gc.collect()
    others = len(observers())
    model = get_peft_model(tiny_bert(), ROSEConfig())
    assert len(observers()) == others + 1 and _global_handles
    detach_rose(model)
    assert len(observers()) == others
    assert bool(_global_handles) == bool(others)
