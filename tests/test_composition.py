"""ROSE over another PEFT method: PEFT sees the plain inner adapter, and ROSE steers its training."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from safetensors.torch import load_file
from torch import nn
from transformers import BertConfig, BertForQuestionAnswering, BertForTokenClassification

from rose_peft import (
    AlreadyAttachedError,
    ROSEConfig,
    RoseConfigError,
    RoseError,
    attach_rose,
    detach_rose,
    get_selector,
)
from tests.helpers.tiny import SIZES, batch, tiny_bert
from tests.helpers.training import changed, optimizer_of, outputs, snapshot, step, train, train_watched, trainable
from tests.helpers.window import figures_of

QUERY_VALUE = [f"bert.encoder.layer.{i}.attention.self.{name}" for i in (0, 1) for name in ("query", "value")]
NORMS = [f"bert.encoder.layer.{i}.{name}.LayerNorm" for i in (0, 1) for name in ("attention.output", "output")]


@dataclass(frozen=True)
class Method:
    """One PEFT method.

    Args:
        tensors: How many tensors of its adapter one module has.
        units: Modules that are units.
    """

    name: str
    config: Callable[..., PeftConfig]
    tensors: int
    fields: dict[str, Any]
    units: tuple[str, ...] = tuple(QUERY_VALUE)

    def inner(self, **fields: Any) -> PeftConfig:
        return self.config(**{"target_modules": ["query", "value"], **copy.deepcopy(self.fields), **fields})

    def tuned(self, **fields: Any) -> PeftModel:
        torch.manual_seed(3)  # adapters are random
        return get_peft_model(tiny_bert(), ROSEConfig(task_type="SEQ_CLS", base_config=self.inner(), **fields))

    def plain(self) -> PeftModel:
        torch.manual_seed(3)
        return get_peft_model(tiny_bert(), self.inner(task_type="SEQ_CLS"))


IA3 = {"target_modules": ["query", "value", "output.dense"], "feedforward_modules": ["output.dense"]}
ADALORA = {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 2, "deltaT": 1, "total_step": 8}
BLOCK_NORMS = {"target_modules": r".*layer\..*LayerNorm"}
METHODS = [
    Method("LoRA", LoraConfig, 2, {"r": 2}),
    Method("DoRA", LoraConfig, 3, {"r": 2, "use_dora": True}),
    Method("rsLoRA", LoraConfig, 2, {"r": 2, "use_rslora": True}),
    Method(
        "IA3",
        peft.IA3Config,
        1,
        IA3,
        units=tuple(
            f"bert.encoder.layer.{i}.{name}"
            for i in (0, 1)
            for name in ("attention.self.query", "attention.self.value", "attention.output.dense", "output.dense")
        ),
    ),
    Method("AdaLoRA", peft.AdaLoraConfig, 3, ADALORA),
    Method("LoHa", peft.LoHaConfig, 4, {"r": 2}),
    Method("LoKr", peft.LoKrConfig, 2, {"r": 2}),
    Method("OFT", peft.OFTConfig, 1, {"oft_block_size": 4}),
    Method("BOFT", peft.BOFTConfig, 2, {"boft_block_size": 4}),
    Method("VeRA", peft.VeraConfig, 2, {"r": 4}),
    Method("LN tuning", peft.LNTuningConfig, 2, BLOCK_NORMS, units=tuple(NORMS)),
    Method("HRA", peft.HRAConfig, 1, {"r": 2}),
    Method("FourierFT", peft.FourierFTConfig, 1, {"n_frequency": 20}),
    Method("SHiRA", peft.ShiraConfig, 1, {"r": 2}),
    Method("MiSS", peft.MissConfig, 1, {"r": 4}),
    Method("RandLoRA", peft.RandLoraConfig, 2, {"r": 2}),
    Method("RoAd", peft.RoadConfig, 2, {"group_size": 4}),
]
LORA, ADA = METHODS[0], METHODS[4]
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
pytestmark = pytest.mark.filterwarnings("ignore:.*(PRNG|projection|fan_in_fan_out|shira_indices|VeRA|vera).*")


def between(model: PeftModel, method: Method) -> Callable[[int], None] | None:
    """What the method's users call between the optimizer's step and zero_grad."""
    return model.base_model.update_and_allocate if method.name == "AdaLoRA" else None


@every_method
def test_one_unit_per_module_with_all_its_tensors(method: Method) -> None:
    model = method.tuned()
    units = get_selector(model).units
    assert [unit.name for unit in units] == list(method.units)
    assert [len(unit.parameters()) for unit in units] == [method.tensors] * len(units)
    inside = {id(param) for unit in units for param in unit.parameters()}
    adapter = {id(p) for n, p in model.named_parameters() if p.requires_grad and "modules_to_save" not in n}
    assert inside == adapter, "every adapter tensor belongs to a unit, and nothing else does"
    assert sum(len(unit.parameters()) for unit in units) == len(inside), "and to one only"


@every_method
def test_peft_sees_the_inner_method(method: Method) -> None:
    model, plain = method.tuned(), method.plain()
    assert model.peft_type == plain.peft_type
    assert type(model) is type(plain) is peft.PeftModelForSequenceClassification
    assert type(model.base_model) is PEFT_TYPE_TO_TUNER_MAPPING[plain.peft_type]
    assert type(model.peft_config["default"]) is type(plain.peft_config["default"])
    assert model.active_peft_config.to_dict() == plain.active_peft_config.to_dict()
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]
    assert model.get_nb_trainable_parameters() == plain.get_nb_trainable_parameters()
    assert model.get_model_status().peft_types == plain.get_model_status().peft_types
    assert torch.equal(outputs(model, batch(model)), outputs(plain, batch(plain)))


@every_method
@pytest.mark.parametrize("strategy", ["ensemble", "second_order"])
def test_three_steps_with_masks(method: Method, strategy: str) -> None:
    model = method.tuned(strategy=strategy)
    before = {name: tensor for name, tensor in snapshot(model).items() if name not in trainable(model)}
    masks = torch.stack(train_watched(model, batch(model), steps=4, after_step=between(model, method)))
    assert (masks < 1).any() and (masks > 0).any()
    assert (masks[1:].std(dim=0) > 0).any() or (masks[-1].std() > 0), "not every unit has the same mask"
    moved = {name for name, tensor in before.items() if not torch.equal(model.state_dict()[name], tensor)}
    assert not {name for name in moved if "ranknum" not in name}, "the base model stays as it is"


@every_method
def test_only_masks_tell_it_from_plain_training(method: Method) -> None:
    """With everything kept and one pass, ROSE over a method is that method, to the last bit."""
    rose, plain = method.tuned(strategy="second_order", upper_quantile=1.0), method.plain()
    states = []
    for model in (rose, plain):
        model.train()
        optimizer = optimizer_of(model)
        torch.manual_seed(0)
        for index in range(3):
            optimizer.zero_grad()
            model(**batch(model)).loss.backward()
            optimizer.step()
            if method.name == "AdaLoRA":
                model.base_model.update_and_allocate(index)
        states.append(snapshot(model))
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name
    assert get_selector(rose).statistics().steps == 3


LOAD_WITHOUT_ROSE = """
import json, sys, warnings
import torch
from peft import PeftModel
from transformers import BertForSequenceClassification

