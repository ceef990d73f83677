"""What a model returns and is called with: caches, losses, tuples, and what the logits mean."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from rose_peft import ROSEConfig, RoseError, UnsupportedModelError, attach_rose, get_selector
from rose_peft.divergence import logits_divergence
from rose_peft.outputs import counted_positions, logits_of
from tests.helpers.tiny import batch, tiny_bert
from tests.helpers.training import optimizer_of


def scores_after_a_step(model: nn.Module, inputs: dict[str, Any], loss_of: Any, **fields: Any) -> dict[str, float]:
    """First-order scores of one step, by unit."""
    selector = attach_rose(model, ROSEConfig(strategy="first_order", **fields))
    model.train()
    optimizer = optimizer_of(model)
    torch.manual_seed(1)
    loss_of(model(**inputs)).backward()
    optimizer.step()
    return {name: unit.first_order_score for name, unit in selector.statistics().units.items()}


def mean_square(output: Any) -> Tensor:
    return (output if isinstance(output, Tensor) else output.logits).square().mean()


# A loss without logits ----------------------------------------------------------------------------------------------


class ChunkedForCausalLM(LlamaForCausalLM):
    """As TRL's chunked loss and Liger's fused one: with labels there is a loss, and there are no logits."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        if output.loss is not None:
            output.logits = None
        return output


@pytest.mark.parametrize("risk_pass", ["sampled", "paired"])
def test_a_model_that_leaves_its_logits_out_is_asked_for_them(risk_pass: str) -> None:
    """Its scores are those of a model that gives them, from the same draws; its loss is its own."""

    def step(chunked: bool) -> tuple[Tensor, dict[str, float]]:
        model = tiny_llama(ChunkedForCausalLM if chunked else LlamaForCausalLM)
        selector = attach_rose(model, ROSEConfig(strategy="first_order", risk_pass=risk_pass))
        model.train()
        labels = sentence().clone()
        labels[:, :3] = -100  # what does not count
        torch.manual_seed(1)
        if risk_pass == "paired" and not chunked:
            with torch.no_grad():
                model(input_ids=sentence(), labels=labels)  # draws what the chunked pass draws, which tells nothing
        loss = model(input_ids=sentence(), labels=labels).loss
        loss.backward()
        optimizer_of(model).step()
        return loss.detach(), {name: unit.first_order_score for name, unit in selector.statistics().units.items()}

    losses, scores = zip(step(True), step(False), strict=True)
    assert scores[0] == scores[1] and all(score > 0 for score in scores[0].values())
    if risk_pass == "sampled":
        assert torch.equal(losses[0], losses[1])


# A cache of the user's ----------------------------------------------------------------------------------------------


def tiny_llama(kind: type[LlamaForCausalLM] = LlamaForCausalLM) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "attention_dropout": 0.3, "initializer_range": 0.2}
    return kind(LlamaConfig(**sizes, **heads, attn_implementation="eager"))


