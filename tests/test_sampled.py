"""The sampled risk pass: what it does to the masks, and that it leaves no trace on the user's own pass."""

from __future__ import annotations

import copy
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
from torch.utils.checkpoint import checkpoint

from rose_peft import (
    ROSEConfig,
    RoseInactiveError,
    UnsupportedEngineError,
    attach_rose,
    detach_rose,
    get_selector,
    watchdog,
)
from rose_peft.aside import aside
from rose_peft.average import RiskAverage
from rose_peft.config import RISK_SMOOTHING
from rose_peft.outputs import logits_of
from rose_peft.selector import RoseSelector
from tests.helpers.comparing import assert_same, everything
from tests.helpers.tiny import SIZES, batch, tiny_bert
from tests.helpers.window import figures_of

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
    sizes = {name: SIZES[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    chances = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    return tf.ViTForImageClassification(
        tf.ViTConfig(**sizes, **chances, num_attention_heads=2, image_size=8, patch_size=4)
    )


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
    "vit": Kind(vit, pictures(3), None, ["query", "value", "q_proj", "v_proj"]),  # by version of transformers
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
    assert int((selector.state.risk_linear[0] > 0).sum()) >= 2
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
    """One pass over the batch; at every fourth step two over a quarter of it, in one call; the first looks closer."""
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
    assert sizes == [[10, 6, 3, 3], [10], [10], [10], [10, 6], [10], [10], [10], [10, 6]]


@pytest.mark.parametrize("apart", [False, True])
def test_the_gradient_runs_through_both_small_passes(apart: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: rows 0, 2 of 4, twice. Through one pass alone norms would be others."""
    model = tiny_bert()
    selector = attach_rose(model, sampled(risk_interval=1, risk_fraction=0.5, risk_smoothing=0.0, **NOTHING_FROZEN))
    inputs = batch(model)
    monkeypatch.setattr("rose_peft.sampled._rows_are_apart", lambda *_: apart)
    logits: list[Tensor] = []
    model.classifier.register_forward_hook(lambda module, args, output: logits.append(output))
    seeds: list[Tensor] = []
    model.bert.register_forward_pre_hook(lambda *_: seeds.append(torch.get_rng_state()))
    torch.manual_seed(3)
    model(**inputs).loss.backward()
    adamw(model).step()
    found = selector.state.risk_linear[0] / selector.state.risk_linear[1]
    plain = tiny_bert()
    torch.set_rng_state(seeds[1])  # both passes draw one after the other, or all of it at once
    rows = [[0, 2, 0, 2]] if apart else [[0, 2], [0, 2]]
    calls = [plain(**{name: tensor[each] for name, tensor in inputs.items()}).logits for each in rows]
    assert all(map(torch.equal, calls, logits[1:]))
    passes = calls[0].chunk(2) if apart else calls
    one, two = (each.log_softmax(-1) for each in passes)
    value = ((one.exp() - two.exp()) * (one - two)).sum() / 4
    named = dict(plain.named_parameters())
    gradients = torch.autograd.grad(value, [named[unit.name] for unit in selector.units])
    expected = torch.stack([gradient.double().square().sum() for gradient in gradients])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    # Of vectors the gradients themselves, in the order of the units.
    norms = [gradient.double() for gradient in gradients if gradient.dim() == 1]
    assert len(norms) == 4  # two norms in each of two blocks
    torch.testing.assert_close(selector.state.risk_gradients, torch.cat(norms), rtol=1e-4, atol=1e-9)
    assert not torch.equal(seeds[0], seeds[1]) and not torch.equal(*passes)


class Similar(nn.Module):
    """Logits that compare each row with each other one, as contrastive models have them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.1)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x @ x.T


def speech(drops: float) -> nn.Module:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    convolutions = {"conv_dim": (8, 8), "conv_stride": (4, 4), "conv_kernel": (8, 8), "num_feat_extract_layers": 2}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0}
    config = tf.Wav2Vec2Config(**sizes, **convolutions, **positions, num_labels=3, layerdrop=drops)
    return tf.Wav2Vec2ForSequenceClassification(config).train()


@pytest.mark.parametrize(
    ("build", "inputs", "expected"),
    [
        (Picture, lambda: pictures(4)(8, 0), [8, 2, 2]),  # statistics over the rows
        (lambda: vit().train(), lambda: pictures(3)(8, 0), [8, 4]),
        (Similar, lambda: {"x": torch.randn(8, 8)}, [8, 2, 2]),
        (lambda: speech(0.1), lambda: {"input_values": torch.randn(8, 400)}, [8, 2, 2]),  # draws layers for all rows
        (lambda: speech(0.0), lambda: {"input_values": torch.randn(8, 400)}, [8, 4]),
    ],
    ids=["batch norm", "vit", "similarities", "layer drop", "no layer drop"],
)
def test_both_passes_are_one_call_where_rows_are_apart(
    build: Callable[[], nn.Module], inputs: Callable[[], dict[str, Tensor]], expected: list[int]
) -> None:
    model = build()
    attach_rose(model, sampled(risk_interval=1, risk_fraction=0.25))
    optimizer = adamw(model)
    called, sizes = model.forward, []

    def forward(**kwargs: Tensor) -> Any:  # itself, for our passes go past the hooks of the model
        sizes.append(len(next(iter(kwargs.values()))))
        return called(**kwargs)

    model.forward = forward
    for number in range(2):
        sizes.clear()
        output = model(**inputs())
        logits = output if isinstance(output, Tensor) else output["logits"]
        logits.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert sizes == (expected if number or expected[1] == 2 else [*expected, 2, 2])


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
            found.append(selector.state.risk_linear[0].clone())
        return found

    one, two, three = norms([1, 2, 1])
    assert torch.equal(one, three) and not torch.equal(one, two)


def test_the_draws_follow_from_the_users_generator_of_torch() -> None:
    """Not from those of Python and NumPy, which a user who never needed them has not seeded."""
    module = nn.Linear(1, 1)

    def draw(seed: int) -> tuple[float, ...]:
        torch.manual_seed(seed)
        random.seed()
        numpy.random.seed()
        before = draws()
        with aside(module):
            inside = float(torch.rand(())), random.random(), float(numpy.random.rand())
        assert draws() == before
        return (*inside, float(torch.rand(())))

    one, two, three = draw(1), draw(2), draw(1)
    assert one == three and not set(one) & set(two)
    assert one[0] != one[3]  # what the user draws next is something else


def test_after_an_error_everything_is_back_in_its_place() -> None:
    model = Picture().train()
    model.blocks[0].gradient_checkpointing = True
    buffers, before = dict(model.named_buffers()), draws()
    with pytest.raises(KeyError), aside(model):
        assert not model.blocks[0].gradient_checkpointing
        model(**pictures(4)(2, 0))
        raise KeyError
    assert model.blocks[0].gradient_checkpointing is True and draws() == before
    assert all(buffer is buffers[name] for name, buffer in model.named_buffers())
    assert all(int(buffer) == 0 for name, buffer in buffers.items() if name.endswith(("calls", "num_batches_tracked")))


def test_quantized_weights_are_not_copied() -> None:
    layer = nn.Linear(2, 2)
    layer.register_buffer("qweight", torch.zeros(2, 2, dtype=torch.int32))
    layer.register_buffer("scales", torch.ones(2))
    originals = dict(layer.named_buffers())
    with aside(layer):
        assert layer.qweight is originals["qweight"] and layer.scales is not originals["scales"]


# Smoothing ----------------------------------------------------------------------------------------------------------


def recorded(model: nn.Module, steps: int, **fields: Any) -> tuple[RoseSelector, list[Any]]:
    """Train, and keep (risk figures, average after the step, masks) of every step."""
    selector = attach_rose(model, sampled(**fields))
    gathered: list[Any] = []
    original = selector.gather
    selector.gather = lambda *args: gathered.append(original(*args)) or gathered[-1]  # type: ignore[method-assign]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2)
    seen = []
    for number in range(steps):
        step(model, optimizer, number)
        seen.append((gathered[-1].risk, selector.state.risk_linear.clone(), selector.state.last_mask.clone()))
    return selector, seen


def test_masks_rank_the_average_of_all_passes_so_far() -> None:
    smoothing = 0.2
    selector, seen = recorded(tiny_bert(), 18, risk_interval=3, risk_smoothing=smoothing, upper_quantile=0.7)
    expected = RiskAverage.empty(len(selector.units), selector.state.owners)
    sums = torch.zeros(len(selector.units), dtype=torch.float64)
    for number, (risk, average, mask) in enumerate(seen):
        assert (risk is not None) == (number % 3 == 0)
        if risk is not None:
            expected = expected.after(risk, smoothing)
            sums = smoothing * sums + 0.8 * risk.square_sum / risk.finite
        torch.testing.assert_close(average[0], sums, rtol=1e-12, atol=0)
        squares = expected.squares()
        assert squares is not None
        scores = squares.sqrt().float()
        assert torch.equal(mask.bool(), scores <= scores.quantile(0.7))
    masks = [mask for _, _, mask in seen]
    assert torch.equal(masks[0], masks[2]) and not all(torch.equal(masks[0], mask) for mask in masks)


def test_the_interval_counts_optimizer_steps_and_each_micro_batch_has_a_pass() -> None:
    model = tiny_bert()
    selector = attach_rose(model, sampled(risk_interval=2))
    optimizer = adamw(model)
    counts = []
    for number in range(4):
        for micro in range(3):
            model(**batch(model, seed=3 * number + micro)).loss.backward()
        counts.append(int(figures_of(selector).finite))
        optimizer.step()
        optimizer.zero_grad()
    assert counts == [3, 0, 3, 0]


def test_a_step_that_is_not_taken_does_not_count() -> None:
    """As after an overflow under a GradScaler: the risk pass of the next one is due again."""
    model = tiny_bert()
    selector = attach_rose(model, sampled(risk_interval=4))
    model(**batch(model)).loss.backward()
    model.zero_grad()
    model(**batch(model, seed=1)).loss.backward()
    adamw(model).step()
    assert selector.statistics().steps == 1 and (selector.state.risk_linear[1] > 0).all()


class Sometimes(nn.Module):
    """Logits that are not finite in the passes that are asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8)) for _ in range(4))
        self.dropout = nn.Dropout(0.2)
        self.factor = 1.0

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(self.dropout(x))) + x
        return x * self.factor


def test_a_pass_that_is_not_finite_is_skipped_and_the_average_kept() -> None:
    model = Sometimes()
    selector = attach_rose(model, sampled(risk_interval=1))
    optimizer = adamw(model)
    averages, masks = [], []
    for number in range(4):
        model.factor = float("inf") if number == 2 else 1.0
        logits = model(torch.randn(8, 8, generator=torch.Generator().manual_seed(number)))
        (logits / model.factor if number != 2 else torch.nan_to_num(logits, 0.0, 0.0, 0.0) + 0 * logits.detach()).sum()
        loss = sum(layer(torch.ones(8)).square().sum() for layer in model.layers)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        averages.append(selector.state.risk_linear.clone())
        masks.append(selector.state.last_mask.clone())
    assert selector.statistics().skipped_risk_passes == 1
    assert torch.equal(averages[1], averages[2]) and not torch.equal(averages[2], averages[3])
    assert torch.equal(masks[1], masks[2]) and averages[3].isfinite().all()
    assert all(param.isfinite().all() for param in model.parameters())


def test_warm_up_masks_nothing_and_averages_already() -> None:
    _, seen = recorded(tiny_bert(), 6, risk_interval=2, warmup_steps=5)
    assert all((mask == 1).all() for _, _, mask in seen[:5]) and (seen[5][2] == 0).any()
    assert [risk is not None for risk, _, _ in seen] == [True, False] * 3
    assert float(seen[4][1][1, 0]) == pytest.approx(1 - RISK_SMOOTHING**3)


def test_two_adapters_in_turn_keep_their_own_averages_and_intervals() -> None:
    targets = ["query", "value", "dense"]
    model = get_peft_model(tiny_bert(), sampled(target_modules=targets, risk_interval=2))
    model.add_adapter("other", sampled(target_modules=targets, risk_interval=3))
    selector = get_selector(model)
    optimizer = torch.optim.AdamW([param for name, param in model.named_parameters() if ".rose_" in name], lr=1e-2)
    changes: dict[str, list[bool]] = {"default": [], "other": []}
    for number in range(12):
        name = ("default", "other")[number % 2]
        model.set_adapter(name)
        assert selector.current.name == name
        before = {key: steered.state.risk_linear.clone() for key, steered in selector.adapters.items()}
        step(model, optimizer, number)
        after = {key: steered.state.risk_linear for key, steered in selector.adapters.items()}
        changes[name].append(not torch.equal(before[name], after[name]))
        idle = "other" if name == "default" else "default"
        assert torch.equal(before[idle], after[idle])
    assert changes == {"default": [True, False] * 3, "other": [True, False, False] * 2}
    assert not torch.equal(*(steered.state.risk_linear for steered in selector.adapters.values()))


# Nothing to rank by -------------------------------------------------------------------------------------------------


def test_no_dropout_at_all_is_an_error_in_the_first_step() -> None:
    model = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    attach_rose(model, sampled())
    model(**batch(model)).loss.backward()
    with pytest.raises(RoseInactiveError, match=r"dropout=None and the model has no active dropout"):
        adamw(model).step()


def test_dropout_that_goes_out_later_is_an_error_in_that_step() -> None:
    model = tiny_bert()
    attach_rose(model, sampled(risk_interval=1))
    optimizer = adamw(model)
    step(model, optimizer, 0)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with pytest.raises(RoseInactiveError, match="no active dropout"):
        step(model, optimizer, 1)


class PerCall(nn.Module):
    """Noise that is drawn once for all rows of a call."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x)) * (1 + 0.1 * torch.rand(8))
        return x[:, :3]


def test_noise_of_a_whole_call_alone_is_an_error_in_the_first_step() -> None:
    """Two calls differ, and the halves of one do not: there is nothing to rank by."""
    model = PerCall()
    attach_rose(model, sampled(risk_fraction=0.5))
    model(torch.randn(8, 8)).square().sum().backward()
    with pytest.raises(RoseInactiveError, match="no active dropout"):
        adamw(model).step()


def test_passes_are_looked_at_closely_until_they_have_differed() -> None:
    """Also after resuming: a model that was made without dropout must not rank by what is rounded otherwise."""
    model = tiny_bert()
    attach_rose(model, sampled(risk_interval=1, risk_fraction=0.25))
    optimizer = adamw(model)
    for number in range(3):
        step(model, optimizer, number)
    again = tiny_bert()
    attach_rose(again, sampled(risk_interval=1, risk_fraction=0.25))
    resumed = adamw(again)
    resumed.load_state_dict(optimizer.state_dict())
    sizes: list[int] = []
    again.bert.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs.get("input_ids", args[0] if args else ()))),
        with_kwargs=True,
    )
    step(again, resumed, 3)
    step(again, resumed, 4)
    assert get_selector(again).statistics().steps == 5
    assert sizes == [8, 4, 2, 2, 8, 4]