warnings.simplefilter("ignore")
torch.set_num_threads(1)
result = {}
inputs = torch.load(sys.argv[1] + "/inputs.pt")
for name in sys.argv[2:]:
    base = BertForSequenceClassification.from_pretrained(sys.argv[1] + "/base", attn_implementation="eager")
    model = PeftModel.from_pretrained(base, sys.argv[1] + "/" + name).eval()
    with torch.no_grad():
        logits = model(**inputs).logits
    expected = torch.load(sys.argv[1] + "/" + name + "/logits.pt")
    result[name] = [type(model.base_model).__name__, torch.equal(logits, expected)]
assert not any(module.split(".")[0] == "rose_peft" for module in sys.modules)
print(json.dumps(result))
"""


def _config_values(path: Path) -> dict[str, Any]:
    """A saved config; PEFT writes sets as lists in any order."""
    values = json.loads(path.read_text())
    return {key: sorted(value) if isinstance(value, list) else value for key, value in values.items()}


def test_saved_adapters_are_plain_and_load_without_this_package(tmp_path) -> None:
    """One fresh process for all methods; it never imports rose_peft, and gets the same logits to the last bit."""
    expected = {}
    base = tiny_bert()
    base.save_pretrained(tmp_path / "base")
    inputs = {name: tensor for name, tensor in batch(base).items() if name != "labels"}
    torch.save(inputs, tmp_path / "inputs.pt")
    for method in METHODS:
        model, plain = method.tuned(), method.plain()
        train(model, batch(model), steps=4)
        folder, plain_folder = tmp_path / method.name, tmp_path / "plain" / method.name
        model.save_pretrained(folder)
        plain.save_pretrained(plain_folder)
        torch.save(outputs(model, batch(model)), folder / "logits.pt")
        assert not torch.equal(outputs(model, batch(model)), outputs(plain, batch(plain)))
        saved, plain_saved = (_config_values(f / "adapter_config.json") for f in (folder, plain_folder))
        assert {key: value for key, value in saved.items() if value != plain_saved.get(key, ...)} == {}
        assert saved.keys() == plain_saved.keys()
        weights, plain_weights = (load_file(f / "adapter_model.safetensors") for f in (folder, plain_folder))
        assert weights.keys() == plain_weights.keys()
        assert "import rose_peft" not in (folder / "README.md").read_text()  # loading it needs no more than PEFT
        expected[method.name] = [type(plain.base_model).__name__, True]
    names = [method.name for method in METHODS]
    command = [sys.executable, "-c", LOAD_WITHOUT_ROSE, str(tmp_path), *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == expected


# Further adapters ---------------------------------------------------------------------------------------------------


@every_method
def test_a_further_adapter_is_steered_when_it_is_active(method: Method) -> None:
    if method.name == "AdaLoRA":
        pytest.skip("PEFT: AdaLoRA trains one adapter at a time")
    model = method.tuned()
    train(model, batch(model))
    first = outputs(model, batch(model))
    model.add_adapter("other", method.inner(task_type="SEQ_CLS"))
    model.set_adapter("other")
    before = snapshot(model)
    masks = torch.stack(train_watched(model, batch(model), steps=4))
    assert (masks < 1).any() and (masks > 0).any()
    moved = changed(model, before)
    assert moved and not {name for name in moved if ".other" not in name}
    model.set_adapter("default")
    assert torch.equal(outputs(model, batch(model)), first)
    train_watched(model, batch(model))
    model.delete_adapter("other")
    train_watched(model, batch(model))


def test_statistics_go_on_when_an_adapter_is_added() -> None:
    model = LORA.tuned()
    train(model, batch(model))
    model.add_adapter("other", LORA.inner(target_modules=["key"]))
    train(model, batch(model))
    statistics = get_selector(model).statistics()
    assert statistics.steps == 6
    assert set(statistics.units) == set(QUERY_VALUE)  # those of the adapter that trains


def test_a_rose_config_as_further_adapter_over_an_inner_method() -> None:
    """PEFT takes it for another type beside LoRA; whatever it says, the first adapter must go on."""
    model = LORA.tuned()
    with pytest.raises((RoseError, ValueError)) as caught:
        model.add_adapter("other", ROSEConfig(task_type="SEQ_CLS", base_config=LORA.inner()))
    assert "LORA" in str(caught.value) or "base_config" in str(caught.value)
    assert list(model.peft_config) == ["default"]
    train_watched(model, batch(model))


# Fields on either config --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["rose", "inner"])
def test_task_type_and_modules_to_save_on_either_config(side: str, tmp_path) -> None:
    fields = {"task_type": "SEQ_CLS", "modules_to_save": ["pooler"]}
    inner = LoraConfig(r=2, target_modules=["query", "value"], **(fields if side == "inner" else {}))
    model = get_peft_model(tiny_bert(), ROSEConfig(base_config=inner, **(fields if side == "rose" else {})))
    assert type(model) is peft.PeftModelForSequenceClassification
    saved = model.peft_config["default"]
    assert saved.task_type == TaskType.SEQ_CLS
    assert set(saved.modules_to_save) == {"pooler", "classifier", "score"}
    before = snapshot(model)
    train_watched(model, batch(model))
    moved = changed(model, before)
    for name in ("bert.pooler.modules_to_save.default.dense.weight", "classifier.modules_to_save.default.weight"):
        assert f"base_model.model.{name}" in moved
    assert [unit.name for unit in get_selector(model).units] == QUERY_VALUE
    trained = outputs(model, batch(model))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_bert(), tmp_path)
    assert type(loaded) is peft.PeftModelForSequenceClassification
    assert torch.equal(outputs(loaded, batch(loaded)), trained)


@pytest.mark.parametrize("task_type, head", [("TOKEN_CLS", "classifier"), ("QUESTION_ANS", "qa_outputs")])
@pytest.mark.parametrize("full", [False, True])
def test_heads_that_peft_names_late(task_type: str, head: str, full: bool, tmp_path) -> None:
    """For these tasks PEFT adds the head to modules_to_save after it has built the tuner."""

    def base() -> nn.Module:
        torch.manual_seed(0)
        kind = BertForTokenClassification if task_type == "TOKEN_CLS" else BertForQuestionAnswering
        return kind(BertConfig(**SIZES))

    inputs = batch(base())
    labels = inputs.pop("labels")
    if task_type == "TOKEN_CLS":
        inputs["labels"] = inputs["input_ids"] % 2
    else:
        inputs |= {"start_positions": labels, "end_positions": labels + 1}
    inner = LoraConfig(r=2, target_modules=["query", "value"])
    model = get_peft_model(base(), ROSEConfig(task_type=task_type, base_config=None if full else inner))
    before = snapshot(model)
    train_watched(model, inputs)
    moved = {name for name in changed(model, before) if f".{head}." in name}
    assert moved == {f"base_model.model.{head}.modules_to_save.default.{name}" for name in ("weight", "bias")}
    trained = outputs(model, inputs)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path)
    assert torch.equal(outputs(loaded, inputs), trained)
    assert type(loaded) is type(model) is not PeftModel
    if not full:
        plain = get_peft_model(base(), LORA.inner(task_type=task_type))
        assert set(model.peft_config["default"].modules_to_save) == set(plain.peft_config["default"].modules_to_save)
        assert model.get_nb_trainable_parameters() == plain.get_nb_trainable_parameters()


def test_modules_to_save_on_both_add_up_and_task_types_must_agree() -> None:
    inner = LoraConfig(r=2, target_modules=["query"], modules_to_save=["pooler"], task_type="SEQ_CLS")
    config = ROSEConfig(base_config=inner, modules_to_save=["classifier"])
    assert config.modules_to_save == ["classifier", "pooler"]
    with pytest.raises(RoseConfigError, match=r"task_type='CAUSAL_LM' differs from base_config.task_type='SEQ_CLS'"):
        ROSEConfig(base_config=inner, task_type="CAUSAL_LM")


def test_the_given_configs_are_not_changed() -> None:
    inner = LoraConfig(r=2, target_modules=["query", "value"])
    config = ROSEConfig(task_type="SEQ_CLS", base_config=inner)
    before = copy.deepcopy(inner.to_dict())
    first = get_peft_model(tiny_bert(), config)
    assert inner.to_dict() == before
    assert config.base_config is inner
    second = get_peft_model(tiny_bert(), config)
    assert first.peft_config["default"] is not second.peft_config["default"]
    train_watched(second, batch(second))


@pytest.mark.parametrize("task_type", [None, "SEQ_CLS", "FEATURE_EXTRACTION"])
def test_with_and_without_a_task_type(task_type: str | None) -> None:
    """PEFT calls the tuner for some task types and the base model, past the tuner, for others."""
    inner = LoraConfig(r=2, target_modules=["query", "value"])
    model = get_peft_model(tiny_bert(), ROSEConfig(task_type=task_type, base_config=inner))
    masks = torch.stack(train_watched(model, batch(model)))
    assert (masks < 1).any()
    assert get_selector(model).statistics().steps == 3


@pytest.mark.parametrize("task_type", [None, "SEQ_CLS"])
def test_one_risk_pass_per_forward_call(task_type: str | None) -> None:
    """However PEFT routes the call, the risk pass must run once: two passes through the model, and no more."""
    inner = LoraConfig(r=2, target_modules=["query", "value"])
    model = get_peft_model(tiny_bert(), ROSEConfig(task_type=task_type, base_config=inner))
    calls = []
    model.get_base_model().bert.register_forward_hook(lambda *_: calls.append(1))
    model.train()
    for _ in range(2):
        model(**batch(model))
    assert len(calls) == 4
    assert figures_of(get_selector(model)).passes == 2
    model.get_base_model()(**batch(model))
    assert len(calls) == 6


def test_merging_over_an_inner_method() -> None:
    model = LORA.tuned()
    train(model, batch(model))
    trained = outputs(model, batch(model))
    merged = model.merge_and_unload()
    torch.testing.assert_close(outputs(merged, batch(merged)), trained, rtol=1e-4, atol=1e-5)
    # The selector went with the tuner: what remains is a plain model that trains as plain models do.
    with pytest.raises(RoseError, match="not attached"):
        get_selector(merged)
    merged.requires_grad_(True)
    merged.train()
    plain = copy.deepcopy(merged)
    for candidate in (merged, plain):
        torch.manual_seed(0)
        optimizer = optimizer_of(candidate)
        for _ in range(2):
            optimizer.zero_grad()
            candidate(**batch(candidate)).loss.backward()
            optimizer.step()
    assert not changed(merged, snapshot(plain))


def test_dropout_after_a_merge_is_that_of_the_next_adapter() -> None:
    """The selector of a merged adapter puts the old dropout back before the next one sets its own, not later."""
    model = LORA.tuned(dropout=0.3)
    train(model, batch(model))
    merged = model.merge_and_unload()
    again = get_peft_model(merged, ROSEConfig(task_type="SEQ_CLS", base_config=LORA.inner(), dropout=0.2))
    train_watched(again, batch(again))
    assert {m.p for m in merged.modules() if isinstance(m, nn.Dropout)} == {0.2}
    detach_rose(again)
    assert {m.p for m in merged.modules() if isinstance(m, nn.Dropout)} == {0.1}


# attach_rose and detach_rose ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [LORA, METHODS[3], METHODS[9]], ids=lambda method: method.name)
def test_attach_to_a_loaded_adapter(method: Method, tmp_path) -> None:
    model = method.tuned()
    train(model, batch(model))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_bert(), tmp_path, is_trainable=True)
    with pytest.raises(RoseError, match="not attached"):
        get_selector(loaded)
    selector = attach_rose(loaded, ROSEConfig(strategy="first_order"))
    assert get_selector(loaded) is selector
    assert [unit.name for unit in selector.units] == list(method.units)
    masks = torch.stack(train_watched(loaded, batch(loaded)))
    assert (masks == 0).any()


def test_attach_gives_the_same_training_as_get_peft_model() -> None:
    model, plain = LORA.tuned(), LORA.plain()
    attach_rose(plain, ROSEConfig())
    for candidate in (model, plain):
        train(candidate, batch(candidate))
    assert not changed(plain, snapshot(model))


def test_attach_to_a_plain_model() -> None:
    model = tiny_bert()
    before = [name for name, _ in model.named_modules()]
    selector = attach_rose(model, ROSEConfig(strategy="first_order"))
    assert len(selector.units) == 16
    masks = torch.stack(train_watched(model, batch(model)))
    assert (masks == 0).any()
    detach_rose(model)
    assert [name for name, _ in model.named_modules()] == before


def hook_count(model: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


@pytest.mark.parametrize("full", [False, True])
def test_detach_takes_everything_off(full: bool) -> None:
    plain = get_peft_model(tiny_bert(), LORA.inner(task_type="SEQ_CLS"))
    config = ROSEConfig(dropout=0.3, task_type="SEQ_CLS", base_config=None if full else LORA.inner())
    model = get_peft_model(tiny_bert(), config)
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.3}
    train(model, batch(model))
    flags, steps = trainable(model), get_selector(model).statistics().steps
    detach_rose(model)
    assert hook_count(model) == hook_count(plain) == 0
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.1}
    assert trainable(model) == flags
    assert steps == 3
    with pytest.raises(RoseError, match="not attached"):
        detach_rose(model)
    # What trains now trains unmasked, and one pass is one pass.
    calls = []
    model.get_base_model().bert.register_forward_hook(lambda *_: calls.append(1))
    before = snapshot(model)
    optimizer = optimizer_of(model)
    model(**batch(model)).loss.backward()
    optimizer.step()
    assert len(calls) == 1
    assert all(name in changed(model, before) for name in flags)
    attach_rose(model, config)
    train_watched(model, batch(model))


def test_attaching_twice_is_refused() -> None:
    for model in (LORA.tuned(), get_peft_model(tiny_bert(), ROSEConfig())):
        with pytest.raises(AlreadyAttachedError, match="detach_rose"):
            attach_rose(model, ROSEConfig())
        train_watched(model, batch(model))


@pytest.mark.parametrize("inner", [None, "lora"])
def test_wrapping_a_model_that_has_rose_is_refused(inner: str | None) -> None:
    base = tiny_bert()
    attach_rose(base, ROSEConfig())
    names = [name for name, _ in base.named_modules()]
    config = ROSEConfig(base_config=LORA.inner() if inner else None)
    with pytest.raises(AlreadyAttachedError, match="detach_rose"):
        get_peft_model(base, config)
    assert [name for name, _ in base.named_modules()] == names
    train_watched(base, batch(base))


# AdaLoRA ------------------------------------------------------------------------------------------------------------


def test_adalora_reads_real_gradients_after_the_step() -> None:
    """Its importance is made of the gradients that lie there after the step: of the loss, not blended."""
    model = ADA.tuned(strategy="first_order", upper_quantile=0.3)
    model.train()
    optimizer = optimizer_of(model)
    torch.manual_seed(0)
    for index in range(4):
        optimizer.zero_grad()
        model(**batch(model)).loss.backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        for name, param in model.named_parameters():
            if name in gradients:
                assert torch.equal(param.grad, gradients[name]), name
        model.base_model.update_and_allocate(index)
    assert (get_selector(model).state.last_mask == 0).any()


def test_adalora_prunes_ranks_under_rose() -> None:
    model = ADA.tuned()
    train_watched(model, batch(model), steps=7, after_step=model.base_model.update_and_allocate)
    pattern = model.peft_config["default"].rank_pattern
    assert pattern and sum(sum(kept) for kept in pattern.values()) == 2 * len(QUERY_VALUE)


# Refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "inner",
    [
        peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2),
        peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2),
        peft.PromptEncoderConfig(task_type="SEQ_CLS", num_virtual_tokens=2),
        peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=2, adapter_layers=1),
    ],
    ids=lambda config: type(config).__name__,
)
def test_prompt_learning_is_refused(inner: PeftConfig) -> None:
    with pytest.raises(RoseConfigError, match=r"base_config of type \w+ is not supported.*LoraConfig"):
        ROSEConfig(base_config=inner)


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
def test_targets_beside_a_base_config_are_refused(field: str) -> None:
    with pytest.raises(
        RoseConfigError, match=rf"{field}=\{{'query'\}} has no meaning beside a base_config.*LoraConfig"
    ):
        ROSEConfig(base_config=LORA.inner(), **{field: ["query"]})


def test_rose_in_rose_is_refused() -> None:
    with pytest.raises(RoseConfigError, match="base_config is itself a ROSEConfig"):
        ROSEConfig(base_config=ROSEConfig())


@pytest.mark.parametrize("value", ["lora", 8, LoraConfig])
def test_what_is_no_config_is_refused(value: Any) -> None:
    with pytest.raises(RoseConfigError, match=r"base_config=.* not a PEFT config.*LoraConfig\(r=8\)"):
        ROSEConfig(base_config=value)


def test_a_base_config_without_a_match_leaves_the_model_alone() -> None:
    base = tiny_bert()
    names, flags = [name for name, _ in base.named_modules()], trainable(base)
    with pytest.raises(ValueError, match=r"[Tt]arget modules \{'q_proj'\} not found"):
        get_peft_model(base, ROSEConfig(base_config=LoraConfig(target_modules=["q_proj"])))
    assert [name for name, _ in base.named_modules()] == names
    assert trainable(base) == flags
    assert hook_count(base) == 0
    model = get_peft_model(base, ROSEConfig(base_config=LORA.inner()))
    optimizer = optimizer_of(model)
    model.train()
    step(model, optimizer, batch(model))


def test_one_optimizer_serves_adapters_with_other_targets_in_turn() -> None:
    """Full fine-tuning: the state that the first adapter left in the optimizer must not stand in the second's way."""
    model = get_peft_model(tiny_bert(), ROSEConfig(task_type="SEQ_CLS", target_modules=["query"]))
    model.add_adapter("other", ROSEConfig(task_type="SEQ_CLS", target_modules=["value", "key"], upper_quantile=0.5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for name, steps in (("default", 2), ("other", 2), ("default", 4)):
        model.set_adapter(name)
        for _ in range(2):
            model(**batch(model)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        statistics = get_selector(model).statistics()
        assert statistics.steps == steps
        trained = {unit for unit, values in statistics.units.items() if values.kept_share == values.kept_share}
        assert all(("query" in unit) == (name == "default") for unit in trained) and trained
