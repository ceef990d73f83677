"""`dropout=` reaches the blocks of every model, and where it does not ROSE says so."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from rose_peft import ROSEConfig, RoseInactiveError, attach_rose, detach_rose, get_selector
from tests.helpers.tiny import SIZES, batch, tiny_bert
from tests.helpers.watching import watched_step

Inputs = dict[str, Tensor]


def llama_tokens(**overrides: float) -> tuple[nn.Module, Inputs]:
    """Its only dropout module is in the head."""
    torch.manual_seed(0)
    model = tf.LlamaForTokenClassification(tf.LlamaConfig(**SIZES, num_key_value_heads=1, **overrides)).train()
    inputs = batch(model)
    inputs["labels"] = inputs["input_ids"] % 2
    return model, inputs


def bart() -> tuple[nn.Module, Inputs]:
    """Its blocks call `F.dropout` with numbers of their own; a dropout module is in the head."""
    sizes = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 32))
    }
    config = tf.BartConfig(
        vocab_size=32,
        d_model=16,
        max_position_embeddings=20,
        init_std=0.2,
        dropout=0.0,
        num_labels=3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
        **sizes,
    )
    torch.manual_seed(0)
    model = tf.BartForSequenceClassification(config).train()
    inputs = batch(model)
    inputs["input_ids"][:, -1] = 2  # the head reads the last end-of-sentence
    inputs["attention_mask"][:] = 1
    return model, inputs


class Embedded(nn.Module):
    """No dropout at all; an embedding and matrices by turns."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(32, 8)
        self.layers = nn.ModuleList([nn.ModuleDict({"linear": nn.Linear(8, 8)}) for _ in range(3)])
        self.head = nn.Linear(8, 2)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids).mean(dim=1)
        for layer in self.layers:
            x = x + torch.tanh(layer["linear"](x))
        return self.head(x)


def hidden_states(model: nn.Module, module: nn.Module, inputs: Inputs) -> list[Tensor]:
    """What a module gave in every pass of one training call."""
    seen: list[Tensor] = []

    def look(_: nn.Module, args: object, output: object) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output).detach())

    handle = module.register_forward_hook(look)
    model(**inputs)
    handle.remove()
    return seen


REACHED: dict[str, tuple[Callable[[], tuple[nn.Module, Inputs]], list[str]]] = {
    "Llama, dropout in the head": (llama_tokens, ["model.layers.0", "model.layers.1"]),
    "BART, numbers": (bart, ["model.encoder.layers.0", "model.encoder.layers.1", "model.decoder.layers.1"]),
}


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("name", REACHED)
def test_dropout_reaches_the_blocks(name: str, wrapped: bool) -> None:
    make, blocks = REACHED[name]
    model, inputs = make()
    inner = {block: model.get_submodule(block) for block in blocks}
    plain = model.eval()(**inputs).logits
    model.train()
    config = ROSEConfig(strategy="first_order", dropout=0.2, upper_quantile=0.5)
    whole = get_peft_model(model, config) if wrapped else model
    if not wrapped:
        attach_rose(model, config)
    for block, module in inner.items():
        first, second = hidden_states(whole, module, inputs)
        assert not torch.equal(first, second), block
    optimizer = torch.optim.AdamW([p for p in whole.parameters() if p.requires_grad], lr=1e-2)
    whole(**inputs).loss.backward()
    selector = get_selector(whole)
    watched_step(selector, optimizer.step, optimizer)
    scored = {unit.name: float(score) for unit, score in zip(selector.units, selector.state.first_scores, strict=True)}
    assert all(any(name.startswith(block) and score > 0 for name, score in scored.items()) for block in blocks)
    # Never in evaluation, and no longer once it is taken off.
    model, inputs = make()
    attach_rose(model, config)
    assert torch.equal(model.eval()(**inputs).logits, plain)
    detach_rose(model)
    for block in blocks:
        assert len({str(state) for state in hidden_states(model.train(), model.get_submodule(block), inputs)}) == 1


def test_numbers_of_the_blocks_are_set_and_put_back() -> None:
    """Numbers of dropout, and no others: the probability of leaving out layers is none, nor is the config's."""
    model, _ = bart()
    layer, encoder = model.model.encoder.layers[0], model.model.encoder
    own = {name: getattr(layer, name) for name in ("dropout", "activation_dropout")}
    model.classification_head.dropout.p = 0.25
    attach_rose(model, ROSEConfig(dropout=0.3))
    assert layer.dropout == layer.self_attn.dropout == encoder.dropout == model.classification_head.dropout.p == 0.3
    assert encoder.layerdrop == 0.0 and model.config.dropout == 0.0 and layer.embed_dim == 16
    detach_rose(model)
    assert {name: getattr(layer, name) for name in own} == own
    assert (layer.self_attn.dropout, encoder.dropout, model.classification_head.dropout.p) == (0.0, 0.0, 0.25)
    assert type(layer.dropout) is float


def test_a_model_with_dropout_of_its_own_in_the_blocks_gets_none_beside_it() -> None:
    model = tiny_bert()
    before = {id(m): (len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.bert.modules()}
    attach_rose(model, ROSEConfig(dropout=0.3))
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.3}
    assert {id(m): (len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.bert.modules()} == before
    detach_rose(model)
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.1}


