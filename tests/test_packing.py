"""Packed batches: several examples one after the other in a single row, told apart by their positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DataCollatorWithFlattening, LlamaConfig, LlamaForCausalLM

from rose_peft import ROSEConfig, attach_rose
from rose_peft.divergence import logits_divergence

LENGTHS = (5, 7, 4, 6)
WAYS: dict[str, dict[str, Any]] = {
    "paired": {},
    "sampled": {"risk_pass": "sampled", "risk_interval": 2, "risk_fraction": 0.5},
    "sampled, all rows": {"risk_pass": "sampled", "risk_interval": 2, "risk_fraction": 1.0},
}


def llama(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=40, initializer_range=0.2, use_cache=False, attn_implementation="eager", **sizes)
    return LlamaForCausalLM(config).train()


def batches(seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The same examples as one packed row and as padded rows."""
    generator = torch.Generator().manual_seed(seed)
    examples = [torch.randint(1, 40, (length,), generator=generator).tolist() for length in LENGTHS]
    packed = DataCollatorWithFlattening(return_tensors="pt")([{"input_ids": example} for example in examples])
    width = max(LENGTHS)
    ids = torch.tensor([example + [0] * (width - len(example)) for example in examples])
    mask = torch.tensor([[1] * length + [0] * (width - length) for length in LENGTHS])
    return packed, {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def test_what_is_packed_diverges_as_what_is_padded() -> None:
    """No example sees another, and no last token is compared by what it says of the next example."""
    models = [llama(seed).eval() for seed in (1, 2)]
    found = []
    for inputs in batches(0):
        with torch.no_grad():
            logits = [model(**inputs).logits for model in models]
        found.append(logits_divergence([logits[0]], [logits[1]], inputs, causal=True)[0])
        without = {name: value for name, value in inputs.items() if name != "labels"}
        assert not torch.isclose(found[-1], logits_divergence([logits[0]], [logits[1]], without, causal=True)[0])
    torch.testing.assert_close(*found)


def noisy(model: nn.Module) -> nn.Module:
    """Noise in the place of dropout that depends on the token and on the number of the call, not on where it lies."""
    calls = 0

    def add(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        places = torch.arange(output.shape[-1]) + 1.0
        return output + 0.05 * torch.sin(args[0][..., None] * places + 7.0 * calls)

    model.get_input_embeddings().register_forward_hook(add)
    return model


@pytest.mark.parametrize("way", WAYS)
def test_packed_training_is_padded_training(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks, scores and weights; a packed row cannot be taken apart, so the small pass takes all of it and says so."""
    monkeypatch.setattr("rose_peft.sampled._rows_are_apart", lambda *_: False)  # the noise is another in each call
    ends = []
    for kind in (0, 1):
        settings = WAYS["sampled, all rows"] if way == "sampled" and kind == 1 else WAYS[way]
        model = noisy(llama())
        selector = attach_rose(model, ROSEConfig(task_type="CAUSAL_LM", upper_quantile=0.6, **settings))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
        masks = []
        for step in range(4):
            model(**batches(step)[kind]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            masks.append(selector.state.last_mask.clone())
        assert selector.statistics().whole_risk_passes == (2 if way == "sampled" and kind == 0 else 0)
        ends.append((torch.stack(masks), selector.state.first_scores, list(model.parameters())))
    assert torch.equal(ends[0][0], ends[1][0]) and (ends[0][0] == 0).any()
    torch.testing.assert_close(ends[0][1], ends[1][1], rtol=1e-3, atol=0)
    torch.testing.assert_close(ends[0][2], ends[1][2], rtol=1e-3, atol=1e-5)