def sentence(length: int = 6, seed: int = 0) -> Tensor:
    return torch.randint(3, 32, (4, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("strategy", ["first_order", "ensemble"])
@pytest.mark.parametrize("prefix", [0, 5])
def test_a_cache_of_the_users_is_advanced_once(strategy: str, prefix: int) -> None:
    model = tiny_llama()
    cache = DynamicCache()
    if prefix:
        with torch.no_grad():
            model.eval()(input_ids=sentence(prefix, seed=1), past_key_values=cache, use_cache=True)
    attach_rose(model, ROSEConfig(strategy=strategy))
    model.train()
    output = model(input_ids=sentence(), labels=sentence(), past_key_values=cache, use_cache=True)
    assert cache.get_seq_length() == prefix + 6
    output.loss.backward()
    optimizer_of(model).step()
    assert get_selector(model).statistics().steps == 1


def test_both_passes_start_from_the_same_cache() -> None:
    """An empty cache changes nothing; one that the first pass has filled would be read by the second."""
    without = scores_after_a_step(tiny_llama(), {"input_ids": sentence(), "use_cache": False}, mean_square)
    inputs = {"input_ids": sentence(), "use_cache": True, "past_key_values": DynamicCache()}
    given = scores_after_a_step(tiny_llama(), inputs, mean_square)
    assert given == pytest.approx(without, rel=1e-4)


# What comes back ----------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(6, 6)
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.lin(x)).tanh()


class Returns(nn.Module):
    """Two blocks and a head; `what` says what it returns."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Any:
        for block in self.blocks:
            x = block(x)
        logits = self.head(x.mean(dim=1))
        values = {"logits": logits, "loss": logits.square().mean(), "hidden and logits": (x, logits)}
        return values[self.what]


def returns(what: str) -> nn.Module:
    torch.manual_seed(0)
    return Returns(what).train()


def vectors() -> dict[str, Tensor]:
    return {"x": torch.randn(5, 4, 6, generator=torch.Generator().manual_seed(0))}


def test_a_model_that_returns_its_loss_alone_is_refused() -> None:
    model = returns("loss")
    attach_rose(model, ROSEConfig(strategy="first_order"))
    with pytest.raises(UnsupportedModelError) as caught:
        model(**vectors()).backward()
    assert "no logits" in str(caught.value) and "second_order" in str(caught.value)


def test_a_loss_alone_is_enough_for_the_second_order() -> None:
    model = returns("loss")
    selector = attach_rose(model, ROSEConfig(strategy="second_order"))
    optimizer = optimizer_of(model)
    for _ in range(3):
        optimizer.zero_grad()
        model(**vectors()).backward()
        optimizer.step()
    assert selector.statistics().last_kept_share < 1


def test_hidden_states_are_not_taken_for_logits() -> None:
    """Either the logits of the pair are found, or it is refused; never the divergence of hidden states."""
    expected = scores_after_a_step(returns("logits"), vectors(), mean_square)
    try:
        found = scores_after_a_step(returns("hidden and logits"), vectors(), lambda output: mean_square(output[1]))
    except RoseError as error:
        assert "logits" in str(error)
    else:
        assert found == pytest.approx(expected, rel=1e-5)


# What the logits mean -----------------------------------------------------------------------------------------------


class Storyteller(GPT2LMHeadModel):
    """A causal model whose class does not say so."""


def tiny_gpt2(cls: type[nn.Module] = GPT2LMHeadModel) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "n_positions": 20, "n_embd": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.2}
    return cls(GPT2Config(**sizes, attn_implementation="eager"))


def story() -> dict[str, Tensor]:
    """Labels in the second half only: a shift by one position changes which logits count."""
    labels = sentence(8)
    return {"input_ids": sentence(8), "labels": labels.masked_fill(torch.arange(8) < 4, -100)}


def by_loss(output: Any) -> Tensor:
    return output.loss


def test_a_compiled_causal_model_is_causal() -> None:
    expected = scores_after_a_step(tiny_gpt2(), story(), by_loss)
    compiled = scores_after_a_step(torch.compile(tiny_gpt2(), backend="eager"), story(), by_loss)
    assert [score for score in compiled.values()] == pytest.approx(list(expected.values()), rel=1e-4)


@pytest.mark.parametrize("fields", [{"head": "causal"}, {"task_type": "CAUSAL_LM"}], ids=str)
def test_the_config_says_that_a_model_is_causal(fields: dict[str, Any]) -> None:
    expected = scores_after_a_step(tiny_gpt2(), story(), by_loss)
    said = scores_after_a_step(tiny_gpt2(Storyteller), story(), by_loss, **fields)
    assert said == pytest.approx(expected, rel=1e-5)
    unsaid = scores_after_a_step(tiny_gpt2(), story(), by_loss, head="softmax")
    assert unsaid != pytest.approx(expected, rel=1e-3), "the shift must show in this batch"


def test_a_decoder_only_model_named_for_generation_is_causal() -> None:
    """As vision-language models are named; encoder-decoders, whose labels are not shifted, have that name too."""

    class PicturesForConditionalGeneration(GPT2LMHeadModel):
        pass

    expected = scores_after_a_step(tiny_gpt2(), story(), by_loss)
    found = scores_after_a_step(tiny_gpt2(PicturesForConditionalGeneration), story(), by_loss)
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "head, problem_type",
    [
        ("softmax", "single_label_classification"),
        ("multi_label", "multi_label_classification"),
        ("regression", "regression"),
    ],
)
def test_the_config_says_what_logits_mean(head: str, problem_type: str) -> None:
    inputs = {name: tensor for name, tensor in batch(tiny_bert()).items() if name != "labels"}
    known = scores_after_a_step(tiny_bert(problem_type=problem_type), inputs, mean_square)
    other = "regression" if head != "regression" else "multi_label_classification"
    said = scores_after_a_step(tiny_bert(problem_type=other), inputs, mean_square, head=head)
    assert said == pytest.approx(known, rel=1e-5), "what the config says goes before problem_type"
    misread = scores_after_a_step(tiny_bert(problem_type=other), inputs, mean_square)
    assert misread != pytest.approx(known, rel=1e-3)


class OneNumber(Returns):
    """One number per example: [B, 1], or [B] where it is squeezed."""

    def forward(self, x: Tensor) -> Tensor:
        numbers = Returns.forward(self, x)[:, :1]
        return numbers.squeeze(-1) if self.squeezed else numbers


@pytest.mark.parametrize("risk_pass", ["paired", "sampled"])
def test_squeezed_logits_are_numbers_and_no_distribution_over_the_batch(risk_pass: str) -> None:
    scores = []
    for squeezed in (False, True):
        torch.manual_seed(0)
        model = OneNumber("logits").train()
        model.squeezed = squeezed
        scores.append(scores_after_a_step(model, vectors(), mean_square, risk_pass=risk_pass))
    assert scores[1] == pytest.approx(scores[0], rel=1e-6)


def test_labels_count_whether_they_are_given_by_name_or_by_place() -> None:
    from transformers import BertConfig, BertForTokenClassification

    from tests.helpers.tiny import SIZES

    def build() -> nn.Module:
        torch.manual_seed(0)
        return BertForTokenClassification(BertConfig(**SIZES))

    inputs = batch(tiny_bert())
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, :2] = 1
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    known = scores_after_a_step(build(), {"input_ids": ids, "attention_mask": mask, "labels": labels}, mean_square)
    model = build().train()
    selector = attach_rose(model, ROSEConfig(strategy="first_order"))
    optimizer = optimizer_of(model)
    torch.manual_seed(1)
    names = list(inspect.signature(type(model).forward).parameters)[1:]  # another order in each version
    given = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    mean_square(model(*(given.get(name) for name in names[: names.index("labels") + 1]))).backward()
    optimizer.step()
    found = {name: unit.first_order_score for name, unit in selector.statistics().units.items()}
    assert found == pytest.approx(known, rel=1e-6)


def test_the_loss_behind_the_logits_is_the_mean_of_both_passes_too() -> None:
    """As small models of one's own return it."""

    class LogitsFirst(Returns):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            logits = super().forward(x)
            seen.append(logits.square().mean())
            return logits, seen[-1]

    seen: list[Tensor] = []
    torch.manual_seed(0)
    model = LogitsFirst("logits").train()
    attach_rose(model, ROSEConfig(strategy="first_order"))
    logits, loss = model(**vectors())
    first, second, *_ = seen
    assert logits.shape == (5, 3) and first != second
    torch.testing.assert_close(loss, (first + second) / 2)


class Named(NamedTuple):
    loss: Tensor
    logits: Tensor


def test_a_named_tuple_stays_one() -> None:
    class ReturnsNamed(Returns):
        def forward(self, x: Tensor) -> Named:
            logits = super().forward(x)
            return Named(logits.square().mean(), logits)

    torch.manual_seed(0)
    model = ReturnsNamed("logits").train()
    attach_rose(model, ROSEConfig(strategy="first_order"))
    output = model(**vectors())
    assert type(output) is Named and output.loss.dim() == 0 and output.logits.shape == (5, 3)


def test_per_token_scores_can_be_declared() -> None:
    """[rows, positions] looks like classes: a softmax over positions would be taken for what it is not."""

    class PerToken(Returns):
        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return self.head(x)[..., 0]

    def build() -> nn.Module:
        torch.manual_seed(0)
        return PerToken("logits").train()

    scores = {
        head: scores_after_a_step(build(), vectors(), mean_square, head=head)
        for head in (None, "softmax", "multi_label", "regression")
    }
    assert scores[None] == scores["softmax"]
    for head in ("multi_label", "regression"):
        assert scores[head] != pytest.approx(scores["softmax"], rel=1e-3)


@pytest.mark.parametrize("kept", [3, torch.tensor([2, 3, 4])])
def test_padding_does_not_count_among_kept_logits(kept: Any) -> None:
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    labels = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, -100, -100]])
    logits = torch.zeros(2, 3, 7)
    counted = counted_positions(logits, {"attention_mask": mask, "logits_to_keep": kept}, True)
    assert counted.tolist() == [[True, True, True], [True, False, False]]
    counted = counted_positions(logits, {"labels": labels, "logits_to_keep": kept}, True)
    assert counted.tolist() == [[True, True, False], [False, False, False]]
    whole = counted_positions(torch.zeros(2, 5, 7), {"attention_mask": mask, "logits_to_keep": 0}, True)
    assert torch.equal(whole, mask.bool())