class Beside(nn.Module):
    """Dropout in a branch that the logits do not come from."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8)) for _ in range(3))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return {"logits": x, "extra": self.dropout(x)}


@pytest.mark.parametrize("interval", [1, 8])
def test_dropout_that_the_logits_do_not_see_is_an_error_after_a_while(interval: int) -> None:
    """After as many steps, however few of them had a pass: no unit is ranked in any of them."""
    model = Beside()
    attach_rose(model, sampled(risk_interval=interval))
    optimizer = adamw(model)
    with pytest.raises(RoseInactiveError, match="both passes gave the same output"):
        for _ in range(watchdog.IDLE_STEPS + 3):
            model(torch.randn(8, 8))["extra"].square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert get_selector(model).statistics().steps >= watchdog.IDLE_STEPS


def test_a_model_in_eval_mode_is_an_error() -> None:
    model = tiny_bert().eval()
    attach_rose(model, sampled())
    model(**batch(model)).loss.backward()
    with pytest.raises(RoseInactiveError, match=r"eval mode.*model.train\(\)"):
        adamw(model).step()


class OnlyHead(Beside):
    """Dropout behind the units, running statistics within them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for layer in self.layers:
            x = torch.tanh(layer(self.norm(x)))
        return {"logits": self.head(self.dropout(x))}


