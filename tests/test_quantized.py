"""Bases of 4 and 8 bits with LoRA, and optimizers of 8 bits, through bitsandbytes on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from rose_peft import ROSEConfig, RoseError, UnsupportedOptimizerError, attach_rose, get_selector
from rose_peft.engines.seam import Part
from rose_peft.optimizers import momentum_of, momentum_rule
from tests.helpers.tiny import batch, tiny_bert

bnb = pytest.importorskip("bitsandbytes", reason="pip install 'rose-peft[quantized]'")

STEPS = 6
BASES: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    "nf4 double bf16": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
    },
    "int8": {"load_in_8bit": True},
}
EIGHT: dict[str, Any] = {"min_8bit_size": 1}  # small parameters too
OPTIMIZERS: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "AdamW8bit": lambda params: bnb.optim.AdamW8bit(params, lr=1e-2, **EIGHT),
    "AdamW8bit, part of it": lambda params: bnb.optim.AdamW8bit(params, lr=1e-2, min_8bit_size=300),
    "PagedAdamW8bit": lambda params: bnb.optim.PagedAdamW8bit(params, lr=1e-2, **EIGHT),
    "PagedAdamW32bit": lambda params: bnb.optim.PagedAdamW32bit(params, lr=1e-2),
    "Lion8bit": lambda params: bnb.optim.Lion8bit(params, lr=1e-3, **EIGHT),
    "SGD8bit": lambda params: bnb.optim.SGD8bit(params, lr=1e-2, momentum=0.9, **EIGHT),
}
UNREAD: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "AdEMAMix8bit": lambda params: bnb.optim.AdEMAMix8bit(params, lr=1e-3, **EIGHT),
    "RMSprop8bit": lambda params: bnb.optim.RMSprop8bit(params, lr=1e-3, **EIGHT),
}


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(LlamaConfig(vocab_size=64, attention_dropout=0.1, **sizes)).save_pretrained(folder)
    return folder


def load(full: Path, base: str, checkpointing: bool = False) -> nn.Module:
    quantized = BitsAndBytesConfig(**BASES[base])
    model = LlamaForCausalLM.from_pretrained(full, quantization_config=quantized, device_map={"": "cpu"})
    options = {"gradient_checkpointing_kwargs": {"use_reentrant": False}} if checkpointing else {}
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing, **options)


def wrap(model: nn.Module, **settings: Any) -> nn.Module:
    torch.manual_seed(1)
    lora = LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj", "v_proj", "down_proj"])
    return get_peft_model(model, ROSEConfig(task_type="CAUSAL_LM", base_config=lora, **settings)).train()


def inputs() -> dict[str, Tensor]:
    ids = torch.randint(1, 64, (4, 12), generator=torch.Generator().manual_seed(2))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def raw(optimizer: torch.optim.Optimizer, params: list[Tensor]) -> list[Tensor]:
    """What makes up the momenta, as it lies there."""
    keys = ("state1", "absmax1", "exp_avg")
    return [optimizer.state[param][key].clone() for param in params for key in keys if key in optimizer.state[param]]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, rows: dict[str, Tensor]) -> list[float]:
    """Train; frozen units, and they alone, stay the same to the last bit, with their momenta."""
    selector, losses, frozen = get_selector(model), [], 0
    for step in range(STEPS):
        units = [unit.parameters() for unit in selector.units]
        before = [[*(param.detach().clone() for param in unit)] for unit in units]
        momenta = [raw(optimizer, unit) for unit in units]
        loss = model(**rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
        for share, unit, old, momentum in zip(selector.state.last_mask.tolist(), units, before, momenta, strict=True):
            same = all(map(torch.equal, old, unit))
            assert same == (share == 0), (step, share)
            if share == 0 and momentum:
                frozen += 1
                assert all(map(torch.equal, momentum, raw(optimizer, unit))), step
    assert selector.statistics().steps == STEPS and frozen
    return losses


@pytest.mark.parametrize("risk_pass", ["paired", "sampled"])
@pytest.mark.parametrize("base", BASES)
def test_a_quantized_base_trains(full: Path, base: str, risk_pass: str) -> None:
    often = {"risk_interval": 1} if risk_pass == "sampled" else {}
    model = wrap(load(full, base), risk_pass=risk_pass, **often)
    optimizer = torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], lr=1e-2)
    losses = train(model, optimizer, inputs())
    assert losses[-1] < losses[0]
    assert 0 < get_selector(model).statistics().kept_share < 1


@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_gradient_checkpointing_changes_nothing(full: Path, base: str) -> None:
    ends = []
    for checkpointing in (False, True):
        model = wrap(load(full, base, checkpointing), strategy="first_order")
        optimizer = torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], lr=1e-2)
        train(model, optimizer, inputs())
        ends.append((get_selector(model).state.mask_history()[0], [p for p in model.parameters() if p.requires_grad]))
    assert torch.equal(ends[0][0], ends[1][0])
    for one, two in zip(ends[0][1], ends[1][1], strict=True):
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-3)


def test_an_adapter_loads_over_the_quantized_and_over_the_full_base(full: Path, tmp_path: Path) -> None:
    model = wrap(load(full, "nf4"))
    train(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2), inputs())
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model.eval()(**inputs()).logits
        again = PeftModel.from_pretrained(load(full, "nf4"), tmp_path).eval()
        assert torch.equal(again(**inputs()).logits, expected)
        whole = LlamaForCausalLM.from_pretrained(full)
        plain = whole.eval()(**inputs()).logits
        over_full = PeftModel.from_pretrained(whole, tmp_path).eval()(**inputs()).logits
    # What the adapter has learnt is much more than what the quantization takes away.
    assert (over_full - expected).norm() < 0.5 * (plain - expected).norm()


def test_full_fine_tuning_of_a_quantized_base_is_refused(full: Path) -> None:
    with pytest.raises(RoseError, match="quantized"):
        get_peft_model(load(full, "nf4"), ROSEConfig(task_type="CAUSAL_LM"))


@pytest.mark.parametrize("strategy", ["first_order", "second_order", "ensemble"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_of_8_bits(name: str, strategy: str) -> None:
    model = tiny_bert()
    attach_rose(model, ROSEConfig(task_type="SEQ_CLS", strategy=strategy))
    train(model, OPTIMIZERS[name](list(model.parameters())), batch(model))


@pytest.mark.parametrize("name", UNREAD)
def test_a_momentum_that_cannot_be_read_is_for_first_order_only(name: str) -> None:
    model = tiny_bert()
    attach_rose(model, ROSEConfig(task_type="SEQ_CLS", strategy="first_order"))
    train(model, UNREAD[name](list(model.parameters())), batch(model))
    model = tiny_bert()
    attach_rose(model, ROSEConfig(task_type="SEQ_CLS", strategy="second_order"))
    with pytest.raises(UnsupportedOptimizerError, match="strategy='first_order'"):
        train(model, UNREAD[name](list(model.parameters())), batch(model))


def test_the_momentum_read_is_that_of_an_optimizer_of_32_bits() -> None:
    """Also the factor with which a gradient enters it: the second step tells."""
    found = []
    for cls in (bnb.optim.AdamW8bit, torch.optim.AdamW):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(32, 16))
        optimizer = cls([weight], lr=1e-3, **(EIGHT if cls is bnb.optim.AdamW8bit else {}))
        gradients = torch.randn(2, 32, 16)
        for gradient in gradients:
            weight.grad = gradient.clone()
            optimizer.step()
        rule = momentum_rule(optimizer, optimizer.param_groups[0])
        found.append(momentum_of(optimizer, Part(weight), rule))
        assert rule.fresh == pytest.approx(0.1)
        torch.testing.assert_close(found[-1], 0.09 * gradients[0] + 0.1 * gradients[1], atol=0.02, rtol=0.05)
    assert (found[0] - found[1]).norm() < 0.03 * found[1].norm()
