"""The sampled risk pass: what it does to the masks, and that it leaves no trace on the user's own pass."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from rose_peft import ROSEConfig, attach_rose, detach_rose, get_selector
from tests.helpers.comparing import assert_same
from tests.helpers.tiny import SIZES, batch, tiny_bert

STRATEGIES = ["first_order", "ensemble"]
NOTHING_FROZEN = {"upper_quantile": 1.0, "lower_quantile": 0.0}


def sampled(strategy: str = "first_order", **fields: Any) -> ROSEConfig:
    return ROSEConfig(**{"strategy": strategy, "risk_pass": "sampled", "upper_quantile": 0.5, **fields})


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, foreach=False)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, size: int = 8) -> None:
    torch.manual_seed(1000 + seed)
    model(**batch(model, size=size, seed=seed)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


# Nothing frozen is plain fine-tuning to the last bit ----------------------------------------------------------------


class Block(nn.Module):
    """Convolution, running statistics, a buffer in which it counts, and random numbers of three kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.still = nn.BatchNorm2d(4).eval()
        self.dropout = nn.Dropout(0.1)
        self.register_buffer("average", torch.ones(4))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.still.eval()
        y = self.dropout(torch.relu(self.norm(self.convolution(x))))
        y = self.still(y) * self.average.view(4, 1, 1)  # the graph saves the buffer as it is
        if self.training:
            self.calls += 1
            self.average = 0.9 * self.average + 0.1 * y.detach().abs().mean((0, 2, 3))
        return x + y * (1 + 0.1 * random.random() + 0.1 * float(numpy.random.rand()))