def test_dropout_in_the_head_alone_warns_once_and_leaves_no_trace() -> None:
    """The look at the hidden states takes two more passes: running statistics and random states are as without."""
    model, plain = OnlyHead(), OnlyHead()
    plain.load_state_dict(model.state_dict())
    attach_rose(model, sampled(risk_interval=1))
    x = torch.randn(8, 8)
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="dropout in the head alone"):
        model(x)
    after = draws()
    torch.manual_seed(0)
    plain(x)
    assert draws() == after
    assert_same(dict(model.named_buffers()), dict(plain.named_buffers()))


# Inputs -------------------------------------------------------------------------------------------------------------


def whole_passes(model: nn.Module, inputs: dict[str, Any], *args: Any, units: int = 2) -> tuple[int, list[int]]:
    """One step; returns how many whole passes were counted and the batch sizes that the model saw."""
    selector = attach_rose(model, sampled(risk_fraction=0.25))
    sizes: list[int] = []
    first = next(module for module in model.modules() if isinstance(module, (nn.Embedding, nn.Linear, nn.Conv2d)))
    first.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    output = model(*args, **inputs)
    logits_of(output)[0].float().square().mean().backward()
    adamw(model).step()
    assert int((selector.state.risk_linear[0] > 0).sum()) >= units
    return selector.statistics().whole_risk_passes, sizes[:2]


