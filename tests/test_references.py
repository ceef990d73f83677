"""Models that reach their own modules by lists, tuples and dictionaries train what they reach."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import Tensor, nn

from rose_peft import ROSEConfig


class Tied(nn.Module):
    """A head that is tied to the embedding by a tuple, which hides it from `parameters()`."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(embedding.num_embeddings))
        self.tied = (embedding,)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.tied[0].weight.T + self.bias


class Referring(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(20, 8)
        self.layers = nn.ModuleList(nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)}) for _ in range(3))
        self.drop = nn.Dropout(0.2)
        self.firsts = [layer["a"] for layer in self.layers]
        self.seconds = {"nested": [(layer["b"],) for layer in self.layers]}
        self.head = Tied(self.embedding)

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        x = self.embedding(ids).mean(1)
        for first, (second,) in zip(self.firsts, self.seconds["nested"], strict=True):
            x = x + second(self.drop(first(x).relu()))
        logits = self.head(x)
        return {"loss": F.cross_entropy(logits, ids[:, 0]), "logits": logits}


def trained(model: nn.Module, steps: int = 4) -> nn.Module:
    model.train()
    optimizer = torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], lr=1e-2)
    torch.manual_seed(1)
    for step in range(steps):
        ids = torch.randint(0, 20, (8, 4), generator=torch.Generator().manual_seed(step))
        model(ids=ids)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("original_weights", ["keep", "drop"])
def test_nothing_frozen_equals_plain_training(original_weights: str) -> None:
    plain = trained(Referring()).state_dict()
    config = ROSEConfig(strategy="second_order", upper_quantile=1.0, original_weights=original_weights)
    merged = trained(get_peft_model(Referring(), config)).merge_and_unload()
    assert {name for name, value in merged.state_dict().items() if not torch.equal(value, plain[name])} == set()
    assert merged.firsts[0] is merged.layers[0]["a"] and merged.head.tied[0] is merged.embedding


def test_unloading_and_disabling_give_the_original_back() -> None:
    original = Referring().eval()
    ids = torch.arange(8).view(2, 4)
    expected = original(ids=ids)["logits"]
    model = trained(get_peft_model(copy.deepcopy(original), ROSEConfig(strategy="second_order"))).eval()
    assert not torch.equal(model(ids=ids)["logits"], expected)
    with model.disable_adapter():
        assert torch.equal(model(ids=ids)["logits"], expected)
    assert torch.equal(model.unload()(ids=ids)["logits"], expected)


def test_a_further_adapter_trains_what_the_model_reaches() -> None:
    model = get_peft_model(Referring(), ROSEConfig(strategy="second_order", upper_quantile=1.0))
    model.add_adapter("other", ROSEConfig(strategy="second_order", upper_quantile=1.0))
    model.set_adapter("other")
    plain = trained(Referring()).state_dict()
    merged = trained(model).merge_and_unload().state_dict()
    assert all(torch.equal(value, plain[name]) for name, value in merged.items())


def test_containers_that_hold_each_other_and_modules_that_hold_themselves() -> None:
    model = Referring()
    tree: dict[str, object] = {"child": {}}
    tree["child"]["parent"] = tree  # type: ignore[index]
    model.tree = model.layers[0]["a"].tree = tree
    model.layers[0]["a"].chain = [model.layers[0]["a"]]
    model = get_peft_model(model, ROSEConfig(strategy="second_order", upper_quantile=1.0))
    plain = trained(Referring()).state_dict()
    merged = trained(model).merge_and_unload()
    assert all(torch.equal(value, plain[name]) for name, value in merged.state_dict().items())
    assert merged.layers[0]["a"].chain == [merged.layers[0]["a"]]