class Picture(nn.Module):
    """A small network for images in the manner of a residual network."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(4, 3)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = pixel_values
        for block in self.blocks:
            x = block(x)
        logits = self.head(x.mean((2, 3)))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def text(size: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, SIZES["vocab_size"], (size, 8), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def classes(size: int, seed: int) -> dict[str, Tensor]:
    return {**text(size, seed), "labels": torch.arange(size) % 2}


def pictures(channels: int) -> Callable[[int, int], dict[str, Tensor]]:
    def make(size: int, seed: int) -> dict[str, Tensor]:
        pixels = torch.randn(size, channels, 8, 8, generator=torch.Generator().manual_seed(seed))
        return {"pixel_values": pixels, "labels": torch.arange(size) % 2}

    return make


def t5() -> nn.Module:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 32}
    return tf.T5ForConditionalGeneration(tf.T5Config(**sizes, decoder_start_token_id=0))


def vit() -> nn.Module:
    sizes = {
        key: SIZES[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    }
    chances = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    return tf.ViTForImageClassification(tf.ViTConfig(**sizes, **chances, image_size=8, patch_size=4))


def gpt2() -> nn.Module:
    return tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=20))


def llama() -> nn.Module:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, num_key_value_heads=1, attention_dropout=0.1))


@dataclasses.dataclass(frozen=True)
class Kind:
    build: Callable[[], nn.Module]
    inputs: Callable[[int, int], dict[str, Tensor]]
    task_type: str | None
    targets: Any = "all-linear"


KINDS = {
    "bert": Kind(lambda: tiny_bert(num_labels=2), classes, "SEQ_CLS"),
    "gpt2": Kind(gpt2, text, "CAUSAL_LM", ["c_attn", "c_fc"]),
    "llama": Kind(llama, text, "CAUSAL_LM"),
    "t5": Kind(t5, text, "SEQ_2_SEQ_LM", ["q", "v", "wi"]),
    "vit": Kind(vit, pictures(3), None, ["query", "value"]),
    "batch norm": Kind(Picture, pictures(4), None, ["convolution"]),
}


def build(kind: Kind, lora: bool, rose: bool, **fields: Any) -> nn.Module:
    """A model with ROSE on it or taken off again."""
    torch.manual_seed(0)
    base = kind.build().train()
    inner = LoraConfig(r=2, target_modules=kind.targets, lora_dropout=0.1) if lora else None
    model = get_peft_model(base, sampled(task_type=kind.task_type, base_config=inner, **fields))
    if not rose:
        detach_rose(model)
    return model.train()


def draws() -> list[Any]:
    """The states of all generators, without moving them."""
    return [torch.get_rng_state().tolist(), random.getstate(), numpy.random.get_state()[1].tolist()]


def history(model: nn.Module, kind: Kind, autocast: bool, steps: int = 3) -> list[Any]:
    """Train with accumulation, and note everything that a pass beside it could have touched."""
    torch.manual_seed(1)
    random.seed(1)
    numpy.random.seed(1)
    optimizer = adamw(model)
    seen: list[Any] = []
    for number in range(2 * steps):
        inputs = kind.inputs(6, number)
        before = {name: tensor.clone() for name, tensor in inputs.items()}
        grads = {name: param.grad for name, param in model.named_parameters()}
        kept = {name: grad.clone() for name, grad in grads.items() if grad is not None}
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            output = model(**inputs)
        assert all(param.grad is grads[name] for name, param in model.named_parameters())
        assert all(torch.equal(grads[name], grad) for name, grad in kept.items())
        assert all(torch.equal(inputs[name], tensor) for name, tensor in before.items())
        seen += [output["loss"].detach().clone(), output["logits"].detach().clone(), draws()]
        seen += [{name: buffer.clone() for name, buffer in model.named_buffers()}]
        (output["loss"] / 2).backward()
        seen += [[param.grad.clone() for param in model.parameters() if param.grad is not None]]
        if number % 2:
            optimizer.step()
            optimizer.zero_grad()
    return [*seen, draws(), dict(model.named_parameters())]


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_frozen_is_plain_training_to_the_last_bit(kind: str, lora: bool, autocast: bool) -> None:
    plain = history(build(KINDS[kind], lora, rose=False), KINDS[kind], autocast)
    model = build(KINDS[kind], lora, rose=True, risk_interval=1, **NOTHING_FROZEN)
    assert_same(history(model, KINDS[kind], autocast), plain)
    selector = get_selector(model)
    # There was something to rank by: every unit that the passes reach has a norm.
    assert selector.statistics().steps == 3 and selector.statistics().skipped_risk_passes == 0
    assert int((selector.state.risk_average[0] > 0).sum()) >= 2
    assert selector.statistics().whole_risk_passes == 0


def test_the_output_is_the_users_own() -> None:
    """The very objects that the model made, with nothing of ours in their graph."""
    model = tiny_bert()
    made: list[Any] = []
    model.register_forward_hook(lambda module, args, output: made.append((output, dict(output))))
    attach_rose(model, sampled())
    output = model(**batch(model))
    assert output is made[0][0] and all(output[name] is tensor for name, tensor in made[0][1].items())
    assert not output.logits._backward_hooks and not output.loss._backward_hooks
    output.loss.backward()
    with pytest.raises(RuntimeError, match="a second time"):  # as without ROSE: nothing of the graph was kept
        output.loss.backward()


def test_it_is_the_batch_that_was_seen_and_not_one_more() -> None:
    """One pass over the batch and one over a quarter of it, at every fourth step; the first looks for dropout too."""
    model = tiny_bert()
    attach_rose(model, sampled(risk_interval=4, risk_fraction=0.25))
    optimizer = adamw(model)
    sizes: list[list[int]] = []
    model.bert.register_forward_pre_hook(
        lambda module, args, kwargs: sizes[-1].append(len(kwargs.get("input_ids", args[0] if args else ()))),
        with_kwargs=True,
    )
    for number in range(9):
        sizes.append([])
        step(model, optimizer, number, size=10)
    assert sizes == [[10, 3, 3], [10], [10], [10], [10, 3], [10], [10], [10], [10, 3]]


def test_the_gradient_is_that_of_the_second_pass_only() -> None:
    """By hand: rows 0, 2 of 4, whose first pass counts as a constant."""
    model = tiny_bert()
    selector = attach_rose(model, sampled(risk_fraction=0.5))
    inputs = batch(model)
    passes: list[dict[str, Tensor]] = []

    def keep(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        passes.append({"logits": output, "state": torch.get_rng_state()})

    model.classifier.register_forward_hook(keep, with_kwargs=True)
    seeds: list[Tensor] = []
    model.bert.register_forward_pre_hook(lambda *_: seeds.append(torch.get_rng_state()))
    torch.manual_seed(3)
    model(**inputs).loss.backward()
    adamw(model).step()
    found = selector.state.risk_average[0] / selector.state.risk_average[1]
    plain = tiny_bert()
    torch.set_rng_state(seeds[1])
    second = plain(**{name: tensor[[0, 2]] for name, tensor in inputs.items()}).logits
    assert torch.equal(second, passes[1]["logits"])
    one, two = passes[0]["logits"].detach()[[0, 2]].log_softmax(-1), second.log_softmax(-1)
    value = ((one.exp() - two.exp()) * (one - two)).sum() / 4
    named = dict(plain.named_parameters())
    gradients = torch.autograd.grad(value, [named[unit.name] for unit in selector.units])
    expected = torch.stack([gradient.double().square().sum() for gradient in gradients])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert not torch.equal(seeds[0], seeds[1])


def test_passes_draw_anew_each_time_and_the_same_from_the_same_state() -> None:
    def norms(seeds: list[int]) -> list[Tensor]:
        model = tiny_bert()
        selector = attach_rose(model, sampled(risk_interval=1, risk_smoothing=0.0, **NOTHING_FROZEN))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        found = []
        for seed in seeds:
            torch.manual_seed(seed)
            model(**batch(model)).loss.backward()
            optimizer.step()
            found.append(selector.state.risk_average[0].clone())
        return found

    one, two, three = norms([1, 2, 1])
    assert torch.equal(one, three) and not torch.equal(one, two)


def test_random_states_of_python_and_numpy_seed_it_too() -> None:
    model = build(KINDS["batch norm"], False, rose=True, risk_interval=1, risk_smoothing=0.0, **NOTHING_FROZEN)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    found = []
    for seeds in ((1, 1), (2, 1), (1, 2), (1, 1)):
        torch.manual_seed(0)
        random.seed(seeds[0])
        numpy.random.seed(seeds[1])
        model(**pictures(4)(6, 0))["loss"].backward()
        optimizer.step()
        found.append(get_selector(model).state.risk_average[0].clone())
    # The running average differs from step to step, but does not enter in the same way: only draws may be compared.
    assert len({tuple(norms.tolist()) for norms in found}) >= 3