def test_positional_inputs() -> None:
    inputs = batch(tiny_bert(), size=8)
    assert whole_passes(tiny_bert(), {"labels": inputs["labels"]}, inputs["input_ids"]) == (0, [8, 4])


def test_embeddings() -> None:
    model = tiny_bert()
    embeddings = model.get_input_embeddings()(batch(model, size=8)["input_ids"]).detach().requires_grad_()
    selector = attach_rose(model, sampled())
    output = model(inputs_embeds=embeddings)
    assert embeddings.grad is None
    output.logits.sum().backward()
    assert embeddings.grad is not None and (embeddings.grad != 0).any(dim=(1, 2)).all()
    adamw(model).step()
    assert selector.statistics().whole_risk_passes == 0 and (selector.state.risk_linear[1] > 0).all()


def test_embeddings_that_units_made_can_still_be_differentiated() -> None:
    """Their graph is the user's: the risk pass must not give it up."""
    model = get_peft_model(
        tiny_bert(),
        sampled(base_config=LoraConfig(r=2, target_modules=["word_embeddings", "query"]), upper_quantile=1.0),
    )
    hidden = model.get_input_embeddings()(batch(model, size=8)["input_ids"])
    model(inputs_embeds=torch.tanh(hidden)).logits.sum().backward()
    adamw(model).step()


