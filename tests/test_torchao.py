"""LoRA with ROSE over bases that torchao has quantized to 8 bits, on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, TorchAoConfig

from rose_peft import ROSEConfig, UnsupportedModelError, attach_rose, get_selector
from tests.helpers.training import train_watched

quantization = pytest.importorskip("torchao.quantization", reason="pip install torchao")
WAYS = ("Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig")


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(LlamaConfig(vocab_size=64, attention_dropout=0.1, **sizes)).save_pretrained(folder)
    return folder


def load(full: Path, way: str = WAYS[0]) -> nn.Module:
    quantized = TorchAoConfig(getattr(quantization, way)())
    model = LlamaForCausalLM.from_pretrained(full, quantization_config=quantized, device_map={"": "cpu"})
    assert "torchao" in type(model.model.layers[0].mlp.down_proj.weight.data).__module__
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def wrap(model: nn.Module, **settings: Any) -> nn.Module:
    lora = LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj", "v_proj", "down_proj"])
    try:
        return get_peft_model(model, ROSEConfig(task_type="CAUSAL_LM", base_config=lora, **settings)).train()
    except ImportError as error:  # PEFT looks for a name that newer versions of torchao have no more
        pytest.skip(f"this PEFT does not go with this torchao: {error}")


def inputs() -> dict[str, Tensor]:
    ids = torch.randint(1, 64, (4, 12), generator=torch.Generator().manual_seed(2))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


@pytest.mark.parametrize("settings", [{}, {"risk_pass": "sampled", "risk_interval": 1}], ids=["paired", "sampled"])
@pytest.mark.parametrize("way", WAYS)
def test_a_quantized_base_trains(full: Path, way: str, settings: dict[str, Any]) -> None:
    model = wrap(load(full, way), **settings)
    masks = train_watched(model, inputs(), steps=4)
    assert any((mask < 1).any() for mask in masks)
    assert get_selector(model).statistics().skipped_risk_passes == 0


def test_an_adapter_loads_over_the_quantized_and_over_the_full_base(full: Path, tmp_path: Path) -> None:
    model = wrap(load(full))
    train_watched(model, inputs())
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model.eval()(**inputs()).logits
        again = PeftModel.from_pretrained(load(full), tmp_path).eval()
        assert torch.equal(again(**inputs()).logits, expected)
        whole = LlamaForCausalLM.from_pretrained(full)
        plain = whole.eval()(**inputs()).logits
        over_full = PeftModel.from_pretrained(whole, tmp_path).eval()(**inputs()).logits
    assert (over_full - expected).norm() < 0.5 * (plain - expected).norm()


def test_full_fine_tuning_is_refused(full: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="quantized"):
        get_peft_model(load(full), ROSEConfig(task_type="CAUSAL_LM"))
    with pytest.raises(UnsupportedModelError, match="quantized"):
        attach_rose(load(full), ROSEConfig(task_type="CAUSAL_LM"))