@pytest.mark.parametrize("own", ["decoder_input_ids", "decoder_inputs_embeds"])
def test_an_encoders_padding_says_nothing_of_the_decoder(own: str) -> None:
    """As many tokens in both, by chance or by padding to one length, where the Trainer has popped the labels."""
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])
    inputs = {"attention_mask": mask, own: torch.ones(2, 4)}
    assert counted_positions(torch.zeros(2, 4, 7), inputs, False) is None
    inputs["decoder_attention_mask"] = 1 - mask
    assert torch.equal(counted_positions(torch.zeros(2, 4, 7), inputs, False), mask == 0)
    # BART makes its decoder's inputs from the encoder's.
    assert torch.equal(counted_positions(torch.zeros(2, 4, 7), {"attention_mask": mask, own: None}, False), mask == 1)


def test_start_and_end_count_in_tuples_too() -> None:
    from transformers import BertConfig, BertForQuestionAnswering

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = BertForQuestionAnswering(BertConfig(vocab_size=20, **sizes))
    inputs = {"input_ids": torch.ones(2, 4, dtype=torch.long)}
    labels = {"start_positions": torch.tensor([0, 1]), "end_positions": torch.tensor([2, 3])}
    model.eval()
    for more in ({}, labels):
        wanted = logits_of(model(**inputs, **more), model)
        found = logits_of(model(**inputs, **more, return_dict=False), model)
        assert len(found) == 2 and all(map(torch.equal, found, wanted))