def test_images() -> None:
    torch.manual_seed(0)
    assert whole_passes(vit().train(), pictures(3)(8, 0)) == (0, [8, 4])


def test_decoder_inputs() -> None:
    torch.manual_seed(0)
    inputs = {**text(8, 0), "decoder_input_ids": text(8, 1)["input_ids"][:, :5]}
    del inputs["labels"]
    assert whole_passes(t5().train(), inputs, units=8)[0] == 0


def test_positions_given_once_for_all_rows() -> None:
    torch.manual_seed(0)
    inputs = {**text(8, 0), "position_ids": torch.arange(8).view(1, 8)}
    # As many tokens as rows: logits that might be similarities of rows come from two calls.
    assert whole_passes(gpt2().train(), inputs) == (0, [8, 2])


def test_a_packed_batch_of_one_row_runs_whole_and_says_so() -> None:
    torch.manual_seed(0)
    inputs = {"input_ids": text(2, 0)["input_ids"].view(1, 16), "position_ids": torch.arange(8).repeat(2).view(1, 16)}
    assert whole_passes(llama().train(), inputs) == (1, [1, 1])


class Listing(nn.Module):
    """Takes pictures of several sizes as a list, and patches of all of them in one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(2))
        self.dropout = nn.Dropout(0.3)

    def forward(self, pictures: list[Tensor], patches: Tensor | None = None) -> Tensor:
        hidden = torch.stack([picture.mean(0) for picture in pictures])
        if patches is not None:
            hidden = hidden + patches.mean(0)
        for layer in self.layers:
            hidden = hidden + layer(self.dropout(hidden))
        return hidden


def test_lists_of_one_tensor_for_each_row() -> None:
    listing = [torch.randn(2 + row, 4) for row in range(8)]
    assert whole_passes(Listing(), {}, listing) == (0, [8, 4])


def test_multimodal_tensors_without_a_batch_dimension_run_whole_and_say_so() -> None:
    listing = [torch.randn(2 + row, 4) for row in range(8)]
    assert whole_passes(Listing(), {"patches": torch.randn(21, 4)}, listing) == (1, [8, 8])


def test_a_cache_is_neither_used_nor_advanced() -> None:
    torch.manual_seed(0)
    model = llama().train()
    attach_rose(model, sampled(risk_fraction=0.5))
    ids = text(4, 0)["input_ids"]
    cache = tf.DynamicCache()
    with torch.no_grad():
        model(ids[:, :5], past_key_values=cache, use_cache=True)
    lengths: list[tuple[int, int]] = []

    def look(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        given_cache = kwargs.get("past_key_values")
        known = 0 if given_cache is None else given_cache.get_seq_length()
        lengths.append((len(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]), known))

    model.model.layers[0].register_forward_pre_hook(look, with_kwargs=True)
    output = model(
        ids[:, 5:], past_key_values=cache, use_cache=True, attention_mask=torch.ones_like(ids), labels=ids[:, 5:]
    )
    assert cache.get_seq_length() == 8 and output.past_key_values is cache
    # After the user's pass over four rows all are over two: twice in the risk pass, and once in looks for dropout.
    assert lengths[:2] == [(4, 5), (4, 0)] and len(lengths) >= 4 and set(lengths[2:]) == {(2, 0)}
    output.loss.backward()
    adamw(model).step()


def test_with_a_cache_dropout_alone_makes_the_divergence() -> None:
    """Without any, both passes are equal to the last bit, though the user's own knew more tokens."""
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, num_key_value_heads=1)).train()
    attach_rose(model, sampled(risk_fraction=0.5))
    ids = text(4, 0)["input_ids"]
    cache = tf.DynamicCache()
    with torch.no_grad():
        model(ids[:, :5], past_key_values=cache, use_cache=True)
    model(ids[:, 5:], past_key_values=cache, use_cache=True, labels=ids[:, 5:]).loss.backward()
    with pytest.raises(RoseInactiveError, match="no active dropout"):
        adamw(model).step()