@pytest.mark.parametrize("targets", [["words"], ["words", "linear"]])
@pytest.mark.parametrize("wrapped", [False, True])
def test_an_embedding_as_target_drops_what_it_gives(wrapped: bool, targets: list[str]) -> None:
    """Its inputs are numbers of words: neither scaled nor set to zero."""
    model = Embedded()
    ids = torch.randint(3, 32, (4, 8), generator=torch.Generator().manual_seed(0))
    config = ROSEConfig(strategy="first_order", dropout=0.2, target_modules=targets, upper_quantile=0.5)
    words = model.words
    whole = get_peft_model(model, config) if wrapped else model
    if not wrapped:
        attach_rose(model, config)
    seen: list[Tensor] = []
    words.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    torch.manual_seed(0)
    loss = whole(ids=ids).square().mean()
    assert len(seen) != 2 or all(torch.equal(given, ids) for given in seen)
    assert not torch.equal(whole(ids=ids), whole(ids=ids))
    loss.backward()
    selector = get_selector(whole)
    torch.optim.AdamW([p for p in whole.parameters() if p.requires_grad]).step()
    assert (selector.state.first_scores > 0).all() and selector.statistics().steps == 1
    whole.eval()
    assert torch.equal(whole(ids=ids), whole(ids=ids))


@pytest.mark.parametrize("way", ["attached", "full", "lora"])
def test_an_input_is_dropped_once(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In front of a tuner layer, and not of the copy or the matrices inside it as well."""
    seen = []
    drop = nn.functional.dropout
    monkeypatch.setattr(nn.functional, "dropout", lambda x, p, *rest: seen.append(p) or drop(x, p, *rest))
    targets = ["words", "linear"]
    config = ROSEConfig(strategy="second_order", dropout=0.2, target_modules=None if way == "lora" else targets)
    if way == "attached":
        whole: nn.Module = Embedded()
        attach_rose(whole, config)
    else:
        config.base_config = LoraConfig(r=2, target_modules=targets, lora_dropout=0.0) if way == "lora" else None
        whole = get_peft_model(Embedded(), config)
    whole.train()
    whole(ids=torch.ones(2, 3, dtype=torch.int64))
    assert seen == [0.2] * 4  # what the embedding gives, and the inputs of three matrices


def test_an_embedding_under_lora_as_target() -> None:
    model = Embedded()
    ids = torch.randint(3, 32, (4, 8), generator=torch.Generator().manual_seed(0))
    inner = LoraConfig(r=2, target_modules=["words", "linear"])
    whole = get_peft_model(model, ROSEConfig(strategy="first_order", dropout=0.2, base_config=inner))
    assert not torch.equal(whole(ids=ids), whole(ids=ids))
    whole(ids=ids).square().mean().backward()
    torch.optim.AdamW([p for p in whole.parameters() if p.requires_grad]).step()
    assert get_selector(whole).statistics().steps == 1


@pytest.mark.parametrize("classifier_dropout", [0.1, 0.0])
def test_equal_hidden_states_of_both_passes_are_pointed_out(classifier_dropout: float) -> None:
    """Dropout in the head alone ranks the head's view of the blocks, which is no risk of theirs."""
    model, inputs = llama_tokens(classifier_dropout=classifier_dropout)
    attach_rose(model, ROSEConfig(strategy="first_order"))
    optimizer = torch.optim.AdamW(model.parameters())
    with warnings.catch_warnings(record=True) as records:
        warnings.simplefilter("always")
        try:
            for _ in range(3):
                model(**inputs).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        except RoseInactiveError as error:
            assert "dropout" in str(error) and "ROSEConfig(dropout=" in str(error)
            return
    said = [str(record.message) for record in records if issubclass(record.category, UserWarning)]
    assert any("dropout" in message and "ROSEConfig(dropout=" in message for message in said), said


@pytest.mark.parametrize(("first", "second"), [(None, 0.3), (0.1, 0.3), (0.3, None)])
def test_each_adapter_trains_with_the_dropout_that_it_asks_for(first: float | None, second: float | None) -> None:
    def config(dropout: float | None) -> ROSEConfig:
        return ROSEConfig(strategy="first_order", dropout=dropout)

    def probabilities() -> set[float]:
        model(**batch(model))
        return {module.p for module in model.modules() if isinstance(module, nn.Dropout)}

    model = get_peft_model(tiny_bert(), config(first))
    model.add_adapter("other", config(second))
    model.train()
    assert probabilities() == {first or 0.1}
    model.set_adapter("other")
    assert probabilities() == {second or 0.1}
    model.set_adapter("default")
    assert probabilities() == {first or 0.1}


def test_the_copy_of_a_further_adapter_has_the_models_own_dropout() -> None:
    """A number that a leaf drops with is copied with it, while another adapter holds it."""

    class Leaf(nn.Linear):
        dropout = 0.0

        def __init__(self) -> None:
            super().__init__(4, 4)
            self.dropout = 0.0

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(super().forward(x), self.dropout, self.training)

    class Leaves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(Leaf()) for _ in range(3))

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            for layer in self.layers:
                x = layer(x)
            return {"logits": x}

    model = get_peft_model(Leaves(), ROSEConfig(strategy="first_order", dropout=0.3))
    model.add_adapter("other", ROSEConfig(strategy="second_order"))
    model.train()
    numbers = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        model(x=torch.ones(2, 4))
        numbers[name] = {block[0].rose_copy[name].dropout for block in model.base_model.model.layers}
    assert numbers == {"default": {0.3}, "other": {0.0}}