@pytest.mark.parametrize(
    ("shape", "inputs", "dim"),
    [
        ((2, 5, 4, 3), {"labels": torch.zeros(2, 5, 4)}, -1),  # a label for each pair of tokens
        ((2, 5, 4, 3), {"input_ids": torch.zeros(2, 5)}, -1),
        ((2, 3, 5, 4), {"labels": torch.zeros(2, 5, 4)}, 1),  # a label for each pixel
        ((2, 3, 5, 4), {"labels": torch.zeros(2, 10, 8), "pixel_values": torch.zeros(2, 3, 9, 9)}, 1),
        ((2, 3, 5, 4), {"input_ids": torch.zeros(2, 5), "pixel_values": torch.zeros(2, 3, 9, 9)}, 1),
        ((2, 3, 3, 3), {"labels": torch.zeros(2, 3, 3)}, 1),  # may be either: as torch's losses have it
        ((2, 3, 5, 4), {"image": torch.zeros(2, 3, 9, 9)}, 1),
    ],
)
def test_where_the_classes_lie_in_four_dimensions(shape: tuple[int, ...], inputs: dict[str, Any], dim: int) -> None:
    torch.manual_seed(0)
    first, second = torch.randn(shape), torch.randn(shape)
    logs = [torch.log_softmax(logits, dim) for logits in (first, second)]
    expected = ((logs[0].exp() - logs[1].exp()) * (logs[0] - logs[1])).sum() / 4
    torch.testing.assert_close(logits_divergence([first], [second], inputs)[0], expected)


def test_logits_of_several_heads_are_named() -> None:
    with pytest.raises(UnsupportedModelError, match="whose logits are a tuple, not a tensor"):
        logits_of({"loss": torch.zeros(()), "logits": (torch.zeros(2, 3), torch.zeros(2, 3))})