# Checkpointing and hooks --------------------------------------------------------------------------------------------


def masks_of(model: nn.Module, steps: int = 5) -> list[Tensor]:
    optimizer = adamw(model)
    selector = get_selector(model)
    found = []
    for number in range(steps):
        step(model, optimizer, number)
        found.append(selector.state.last_mask.clone())
    return [*found, selector.state.risk_linear.clone()]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpointing_changes_no_mask(reentrant: bool, lora: bool, strategy: str) -> None:
    found = []
    for checkpointing in (False, True):
        model = build(KINDS["bert"], lora, True, strategy=strategy, upper_quantile=0.5)
        if checkpointing:
            model.enable_input_require_grads()  # without it reentrant checkpoints see no gradient, ROSE or not
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        found.append(masks_of(model))
        assert not checkpointing or model.get_base_model().is_gradient_checkpointing
    assert_same(found[1], found[0])
    assert any((mask == 0).any() for mask in found[0])


class Checkpointed(nn.Module):
    """Checkpoints some of its layers itself."""

    def __init__(self, reentrant: bool, hidden: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8)) for _ in range(4))
        self.dropout = nn.Dropout(0.2)
        self.reentrant, self.hidden = reentrant, hidden

    def part(self, layer: nn.Module, x: Tensor) -> Tensor:
        return x + torch.tanh(layer(self.dropout(x)))

    def forward(self, x: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers):
            if number >= len(self.layers) - self.hidden:
                x = checkpoint(self.part, layer, x, use_reentrant=self.reentrant)
            else:
                x = self.part(layer, x)
        return x


