"""Full fine-tuning of modules whose own parameters are read by more than `forward`."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rose_peft import ROSEConfig, UnsupportedModelError
from tests.helpers.training import optimizer_of, outputs, snapshot, step, train, train_watched, trainable


class Codebook(nn.Module):
    """Has parameters and children, and is used by two methods of its own, none of which is `forward`."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(6) + 0.5)
        self.proj = nn.Linear(6, 6)
        self.drop = nn.Dropout(0.3)

    def encode(self, x: Tensor) -> Tensor:
        return self.drop(self.proj(x)) * self.scale

    def decode(self, x: Tensor) -> Tensor:
        return x / self.scale.exp()


class AutoEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.book = Codebook()
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.book.decode(self.book.encode(x)))


class SelfCheckpointing(nn.Module):
    """Runs a method of its own a second time in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(6) + 0.5)
        self.proj = nn.Linear(6, 6)
        self.drop = nn.Dropout(0.3)

    def inner(self, x: Tensor) -> Tensor:
        return (self.drop(self.proj(x)) * self.scale).tanh() * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)


class CheckpointingCall(nn.Module):
    """Runs the whole of its own call again, as the layers of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(6) + 0.5)
        self.proj = nn.Linear(6, 6)
        self.drop = nn.Dropout(0.3)

    def __call__(self, *args: Any) -> Any:
        return checkpoint(super().__call__, *args, use_reentrant=False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.drop(self.proj(x)) * self.scale).tanh() * self.scale


class Plain(CheckpointingCall):
    """The same arithmetic without a checkpoint."""

    def __call__(self, *args: Any) -> Any:
        return nn.Module.__call__(self, *args)


class Stack(nn.Module):
    def __init__(self, block: type[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(2))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class ByIndex(nn.Module):
    """Reads a list and a dictionary of parameters, which nobody calls."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ParameterList(torch.rand(6) + 0.5 for _ in range(2))
        self.named = nn.ParameterDict({"gain": torch.rand(6) + 0.5})
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(x) * self.named["gain"]
        for scale in self.scales:
            x = x * scale
        return self.head(x * self.scales[0] + len(self.scales))


def inputs() -> dict[str, Tensor]:
    return {"x": torch.randn(5, 6, generator=torch.Generator().manual_seed(0))}


def built(build: Any, *arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    return build(*arguments)


def test_methods_other_than_forward_use_the_trained_copy() -> None:
    base = built(AutoEncoder)
    model = get_peft_model(base, ROSEConfig(target_modules=["book", "head"]))
    plain = outputs(model, inputs())
    with torch.no_grad():
        base.book.rose_scale["default"].mul_(3)
    book = base.book
    x = inputs()["x"]
    model.eval()
    assert torch.equal(book.decode(x), x / book.rose_scale["default"].exp())
    assert not torch.equal(outputs(model, inputs()), plain)
    with model.disable_adapter():
        assert torch.equal(outputs(model, inputs()), plain)
        assert torch.equal(book.decode(x), x / book.base_layer._parameters["scale"].exp())
    train_watched(model, inputs())


def test_their_gradient_reaches_the_copy() -> None:
    base = built(AutoEncoder)
    model = get_peft_model(base, ROSEConfig(target_modules=["book", "head"])).train()
    model(**inputs()).square().mean().backward()
    grad = base.book.rose_scale["default"].grad
    assert grad is not None and grad.abs().sum() > 0
    assert base.book.base_layer._parameters["scale"].grad is None


@pytest.mark.parametrize("block", [SelfCheckpointing, CheckpointingCall])
def test_a_block_that_checkpoints_itself_trains_as_one_that_does_not(block: type[nn.Module]) -> None:
    def trained(kind: type[nn.Module]) -> dict[str, Tensor]:
        model = get_peft_model(built(Stack, kind), ROSEConfig())
        train(model, inputs(), steps=4)
        return snapshot(model)

    checkpointed, plain = trained(block), trained(Plain)
    assert checkpointed.keys() == plain.keys()
    for name, tensor in plain.items():
        torch.testing.assert_close(checkpointed[name], tensor, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("block", [SelfCheckpointing, CheckpointingCall])
def test_the_second_run_of_a_checkpoint_sees_the_trained_copy(block: type[nn.Module]) -> None:
    """Before any step base and copy are equal, and nothing shows."""
    gradients = []
    for kind in (block, Plain):
        base = built(Stack, kind)
        model = get_peft_model(base, ROSEConfig(strategy="second_order")).eval()
        with torch.no_grad():
            for layer in base.blocks:
                layer.rose_scale["default"].mul_(2)
        model(**inputs()).square().mean().backward()
        gradients.append([param.grad for name, param in model.named_parameters() if param.requires_grad])
    for one, two in zip(*gradients, strict=True):
        assert one is not None and two is not None
        torch.testing.assert_close(one, two)


def test_parameters_read_by_index() -> None:
    model = get_peft_model(built(ByIndex), ROSEConfig(target_modules=["scales", "named", "head"]))
    assert torch.equal(outputs(model, inputs()), outputs(built(ByIndex), inputs()))
    train_watched(model, inputs())
    trained = outputs(model, inputs())
    with model.disable_adapter():
        assert torch.equal(outputs(model, inputs()), outputs(built(ByIndex), inputs()))
    merged = model.merge_and_unload()
    assert type(merged.scales) is nn.ParameterList
    assert torch.equal(outputs(merged, inputs()), trained)


def test_the_class_and_the_parameters_are_given_back() -> None:
    model = get_peft_model(built(AutoEncoder), ROSEConfig(target_modules=["book", "head"]))
    assert isinstance(model.base_model.model.book.base_layer, Codebook)
    train(model, inputs())
    unloaded = model.unload()
    assert type(unloaded.book) is Codebook
    assert vars(unloaded.book).keys() == vars(built(Codebook)).keys()
    assert torch.equal(unloaded.book.scale, built(AutoEncoder).book.scale)
    assert unloaded.book.scale is unloaded.book._parameters["scale"]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_copy_goes_by_its_own_parameters(copied: Any) -> None:
    model = get_peft_model(built(AutoEncoder), ROSEConfig(target_modules=["book", "head"]))
    twin = copied(model)
    before = outputs(model, inputs())
    step(twin.train(), optimizer_of(twin), inputs())
    assert not torch.equal(outputs(twin, inputs()), before)
    assert torch.equal(outputs(model, inputs()), before)
    assert trainable(twin) == trainable(model)


class Shadowed(nn.Module):
    """A class attribute of a parameter's name, behind which no copy can be put."""

    scale: Any = None

    def __init__(self) -> None:
        super().__init__()
        self._parameters["scale"] = nn.Parameter(torch.ones(6))
        self.proj = nn.Linear(6, 6)
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.proj(x)) * self._parameters["scale"]


def test_a_module_that_cannot_show_its_copies_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModelError, match=r"blocks\.0.*'scale'.*exclude_modules") as caught:
        get_peft_model(built(Stack, Shadowed), ROSEConfig())
    assert "\n" not in str(caught.value)
