"""ROSE full fine-tuning does what PEFT users expect of any tuner, on models of every kind of module."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration
from transformers.pytorch_utils import Conv1D

from rose_peft import (
    ROSEConfig,
    RoseConfigError,
    RoseError,
    ROSEModel,
    TargetModulesError,
    UnsupportedModelError,
    get_selector,
)
from rose_peft.layer import RoseLayer
from tests.helpers.tiny import batch, tiny_bert
from tests.helpers.training import (
    changed,
    optimizer_of,
    outputs,
    snapshot,
    step,
    train,
    train_watched,
    trainable,
    tuner_layers,
)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(6, 16)
        self.norm = nn.LayerNorm(16)
        self.drop = nn.Dropout(0.3)
        self.lin1 = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin1(self.drop(self.norm(self.lin0(x).relu())))


class EmbConv1D(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(12, 5)
        self.drop = nn.Dropout(0.3)
        self.conv1d = Conv1D(4, 5)
        self.lin0 = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin0(self.conv1d(self.drop(self.emb(x))).mean(dim=1))


class Conv2d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.bn: nn.Module = nn.Identity()
        self.drop = nn.Dropout(0.3)
        self.lin0 = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin0(self.drop(self.bn(self.conv(x)).relu().mean(dim=(2, 3))))


class Normed(Conv2d):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(4)


class Patches(nn.Module):
    """A container with parameters of its own around modules that have theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, 6))
        self.position = nn.Parameter(torch.randn(1, 4, 6))
        self.proj = nn.Linear(5, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), self.proj(x)], dim=1)
        return x + self.position


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = Patches()
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.patches(x))[:, 0] + self.patches(x).mean(dim=1))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(6, 2, dropout=0.2, batch_first=True)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        mixed, _ = self.mha(x, x, x)
        return self.head(self.drop(mixed).mean(dim=1))