@pytest.mark.parametrize("hidden", [1, 3, 4])
def test_a_models_own_reentrant_checkpoints_are_refused_with_the_way_out(hidden: int) -> None:
    """The gradient of the divergence cannot go through them, whether some units are outside or none."""

    def take_step(reentrant: bool) -> None:
        model = Checkpointed(reentrant, hidden)
        attach_rose(model, sampled())
        model(torch.randn(8, 8, requires_grad=True)).square().sum().backward()
        adamw(model).step()

    take_step(reentrant=False)
    with pytest.raises((UnsupportedEngineError, RoseInactiveError), match="use_reentrant"):
        take_step(reentrant=True)


def test_the_users_hooks_on_parameters_are_not_called() -> None:
    model = tiny_bert()
    attach_rose(model, sampled(risk_interval=1))
    called: list[str] = []
    for name, param in model.named_parameters():
        param.register_hook(lambda grad, name=name: called.append(name))
        param.register_post_accumulate_grad_hook(lambda param, name=name: called.append(name))
    output = model(**batch(model))
    assert not called
    output.loss.backward()
    assert all(called.count(name) == 2 for name, _ in model.named_parameters())


def test_losses_of_the_users_own_lose_nothing() -> None:
    """A loss made from the logits, such as label smoothing, is to the last bit that of plain training."""

    def train(rose: bool) -> dict[str, Tensor]:
        model = tiny_bert(num_labels=2)
        if rose:
            attach_rose(model, sampled(risk_interval=1, **NOTHING_FROZEN))
        optimizer = adamw(model)
        torch.manual_seed(0)
        for number in range(3):
            inputs = batch(model, seed=number)
            labels = inputs.pop("labels")
            F.cross_entropy(model(**inputs).logits, labels, label_smoothing=0.1).backward()
            optimizer.step()
            optimizer.zero_grad()
        return dict(model.named_parameters())

    assert_same(train(rose=True), train(rose=False))


# Going on from a checkpoint -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [4, 5], ids=["with a pass", "between passes"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_resumed_equals_uninterrupted(strategy: str, at: int) -> None:
    """With nothing but what everybody saves: weights, optimizer and torch's random state; no call of ROSE's."""

    def made() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = get_peft_model(tiny_bert(num_labels=2), sampled(strategy, task_type="SEQ_CLS"))
        return model, adamw(model)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, numbers: range) -> None:
        for number in numbers:
            model(**batch(model, size=8, seed=number)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    model, optimizer = made()
    train(model, optimizer, range(at))
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict(), torch.get_rng_state()])
    train(model, optimizer, range(at, 10))
    torch.manual_seed(99)
    again, resumed = made()
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    torch.set_rng_state(saved[2])
    train(again, resumed, range(at, 10))
    assert_same(everything(again, get_selector(again), resumed), everything(model, get_selector(model), optimizer))
    assert int(get_selector(again).state.steps) == 10


