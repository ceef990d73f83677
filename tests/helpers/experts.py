"""Tiny mixtures of experts, and batches whose tokens go to a few experts only."""

from __future__ import annotations

import torch
from torch import Tensor, nn

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts_per_tok": 2,
    "initializer_range": 0.2,
    "attention_dropout": 0.2,
    "use_cache": False,
    "pad_token_id": 0,
    "attn_implementation": "eager",
}


def tiny_mixture(kind: str = "mixtral", experts: int = 8, seed: int = 0) -> nn.Module:
    """A causal language model in training mode; each token goes to two experts of each layer.

    Args:
        kind: "mixtral", whose experts without tokens have no gradient, or "olmoe", where they have one of zeros;
            from transformers 5 on both keep all experts of a layer in one tensor.
        experts: Per layer.
        seed: Of the weights.
    """
    import transformers as tf

    torch.manual_seed(seed)
    if kind == "mixtral":
        return tf.MixtralForCausalLM(tf.MixtralConfig(**SIZES, num_local_experts=experts)).train()
    return tf.OlmoeForCausalLM(tf.OlmoeConfig(**SIZES, num_experts=experts)).train()


def few_kinds(kinds: int, seed: int, rows: int = 4, length: int = 6) -> dict[str, Tensor]:
    """Rows whose tokens are of a few kinds, so that they go to few experts; leaves the global generator alone.

    Args:
        kinds: How many.
        seed: Which.
        rows: How many rows.
        length: Tokens of each.
    """
    generator = torch.Generator().manual_seed(seed)
    vocabulary = 3 + torch.randperm(29, generator=generator)[:kinds]
    ids = vocabulary[torch.randint(0, kinds, (rows, length), generator=generator)]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