def floats(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def tokens() -> Tensor:
    return torch.randint(0, 12, (5, 7), generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Case:
    """One model.

    Args:
        targets: Passed as `target_modules`.
        wrapped: Names of the modules that must be wrapped.
        units: Names of the units, in order.
    """

    name: str
    build: type[nn.Module]
    targets: list[str]
    wrapped: list[str]
    units: list[str]
    example: Callable[[], Tensor]

    def model(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        torch.manual_seed(0)
        return self.build().to(dtype)

    def tuned(self, dtype: torch.dtype = torch.float32, adapter_name: str = "default", **fields: Any) -> PeftModel:
        config = ROSEConfig(**{"target_modules": self.targets, **fields})
        return get_peft_model(self.model(dtype), config, adapter_name=adapter_name)

    def inputs(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        example = self.example()
        return {"x": example.to(dtype) if example.is_floating_point() else example}


MLP = Case("Linear", Mlp, ["lin0", "lin1"], ["lin0", "lin1"], ["lin0.weight", "lin1.weight"], floats(5, 6))
CONV = Case("Conv2d", Conv2d, ["conv"], ["conv"], ["conv.weight"], floats(5, 1, 8, 8))
NORMS = Case("BatchNorm", Normed, ["conv", "bn"], ["conv", "bn"], ["conv.weight", "bn.weight"], floats(5, 1, 8, 8))
NESTED = Case(
    "container with parameters",
    Nested,
    ["patches", "head"],
    ["patches", "patches.base_layer.proj", "head"],
    ["patches.cls_token", "patches.position", "patches.proj.weight", "head.weight"],
    floats(5, 3, 5),
)
ATTENTION = Case(
    "MultiheadAttention",
    Attention,
    ["mha"],
    ["mha", "mha.base_layer.out_proj"],
    ["mha.in_proj_weight", "mha.out_proj.weight"],
    floats(5, 4, 6),
)
CASES = [
    MLP,
    Case("LayerNorm", Mlp, ["norm", "lin1"], ["norm", "lin1"], ["norm.weight", "lin1.weight"], floats(5, 6)),
    Case("one of two", Mlp, ["lin1"], ["lin1"], ["lin1.weight"], floats(5, 6)),
    Case("Embedding", EmbConv1D, ["emb"], ["emb"], ["emb.weight"], tokens),
    Case("Conv1D", EmbConv1D, ["conv1d", "emb"], ["emb", "conv1d"], ["emb.weight", "conv1d.weight"], tokens),
    CONV,
    NORMS,
    NESTED,
    ATTENTION,
]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def same_logits(model: nn.Module, other: nn.Module, inputs: dict[str, Tensor]) -> bool:
    return torch.equal(outputs(model, inputs), outputs(other, inputs))


# What is wrapped, and what trains -----------------------------------------------------------------------------------


@every_case
def test_wraps_the_targets_and_nothing_else(case: Case) -> None:
    model = case.tuned()
    assert isinstance(model.base_model, ROSEModel)
    assert [name.removeprefix("base_model.model.") for name, _ in tuner_layers(model)] == case.wrapped
    assert [unit.name for unit in get_selector(model).units] == case.units
    plain = case.model()
    expected = {
        f"{name}.{parameter}"
        for name in [wrapped.replace(".base_layer", "") for wrapped in case.wrapped]
        for parameter, _ in plain.get_submodule(name).named_parameters(recurse=False)
    }
    assert sum(param.numel() for param in model.parameters() if param.requires_grad) == sum(
        plain.get_parameter(name).numel() for name in expected
    )
    assert all(".rose_" in name for name in trainable(model))


@every_case
def test_output_is_that_of_the_base_model_before_training(case: Case) -> None:
    assert same_logits(case.tuned(), case.model(), case.inputs())


@every_case
def test_training_moves_the_copies_and_leaves_the_base_alone(case: Case) -> None:
    model = case.tuned()
    before = snapshot(model)
    masks = torch.stack(train_watched(model, case.inputs(), steps=4))
    if len(case.units) > 1:
        assert (masks < 1).any()
    moved = changed(model, before)
    buffers = {name for name in before if "running_" in name or "num_batches" in name}
    assert {name for name in moved - buffers if "rose_" not in name} == set()
    # Every copy moves in the end: a unit that is never selected would stay at its mask of 0.
    kept = {unit.name for unit, mask in zip(get_selector(model).units, masks.amax(dim=0), strict=True) if mask > 0}
    for name in case.units:
        path, _, parameter = name.rpartition(".")
        assert any(key.replace(".base_layer", "").startswith(f"base_model.model.{path}.rose_") for key in moved) or (
            name not in kept
        ), parameter
    biases = [name for name in trainable(model) if name.endswith("bias")]
    assert all(name in moved for name in biases), "biases of the targets train unmasked"


def test_nothing_but_the_selected_moves_when_all_is_masked() -> None:
    """A first-order band that keeps one of two: the other weight must not move for all its decay and gradient."""
    model = MLP.tuned(strategy="first_order", upper_quantile=0.4)
    masks = train_watched(model, MLP.inputs(), steps=6)
    assert all(int(mask.sum()) == 1 for mask in masks)


class SparseEmbedding(EmbConv1D):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(12, 5, sparse=True)


@pytest.mark.parametrize(
    "how", [{"risk_pass": "sampled"}, {"risk_pass": "paired"}, {"strategy": "second_order"}], ids=str
)
def test_sparse_gradients_are_refused_by_their_shape(how: dict[str, str]) -> None:
    model = get_peft_model(SparseEmbedding(), ROSEConfig(target_modules=["emb", "lin0"], **how))
    with pytest.raises(UnsupportedModelError, match=r"gradient of shape \(12, 5\) is sparse.* sparse=False"):
        train(model, {"x": tokens()}, steps=2)


def test_without_targets_a_model_without_blocks_is_refused_with_candidates() -> None:
    with pytest.raises(TargetModulesError, match=r"target_modules=None .*candidates: lin0, norm, lin1"):
        get_peft_model(Mlp(), ROSEConfig())


class Blocks(nn.Module):
    """Blocks in a ModuleList, and a head in a Sequential with a single composite child, as heads are often written."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.3)) for _ in range(blocks))
        self.head = nn.Sequential(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3)))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


@pytest.mark.parametrize("blocks", [1, 3])
def test_blocks_are_told_from_heads(blocks: int) -> None:
    model = get_peft_model(Blocks(blocks), ROSEConfig())
    assert [unit.name for unit in get_selector(model).units] == [f"blocks.{i}.0.weight" for i in range(blocks)]


# State dict ---------------------------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("loaded_as", ["default", "other"])
def test_state_dict_goes_round(case: Case, loaded_as: str) -> None:
    trained = case.tuned()
    train(trained, case.inputs())
    state = get_peft_model_state_dict(trained)
    assert not any("default" in key for key in state)
    assert all(".rose_" in key for key in state)
    fresh = case.tuned(adapter_name=loaded_as)
    assert not same_logits(fresh, trained, case.inputs())
    result = set_peft_model_state_dict(fresh, dict(state), adapter_name=loaded_as)
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "rose_" in key]
    assert same_logits(fresh, trained, case.inputs())


@every_case
@pytest.mark.parametrize("loaded_as", ["default", "other"])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saved_and_loaded(case: Case, loaded_as: str, low_cpu_mem_usage: bool, tmp_path, recwarn) -> None:
    trained = case.tuned()
    train(trained, case.inputs())
    trained.save_pretrained(tmp_path)
    recwarn.clear()
    loaded = PeftModel.from_pretrained(
        case.model(), tmp_path, adapter_name=loaded_as, low_cpu_mem_usage=low_cpu_mem_usage
    )
    assert not [w for w in recwarn if "missing" in str(w.message)]
    assert not any(tensor.is_meta for tensor in loaded.state_dict().values())
    assert same_logits(loaded, trained, case.inputs())
    assert not trainable(loaded)


def test_running_statistics_are_part_of_the_adapter(tmp_path) -> None:
    model = NORMS.tuned()
    before = snapshot(model)
    train(model, NORMS.inputs())
    assert {name.rpartition(".")[2] for name in changed(model, before) if ".bn.rose_copy.default" in name} == {
        "weight",
        "bias",
        "running_mean",
        "running_var",
        "num_batches_tracked",
    }
    assert not [name for name in changed(model, before) if ".bn.base_layer" in name]
    assert "base_model.model.bn.rose_copy.running_mean" in get_peft_model_state_dict(model)


def test_running_statistics_of_frozen_modules_follow_pytorch() -> None:
    """A batch norm that is no target keeps collecting statistics in train mode, as under any tuner of PEFT."""
    model = get_peft_model(NORMS.model(), ROSEConfig(target_modules=["conv"]))
    before = snapshot(model)
    train(model, NORMS.inputs())
    assert {n.rpartition(".")[2] for n in changed(model, before) if "bn" in n} == {
        "running_mean",
        "running_var",
        "num_batches_tracked",
    }


# Merging ------------------------------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merge_and_unload(case: Case, safe_merge: bool) -> None:
    model = case.tuned()
    train(model, case.inputs())
    trained = outputs(model, case.inputs())
    merged = model.merge_and_unload(safe_merge=safe_merge)
    plain = case.model()
    assert type(merged) is case.build
    assert list(merged.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in merged.named_modules()] == [name for name, _ in plain.named_modules()]
    assert torch.equal(outputs(merged, case.inputs()), trained)
    assert not same_logits(merged, plain, case.inputs())


@every_case
def test_unload_gives_the_base_model_back(case: Case) -> None:
    model = case.tuned()
    train(model, case.inputs())
    plain = case.model()
    unloaded = model.unload()
    assert [name for name, _ in unloaded.named_modules()] == [name for name, _ in plain.named_modules()]
    for name, param in unloaded.named_parameters():
        assert torch.equal(param, plain.get_parameter(name))
    with pytest.raises(RoseError, match="not attached"):
        get_selector(unloaded)


@every_case
def test_merged_adapter_is_taken_out_to_the_last_bit(case: Case) -> None:
    model = case.tuned()
    train(model, case.inputs())
    before, trained = snapshot(model), outputs(model, case.inputs())
    saved = get_peft_model_state_dict(model)
    model.merge_adapter()
    assert torch.equal(outputs(model, case.inputs()), trained)
    assert {name for name in changed(model, before) if "base_layer" in name}, "merging writes into the base layers"
    assert not {name for name in changed(model, before) if "rose_" in name}
    merged_state = get_peft_model_state_dict(model)  # what is saved does not depend on being merged
    assert all(torch.equal(merged_state[key], value) for key, value in saved.items())
    with model.disable_adapter():
        assert same_logits(model, case.model(), case.inputs())
    model.unmerge_adapter()
    assert not changed(model, before)
    assert torch.equal(outputs(model, case.inputs()), trained)


def test_merging_twice_changes_nothing() -> None:
    model = MLP.tuned()
    train(model, MLP.inputs())
    model.merge_adapter()
    before = snapshot(model)
    with pytest.warns(UserWarning, match="merged"):
        model.merge_adapter()
    assert not changed(model, before)


def test_forgotten_unmerge_before_disabling_still_gives_the_base_output() -> None:
    model = MLP.tuned()
    train(model, MLP.inputs())
    model.merge_adapter()
    with model.disable_adapter():
        assert same_logits(model, MLP.model(), MLP.inputs())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_safe_merge_refuses_broken_weights(value: float) -> None:
    model = MLP.tuned()
    train(model, MLP.inputs())
    layer = model.base_model.model.lin1
    layer.rose_copy["default"].weight.data[0, 0] = value
    with pytest.raises(ValueError, match=r"NaNs? .*default.*"):
        model.merge_adapter(safe_merge=True)
    with pytest.raises(ValueError, match=r"NaNs? .*default.*"):
        model.merge_and_unload(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, MLP.model().lin1.weight)


def test_training_again_after_a_merge_starts_from_the_merged_weights() -> None:
    model = MLP.tuned()
    train(model, MLP.inputs())
    merged = model.merge_and_unload()
    trained = outputs(merged, MLP.inputs())
    again = get_peft_model(merged, ROSEConfig(target_modules=MLP.targets))
    assert torch.equal(outputs(again, MLP.inputs()), trained)
    train(again, MLP.inputs())
    assert torch.equal(outputs(again.unload(), MLP.inputs()), trained)


def test_an_adapter_added_while_another_is_merged_starts_from_the_base() -> None:
    model = MLP.tuned()
    train(model, MLP.inputs())
    model.merge_adapter()
    model.add_adapter("other", ROSEConfig(target_modules=MLP.targets))
    model.unmerge_adapter()
    model.set_adapter("other")
    assert same_logits(model, MLP.model(), MLP.inputs())


def test_a_copied_merged_model_can_be_unmerged() -> None:
    model = MLP.tuned()
    train(model, MLP.inputs())
    before = snapshot(model)
    model.merge_adapter()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin.unmerge_adapter()
        assert not changed(twin, before)
    assert changed(model, before), "the original stays merged"


def test_merging_names_of_adapters() -> None:
    model = MLP.tuned()
    train(model, MLP.inputs())
    first = outputs(model, MLP.inputs())
    model.add_adapter("other", ROSEConfig(target_modules=MLP.targets))
    model.set_adapter("other")
    model.merge_adapter(["default"])
    assert torch.equal(outputs(model, MLP.inputs()), first)
    model.unmerge_adapter()
    with pytest.raises(UnsupportedModelError, match="Merge one"):
        model.merge_adapter(["default", "other"])


# Disabling ----------------------------------------------------------------------------------------------------------


@every_case
def test_disabled_adapter_gives_the_base_output(case: Case) -> None:
    model = case.tuned()
    plain = outputs(case.model(), case.inputs())
    train(model, case.inputs())
    trained = outputs(model, case.inputs())
    assert not torch.equal(trained, plain)
    with model.disable_adapter():
        assert torch.equal(outputs(model, case.inputs()), plain)
    assert torch.equal(outputs(model, case.inputs()), trained)


def test_disabling_restores_what_trains() -> None:
    model = MLP.tuned()
    before = trainable(model)
    with model.disable_adapter():
        assert not [name for name in trainable(model) if "base_layer" in name]
    assert trainable(model) == before
    model.base_model.disable_adapter_layers()
    with model.disable_adapter():
        pass
    assert all(layer.disable_adapters for _, layer in tuner_layers(model)), "it was off before, so it stays off"
    model.base_model.enable_adapter_layers()
    assert trainable(model) == before
    train_watched(model, MLP.inputs())


def test_training_passes_with_the_adapter_disabled_count_for_nothing() -> None:
    """A reference pass through the frozen base (as in distillation) within a step does not end in an error."""
    model = MLP.tuned()
    optimizer = optimizer_of(model)
    torch.manual_seed(0)
    for _ in range(3):
        with model.disable_adapter(), torch.no_grad():
            model(**MLP.inputs())
        step(model, optimizer, MLP.inputs())
    assert get_selector(model).statistics().steps == 3


# Several adapters ---------------------------------------------------------------------------------------------------


def test_several_adapters_with_different_targets() -> None:
    model = MLP.tuned()
    plain = outputs(MLP.model(), MLP.inputs())
    train(model, MLP.inputs())
    first = outputs(model, MLP.inputs())
    model.add_adapter("other", ROSEConfig(target_modules=["norm", "lin1"]))
    assert model.active_adapters == ["default"]
    assert torch.equal(outputs(model, MLP.inputs()), first)
    assert not [name for name in trainable(model) if "other" in name]

    model.set_adapter("other")
    assert model.active_adapters == ["other"]
    assert trainable(model) == {
        f"base_model.model.{module}.rose_copy.other.{name}"
        for module in ("norm", "lin1")
        for name in ("weight", "bias")
    }
    assert torch.equal(outputs(model, MLP.inputs()), plain), "lin0 has no copy under this name: its base is used"
    before = snapshot(model)
    train_watched(model, MLP.inputs())
    assert all(".rose_copy.other." in name for name in changed(model, before))
    second = outputs(model, MLP.inputs())
    assert not torch.equal(second, plain)

    model.set_adapter("default")
    assert torch.equal(outputs(model, MLP.inputs()), first)
    assert not [name for name in trainable(model) if "other" in name]
    before = snapshot(model)
    train_watched(model, MLP.inputs())
    assert all(".rose_copy.default." in name for name in changed(model, before))

    model.set_adapter("other")
    assert torch.equal(outputs(model, MLP.inputs()), second)
    model.delete_adapter("default")
    assert list(model.peft_config) == ["other"]
    assert not [name for name in model.state_dict() if "rose_copy.default" in name]
    assert torch.equal(outputs(model, MLP.inputs()), second)
    train_watched(model, MLP.inputs())


def test_settings_follow_the_active_adapter() -> None:
    model = MLP.tuned(strategy="first_order")
    model.add_adapter("other", ROSEConfig(target_modules=MLP.targets, strategy="second_order"))
    for name, strategy in (("default", "first_order"), ("other", "second_order"), ("default", "first_order")):
        model.set_adapter(name)
        assert get_selector(model).config.strategy == strategy
        train_watched(model, MLP.inputs())


def test_deleting_the_active_adapter_falls_back_to_one_that_is_left() -> None:
    model = MLP.tuned()
    model.add_adapter("other", ROSEConfig(target_modules=MLP.targets))
    with pytest.warns(UserWarning, match="[Aa]dapter default was active"):
        model.delete_adapter("default")
    assert model.active_adapters == ["other"]
    train_watched(model, MLP.inputs())


def test_deleting_an_unknown_adapter_is_refused() -> None:
    with pytest.raises(ValueError, match="does not exist"):
        MLP.tuned().delete_adapter("unknown")


def test_deleting_the_last_adapter_leaves_the_base_model() -> None:
    model = MLP.tuned()
    train(model, MLP.inputs())
    model.delete_adapter("default")
    assert torch.equal(outputs(model.base_model, MLP.inputs()), outputs(MLP.model(), MLP.inputs()))
    train_watched(NESTED.tuned(), NESTED.inputs())  # the steps of another model are not disturbed
    assert not get_selector(model).units


def test_container_adapters_are_added_and_deleted() -> None:
    """Parameters of a container lie in ParameterDicts, whose keys have the adapter name at the end."""
    model = NESTED.tuned()
    train(model, NESTED.inputs())
    first = outputs(model, NESTED.inputs())
    model.add_adapter("other", ROSEConfig(target_modules=["patches"]))
    model.set_adapter("other")
    train_watched(model, NESTED.inputs())
    assert not torch.equal(outputs(model, NESTED.inputs()), first)
    model.set_adapter("default")
    assert torch.equal(outputs(model, NESTED.inputs()), first)
    model.delete_adapter("other")
    assert not [name for name in model.state_dict() if name.endswith(".other") or ".other." in name]
    assert torch.equal(outputs(model, NESTED.inputs()), first)


def test_two_active_adapters_are_refused() -> None:
    """Each holds full weights; adding them up would mean nothing."""
    model = MLP.tuned()
    model.add_adapter("other", ROSEConfig(target_modules=MLP.targets))
    with pytest.raises(UnsupportedModelError, match=r"default.*other.*one name"):
        model.base_model.set_adapter(["default", "other"])


def test_each_adapter_is_saved_under_its_own_name(tmp_path) -> None:
    model = MLP.tuned()
    train(model, MLP.inputs())
    first = outputs(model, MLP.inputs())
    model.add_adapter("other", ROSEConfig(target_modules=["norm", "lin1"]))
    model.set_adapter("other")
    train(model, MLP.inputs())
    second = outputs(model, MLP.inputs())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(MLP.model(), tmp_path)
    loaded.load_adapter(tmp_path / "other", adapter_name="other")
    assert torch.equal(outputs(loaded, MLP.inputs()), first)
    loaded.set_adapter("other")
    assert torch.equal(outputs(loaded, MLP.inputs()), second)


@pytest.mark.parametrize("name", ["lin0", "rose_copy", "weight", "base_layer", "model", "rose"])
def test_adapter_named_like_a_module(name: str, tmp_path) -> None:
    for case in (MLP, NESTED):
        model = case.tuned(adapter_name=name)
        assert same_logits(model, case.model(), case.inputs())
        train_watched(model, case.inputs())
        folder = tmp_path / case.build.__name__
        model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(case.model(), folder / name)
        assert same_logits(loaded, model, case.inputs())
        again = PeftModel.from_pretrained(case.model(), folder / name, adapter_name=name, is_trainable=True)
        assert same_logits(again, model, case.inputs())
        assert len(trainable(again)) == len(trainable(model))


# Dtypes and devices -------------------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_copies_keep_the_dtype_of_the_model(
    case: Case, dtype: torch.dtype, autocast_adapter_dtype: bool, tmp_path
) -> None:
    config = ROSEConfig(target_modules=case.targets)
    model = get_peft_model(case.model(dtype), config, autocast_adapter_dtype=autocast_adapter_dtype)
    assert {param.dtype for param in model.parameters()} == {dtype}
    train_watched(model, case.inputs(dtype))
    trained = outputs(model, case.inputs(dtype))
    assert trained.dtype == dtype
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(case.model(dtype), tmp_path, autocast_adapter_dtype=autocast_adapter_dtype)
    assert {param.dtype for param in loaded.parameters()} == {dtype}
    assert torch.equal(outputs(loaded, case.inputs(dtype)), trained)
    assert torch.equal(outputs(loaded.merge_and_unload(safe_merge=True), case.inputs(dtype)), trained)


def test_conversion_after_wrapping() -> None:
    model = NESTED.tuned().to(torch.float64)
    assert {param.dtype for param in model.parameters()} == {torch.float64}
    train_watched(model, NESTED.inputs(torch.float64))


# Copies of the model ------------------------------------------------------------------------------------------------


def by_torch_save(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@every_case
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), by_torch_save])
def test_copies_of_a_model_are_steered_on_their_own(case: Case, copied: Callable[[Any], Any]) -> None:
    model = case.tuned()
    train(model, case.inputs())
    twin = copied(model)
    before = snapshot(model)
    assert get_selector(twin) is not get_selector(model)
    assert same_logits(twin, model, case.inputs())
    train_watched(twin, case.inputs())
    assert not changed(model, before), "training the copy does not touch the original"
    assert get_selector(model).statistics().steps == 3
    assert get_selector(twin).statistics().steps == 6


# What trains besides the targets, and how targets are named ---------------------------------------------------------


def wrapped_names(model: nn.Module) -> set[str]:
    return {n.removeprefix("base_model.model.").replace(".base_layer", "") for n, _ in tuner_layers(model)}


BERT_LINEAR = {
    f"bert.encoder.layer.{i}.{name}"
    for i in (0, 1)
    for name in (
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    )
}


def test_targets_by_name_and_by_expression() -> None:
    expected = {f"bert.encoder.layer.{i}.attention.self.query" for i in (0, 1)}
    assert wrapped_names(get_peft_model(tiny_bert(), ROSEConfig(target_modules=["query"]))) == expected
    pattern = r".*layer\.1\.attention\.self\.(query|key)"
    model = get_peft_model(tiny_bert(), ROSEConfig(target_modules=pattern))
    expected = {f"bert.encoder.layer.1.attention.self.{name}" for name in ("query", "key")}
    assert wrapped_names(model) == expected
    assert {unit.name for unit in get_selector(model).units} == {f"{name}.weight" for name in expected}


def test_a_container_as_target_stands_for_what_is_in_it() -> None:
    model = get_peft_model(tiny_bert(), ROSEConfig(target_modules=["layer.1"]))
    assert wrapped_names(model) == {
        name for name in wrapped_names(get_peft_model(tiny_bert(), ROSEConfig())) if ".layer.1." in name
    }
    train_watched(model, batch(model))


def test_all_linear() -> None:
    model = get_peft_model(tiny_bert(), ROSEConfig(target_modules="all-linear", task_type="SEQ_CLS"))
    assert wrapped_names(model) == BERT_LINEAR | {"bert.pooler.dense"}
    train_watched(model, batch(model))


def test_targets_that_match_nothing_are_refused_with_candidates() -> None:
    base = tiny_bert()
    before = [name for name, _ in base.named_modules()]
    with pytest.raises(TargetModulesError, match=r"target_modules=\{'q_proj'\} .*bert\.embeddings\.word_embeddings"):
        get_peft_model(base, ROSEConfig(target_modules=["q_proj"]))
    assert [name for name, _ in base.named_modules()] == before


@pytest.mark.parametrize("exclude", [["embeddings", "pooler"], r".*(embeddings|pooler).*"])
def test_excluded_modules_stay_frozen(exclude: Any) -> None:
    model = get_peft_model(tiny_bert(), ROSEConfig(exclude_modules=exclude))
    names = wrapped_names(model)
    assert not [name for name in names if "embeddings" in name or "pooler" in name]
    assert {"classifier", *BERT_LINEAR} <= names
    before = snapshot(model)
    train_watched(model, batch(model))
    assert not [name for name in changed(model, before) if "embeddings" in name or "pooler" in name]


def test_excluding_some_of_the_targets() -> None:
    model = get_peft_model(tiny_bert(), ROSEConfig(target_modules=["query", "key"], exclude_modules=["layer.0"]))
    assert wrapped_names(model) == {f"bert.encoder.layer.1.attention.self.{name}" for name in ("query", "key")}


def test_modules_to_save_train_unmasked_and_are_saved(tmp_path) -> None:
    config = ROSEConfig(target_modules=["query"], modules_to_save=["classifier"])
    model = get_peft_model(tiny_bert(), config)
    assert {unit.name for unit in get_selector(model).units} == {
        f"bert.encoder.layer.{i}.attention.self.query.weight" for i in (0, 1)
    }
    before = snapshot(model)
    train_watched(model, batch(model))
    moved = changed(model, before)
    assert {name for name in moved if "classifier" in name} == {
        f"base_model.model.classifier.modules_to_save.default.{name}" for name in ("weight", "bias")
    }
    trained = outputs(model, batch(model))
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(PeftModel.from_pretrained(tiny_bert(), tmp_path), batch(model)), trained)
    merged = model.merge_and_unload()
    assert isinstance(merged.classifier, nn.Linear)
    assert torch.equal(outputs(merged, batch(merged)), trained)


def test_modules_to_save_beside_the_whole_model(tmp_path) -> None:
    """The head is trained once, by PEFT's wrapper, and not a second time by a copy."""
    model = get_peft_model(tiny_bert(), ROSEConfig(modules_to_save=["classifier"]))
    assert "classifier" not in wrapped_names(model)
    plain = tiny_bert()
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == sum(p.numel() for p in plain.parameters())
    train_watched(model, batch(model))
    trained = outputs(model, batch(model))
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(PeftModel.from_pretrained(tiny_bert(), tmp_path), batch(model)), trained)


def test_what_the_user_froze_stays_frozen(tmp_path) -> None:
    def frozen() -> nn.Module:
        base = tiny_bert()
        base.bert.embeddings.requires_grad_(False)
        base.bert.encoder.layer[0].requires_grad_(False)
        return base

    model = get_peft_model(frozen(), ROSEConfig())
    assert not [n for n in wrapped_names(model) if "embeddings" in n or ".layer.0." in n]
    before = snapshot(model)
    train_watched(model, batch(model))
    assert not [name for name in changed(model, before) if "embeddings" in name or ".layer.0." in name]
    trained = outputs(model, batch(model))
    model.save_pretrained(tmp_path)
    # Frozen or not, the base that the adapter is loaded into gives the same model.
    for base in (frozen(), tiny_bert()):
        assert torch.equal(outputs(PeftModel.from_pretrained(base, tmp_path), batch(model)), trained)


def test_a_frozen_weight_beside_a_trained_bias() -> None:
    """What is frozen inside a module that trains otherwise (as in bias-only tuning) must not start to train."""
    base = tiny_bert()
    for name, param in base.named_parameters():
        if name.startswith("bert.encoder.layer.0.") and name.endswith("weight"):
            param.requires_grad_(False)
    model = get_peft_model(base, ROSEConfig())
    before = snapshot(model)
    train(model, batch(model))
    moved = {name for name in changed(model, before) if ".layer.0." in name}
    assert moved and all(name.endswith("bias") for name in moved)
    assert not [u.name for u in get_selector(model).units if ".layer.0." in u.name and u.parameters()]


class Shared(nn.Module):
    """One module under two names, beside a block of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.drop = nn.Dropout(0.3)
        self.second = self.first
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.second(self.first(x).relu())))


def test_a_module_under_two_names_is_one_copy() -> None:
    torch.manual_seed(0)
    plain = Shared()
    model = get_peft_model(copy.deepcopy(plain), ROSEConfig(target_modules=["first", "head"]))
    inner = model.base_model.model
    assert isinstance(inner.first, RoseLayer)
    assert inner.second is inner.first
    inputs = {"x": floats(5, 6)()}
    train_watched(model, inputs)
    trained = outputs(model, inputs)
    with model.disable_adapter():
        assert torch.equal(outputs(model, inputs), outputs(plain, inputs))
    merged = model.merge_and_unload()
    assert merged.second is merged.first and isinstance(merged.first, nn.Linear)
    assert torch.equal(outputs(merged, inputs), trained)


class Rosy(nn.Module):
    """A module whose name holds the prefix of our parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.prose_encoder = nn.Linear(6, 6)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.prose_encoder(x).relu()))


@pytest.mark.parametrize("targets", [["head"], ["prose_encoder", "head"]])
def test_a_module_named_like_our_prefix(targets: list[str], tmp_path) -> None:
    def plain() -> nn.Module:
        torch.manual_seed(0)
        return Rosy()

    inputs = {"x": floats(5, 6)()}
    model = get_peft_model(plain(), ROSEConfig(target_modules=targets))
    assert trainable(model) == {
        f"base_model.model.{target}.rose_copy.default.{name}" for target in targets for name in ("weight", "bias")
    }
    train_watched(model, inputs)
    trained = outputs(model, inputs)
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(PeftModel.from_pretrained(plain(), tmp_path), inputs), trained)
    merged = model.merge_and_unload()
    assert list(merged.state_dict()) == list(plain().state_dict())
    assert torch.equal(outputs(merged, inputs), trained)