@pytest.mark.parametrize("interval", [1, 2, 8])
def test_the_scale_of_the_divergence_grows_at_any_interval(interval: int) -> None:
    """Once in 200 steps, at the last pass before they are full; overflows would halve it for good otherwise."""
    model = tiny_bert(num_hidden_layers=1)
    selector = attach_rose(model, ROSEConfig(strategy="first_order", risk_pass="sampled", risk_interval=interval))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for steps, grown in ((200 - 2 * interval, 1), (200 - interval, 2), (200, 1)):
        selector.state.values["steps"].fill_(steps)
        selector.state.values["risk_scale"].fill_(2.0**6)
        model(**batch(model)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert float(selector.state.risk_scale) == grown * 2.0**6


# Rows that are none, or that are not enough -------------------------------------------------------------------------


class Normalised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2)) for _ in range(3)
        )
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, labels: Tensor, weights: Tensor | None = None) -> dict[str, Tensor]:
        for layer in self.layers:
            x = layer(x)
        logits = self.head(x)
        return {"loss": F.cross_entropy(logits, labels, weights), "logits": logits}


def test_batch_norm_gets_two_rows_of_a_short_batch() -> None:
    model = Normalised().train()
    selector = attach_rose(model, sampled())
    optimizer = torch.optim.AdamW(model.parameters())
    model(x=torch.randn(4, 8), labels=torch.randint(0, 3, (4,)))["loss"].backward()
    optimizer.step()
    assert selector.statistics().whole_risk_passes == 0 and int(selector.state.steps) == 1


def test_a_model_that_does_not_take_some_rows_gets_all_of_them() -> None:
    """Class weights are no rows; with as many rows as classes they look like some."""
    model = Normalised().train()
    selector = attach_rose(model, sampled(risk_interval=1, risk_fraction=0.5))
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.warns(UserWarning, match="does not take some rows of its batch"):
        for rows in (8, 3, 8):
            model(torch.randn(rows, 8), torch.randint(0, 3, (rows,)), torch.ones(3))["loss"].backward()
            optimizer.step()
    assert selector.statistics().whole_risk_passes == 3 == int(selector.state.steps)


def test_the_whole_batch_in_the_place_of_some_rows_advances_no_cache() -> None:
    torch.manual_seed(0)
    sizes = {**SIZES, "num_key_value_heads": 1, "attention_dropout": 0.1}

    class Weighted(tf.LlamaForCausalLM):
        def forward(self, *args: Any, weights: Tensor, **kwargs: Any) -> Any:
            if len(weights) != 4:
                raise KeyError("weights must be of 4 classes")
            return super().forward(*args, **kwargs)

    model = Weighted(tf.LlamaConfig(**sizes)).train()
    selector = attach_rose(model, sampled())
    cache = tf.DynamicCache()
    inputs = {"input_ids": torch.ones(4, 5, dtype=torch.long), "weights": torch.ones(4)}
    with pytest.warns(UserWarning, match="KeyError"):
        output = model(**inputs, past_key_values=cache)
    assert cache.get_seq_length() == 5
    output.logits.square().mean().backward()
    torch.optim.AdamW(model.parameters()).step()
    assert selector.statistics().whole_risk_passes == 1


def test_adapters_that_know_the_place_of_each_row_get_the_whole_batch() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
    lora = LoraConfig(r=4, target_modules=["c_attn"], alora_invocation_tokens=[7, 8])
    model = get_peft_model(
        tf.GPT2LMHeadModel(tf.GPT2Config(**sizes)),
        ROSEConfig(task_type="CAUSAL_LM", strategy="first_order", risk_pass="sampled", base_config=lora),
    ).train()
    ids = torch.full((4, 8), 9)
    for row in range(4):
        ids[row, row], ids[row, row + 1] = 7, 8
    optimizer = torch.optim.AdamW([param for param in model.parameters() if param.requires_grad])
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert get_selector(model).statistics().whole_risk_passes == 1


def test_weights_that_the_user_caches_keep_their_graph() -> None:
    model = Normalised().train()
    for layer in model.layers:
        nn.utils.parametrizations.orthogonal(layer[0])
    attach_rose(model, sampled())
    with nn.utils.parametrize.cached():
        loss = model(x=torch.randn(8, 8), labels=torch.randint(0, 3, (8,)))["loss"]
    loss.backward()
    assert all(param.grad is not None for param in model.head.parameters())