class Topless(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.2)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x * self.scale


def test_parameters_on_the_model_itself_are_refused() -> None:
    base = Topless()
    with pytest.raises(UnsupportedModelError, match=r"\['scale'\] lie on the model itself \(Topless\)"):
        get_peft_model(base, ROSEConfig())
    base.scale.requires_grad_(False)
    train_watched(get_peft_model(base, ROSEConfig()), {"x": floats(5, 3)()})


# Tied weights -------------------------------------------------------------------------------------------------------


def tiny_gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=32, n_positions=20, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2, pad_token_id=0
    )
    return GPT2LMHeadModel(config)


def tiny_t5() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))


def sentence() -> dict[str, Tensor]:
    ids = torch.randint(3, 32, (4, 6), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


TIED = {
    "GPT-2": (tiny_gpt2, ["transformer.wte", "lm_head"], "CAUSAL_LM"),
    "T5": (tiny_t5, ["shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head"], "SEQ_2_SEQ_LM"),
}
every_tied = pytest.mark.parametrize("build, names, task_type", TIED.values(), ids=TIED)


def in_use(model: nn.Module, names: list[str]) -> set[int]:
    """Identities of the weights that the modules would use now."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return {id(base.get_submodule(name).weight) for name in names}


@every_tied
def test_copies_of_tied_weights_stay_tied(build: Any, names: list[str], task_type: str, tmp_path) -> None:
    plain = build()
    assert len(in_use(plain, names)) == 1
    model = get_peft_model(build(), ROSEConfig(task_type=task_type))
    assert len(in_use(model, names)) == 1
    assert in_use(model, names) != in_use(plain, names)
    trained_count = sum(param.numel() for param in model.parameters() if param.requires_grad)
    assert trained_count == sum(param.numel() for param in plain.parameters()), "a tied weight counts once"
    before = model.get_base_model().get_submodule(names[0]).weight.detach().clone()
    train(model, sentence())
    assert len(in_use(model, names)) == 1
    assert not torch.equal(model.get_base_model().get_submodule(names[0]).weight, before)
    trained = outputs(model, sentence())

    model.save_pretrained(tmp_path)
    for options in ({}, {"low_cpu_mem_usage": True}, {"adapter_name": "other"}, {"is_trainable": True}):
        loaded = PeftModel.from_pretrained(build(), tmp_path, **options)
        assert torch.equal(outputs(loaded, sentence()), trained)
        assert len(in_use(loaded, names)) == 1, options
    train(loaded, sentence())
    assert len(in_use(loaded, names)) == 1

    model.add_adapter("other", ROSEConfig(task_type=task_type))
    model.set_adapter("other")
    assert len(in_use(model, names)) == 1
    model.set_adapter("default")
    twin = copy.deepcopy(model)
    assert len(in_use(twin, names)) == 1
    twin.merge_adapter()
    assert torch.equal(outputs(twin, sentence()), trained)
    twin.unmerge_adapter()
    assert torch.equal(outputs(twin, sentence()), trained)
    assert torch.equal(outputs(twin.unload(), sentence()), outputs(plain, sentence()))


@every_tied
def test_merged_weights_stay_tied(build: Any, names: list[str], task_type: str, tmp_path, recwarn) -> None:
    model = get_peft_model(build(), ROSEConfig(task_type=task_type))
    train(model, sentence())
    trained = outputs(model, sentence())
    merged = model.merge_and_unload()
    assert not [w for w in recwarn if "tie" in str(w.message)]
    assert len(in_use(merged, names)) == 1
    assert torch.equal(outputs(merged, sentence()), trained)
    merged.save_pretrained(tmp_path)
    assert torch.equal(outputs(type(merged).from_pretrained(tmp_path), sentence()), trained)


def test_a_target_that_is_half_of_a_tie(tmp_path) -> None:
    """Only the embedding is a target: the head keeps the frozen weight, as under any tuner."""
    model = get_peft_model(tiny_gpt2(), ROSEConfig(task_type="CAUSAL_LM", target_modules=["wte", "c_attn"]))
    train(model, sentence())
    trained = outputs(model, sentence())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_gpt2(), tmp_path)
    assert torch.equal(outputs(loaded, sentence()), trained)
    base = loaded.get_base_model()
    assert torch.equal(base.lm_head.weight, tiny_gpt2().lm_head.weight)
    assert not torch.equal(base.transformer.wte.weight, base.lm_head.weight)


# The rest of the house ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["first_order", "second_order", "ensemble"])
def test_gradient_checkpointing(strategy: str) -> None:
    def run(checkpointing: bool) -> dict[str, Tensor]:
        model = get_peft_model(tiny_bert(), ROSEConfig(strategy=strategy))
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        train(model, batch(model))
        return snapshot(model)

    plain, checkpointed = run(False), run(True)
    for name, tensor in plain.items():
        torch.testing.assert_close(checkpointed[name], tensor, rtol=0, atol=1e-6, msg=name)


def test_gradient_checkpointing_as_peft_prepares_it() -> None:
    model = get_peft_model(tiny_bert(), ROSEConfig())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    train_watched(model, batch(model))


def test_generate() -> None:
    model = get_peft_model(tiny_gpt2(), ROSEConfig(task_type="CAUSAL_LM"))
    prompt = sentence()["input_ids"]
    before = model.generate(input_ids=prompt, max_new_tokens=5, do_sample=False)
    assert torch.equal(before, tiny_gpt2().generate(input_ids=prompt, max_new_tokens=5, do_sample=False))
    train(model, sentence(), steps=10, lr=0.1)
    after = model.generate(input_ids=prompt, max_new_tokens=5, do_sample=False)
    assert not torch.equal(after, before)


def test_print_trainable_parameters(capsys) -> None:
    model = MLP.tuned()
    plain = MLP.model()
    copied = sum(p.numel() for n, p in plain.named_parameters() if n.startswith("lin"))
    total = copied + sum(p.numel() for p in plain.parameters())
    assert model.get_nb_trainable_parameters() == (copied, total)
    model.print_trainable_parameters()
    assert f"trainable params: {copied:,} || all params: {total:,}" in capsys.readouterr().out


def test_layer_and_model_status() -> None:
    model = NESTED.tuned()
    model.add_adapter("other", ROSEConfig(target_modules=["head"]))
    status = {layer.name.removeprefix("model."): layer for layer in model.get_layer_status()}
    assert set(status) == set(NESTED.wrapped)
    assert status["patches"].active_adapters == ["default"]
    assert status["patches"].requires_grad == {"default": True}
    assert status["head"].requires_grad == {"default": True, "other": False}
    assert {layer.module_type for layer in status.values()} == {"rose.RoseLayer"}
    whole = model.get_model_status()
    assert whole.peft_types == {"default": "ROSE", "other": "ROSE"}
    assert whole.available_adapters == ["default", "other"]
    assert (whole.enabled, whole.active_adapters, whole.merged_adapters) == (True, ["default"], [])
    assert whole.requires_grad == {"default": True, "other": False}
    assert whole.num_adapter_layers == 3
    model.merge_adapter()
    assert model.get_model_status().merged_adapters == ["default"]
    model.unmerge_adapter()
    with model.disable_adapter():
        assert model.get_model_status().enabled is False


def test_repr_shows_what_is_wrapped() -> None:
    text = repr(NESTED.tuned())
    assert text.count("rose.RoseLayer(") == 3
    assert "(rose_copy): ModuleDict" in text and "(rose_cls_token): ParameterDict" in text


def test_attributes_of_the_wrapped_module_are_those_in_use() -> None:
    model = MLP.tuned()
    layer = model.base_model.model.lin1
    train(model, MLP.inputs())
    assert layer.in_features == 16
    assert layer.weight is layer.rose_copy["default"].weight
    assert layer.bias is layer.rose_copy["default"].bias
    with model.disable_adapter():
        assert layer.weight is layer.base_layer.weight
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = layer.no_such_thing


@pytest.mark.parametrize("nested", [False, True])
def test_what_a_model_writes_into_a_wrapped_module_is_what_its_call_uses(nested: bool) -> None:
    """As RecurrentGemma gives its recurrent units their first state; marks of others stay where they are put."""

    class Unit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decay = nn.Parameter(torch.ones(4, 4))
            self.state: Tensor | None = None
            self.register_buffer("count", torch.zeros(()))
            self.drop = nn.Dropout(0.1) if nested else lambda x: x

        def forward(self, x: Tensor) -> Tensor:
            assert self.state is not None
            self.state = self.drop(x @ self.decay + self.state)
            self.count = self.count + 1
            return self.state

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Unit(), Unit()])

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                layer.state = torch.zeros_like(x)
                layer.count = torch.zeros(())
                x = layer(x)
            return x

    model = get_peft_model(Model(), ROSEConfig(strategy="second_order", target_modules=["layers.0", "layers.1"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    for _ in range(3):
        model(x=torch.ones(2, 4)).sum().backward()  # a state of the last call would still have its graph
        optimizer.step()
        optimizer.zero_grad()
    layer = model.base_model.model.layers[0]
    assert isinstance(layer, RoseLayer) and layer.copies_module is not nested
    inner = layer.base_layer if nested else layer.rose_copy["default"]
    assert layer.state is inner.state and layer.count is inner.count and layer.count == 1
    layer.mark = 3
    assert not hasattr(inner, "mark")


def test_set_requires_grad_by_adapter_name() -> None:
    model = MLP.tuned()
    model.set_requires_grad("default", False)
    assert not trainable(model)
    model.set_requires_grad("default", True)
    train_watched(model, MLP.inputs())


def test_loaded_for_inference_nothing_trains_and_nothing_is_attached(tmp_path) -> None:
    model = MLP.tuned()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(MLP.model(), tmp_path)
    assert not trainable(loaded)
    with pytest.raises(RoseError, match="not attached"):
        get_selector(loaded)


def test_base_config_cannot_join_a_fully_tuned_model() -> None:
    from peft import LoraConfig

    model = MLP.tuned()
    with pytest.raises(RoseConfigError, match="base_config cannot be added"):
        model.add_adapter("lora", ROSEConfig(base_config=LoraConfig(target_modules=["lin0"])))
    assert list(model.peft_config) == ["default"]
    train_watched(model, MLP.inputs())


# Parameters that get another name ------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["first_order", "second_order", "ensemble"])
def test_a_model_that_is_pruned_after_attaching_is_steered_on(strategy) -> None:
    """Pruning puts `weight_orig` in the place of `weight`, in the same module."""
    from torch.nn.utils import prune

    from rose_peft import attach_rose

    model = tiny_bert()
    selector = attach_rose(model, ROSEConfig(strategy=strategy, upper_quantile=0.5))
    linear = [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and "encoder" in n]
    for module in linear:
        prune.l1_unstructured(module, "weight", amount=0.3)
    train_watched(model, batch(model))
    assert sum(unit.name.endswith("weight_orig") for unit in selector.units) == len(linear)
    assert selector.statistics().steps > 0 and selector.statistics().kept_share < 1


def test_one_unit_alone_is_told() -> None:
    from peft import LoraConfig

    lora = LoraConfig(target_modules=["layer.0.attention.self.query"])
    with pytest.warns(UserWarning, match="there is one unit, .*query.*ROSE has no effect"):
        get_peft_model(tiny_bert(), ROSEConfig(base_config=lora))


def test_the_default_device_does_not_matter() -> None:
    """Torch makes tensors there where nothing says another place; "meta" stands for an accelerator."""
    from rose_peft import attach_rose

    model = tiny_bert()
    with torch.device("meta"):
        selector = attach_rose(model, ROSEConfig(upper_quantile=0.5))
    optimizer = optimizer_of(model)
    model.train()
    for seed in range(3):
        model(**batch(model, seed=seed)).loss.backward()
        with torch.device("meta"):
            selector.before_step(optimizer, (optimizer,), {})
        optimizer.step()
        optimizer.zero_grad()
    assert selector.statistics().steps == 3 and selector.state.last_mask.device.type == "cpu"


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_tied_weights_can_be_tied_again(kind) -> None:
    """Engines do so after they have loaded or split the weights."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    base = (
        GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2))
        if kind == "gpt2"
        else T5ForConditionalGeneration(T5Config(**sizes))
    )
    model = get_peft_model(base, ROSEConfig(strategy="second_order"))
    before = {name: id(param) for name, param in model.named_parameters(remove_duplicate=False)}
    model.tie_weights()
    assert {name: id(param) for name, param in model.named_parameters(remove_duplicate=False)} == before


def test_a_model_that_lost_all_its_units_is_refused_when_it_trains_on_and_others_are_left_alone() -> None:
    from rose_peft import attach_rose

    model, other = tiny_bert(), tiny_bert()
    attach_rose(model, ROSEConfig(strategy="second_order"))
    attach_rose(other, ROSEConfig(strategy="second_order"))
    model.bert.encoder.layer = nn.ModuleList()
    train(other, batch(other))
    with torch.no_grad():
        model(**batch(model))
    with pytest.raises(TargetModulesError, match="leaves no weight to mask"):
        model(**batch(model))


def test_complex_weights_are_named() -> None:
    """They are no integers, as those of a quantized base are."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, dtype=torch.complex64))
    with pytest.raises(UnsupportedModelError, match=r"1\.weight is complex"):
        get_peft_model(model, ROSEConfig(target_modules=["0"], strategy="second_order"))
