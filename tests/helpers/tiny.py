"""Tiny, random models and batches for the tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 20,
    # Large weights, so that dropout changes the outputs of so small a model visibly.
    "initializer_range": 0.2,
    "attn_implementation": "eager",
}


def tiny_bert(seed: int = 0, **overrides: Any) -> nn.Module:
    """A BERT classifier in training mode; `overrides` go to its config."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    return BertForSequenceClassification(BertConfig(**{**SIZES, **overrides})).train()


def tiny_roberta(seed: int = 0, **overrides: Any) -> nn.Module:
    """A RoBERTa classifier in training mode; `overrides` go to its config."""
    from transformers import RobertaConfig, RobertaForSequenceClassification

    torch.manual_seed(seed)
    return RobertaForSequenceClassification(RobertaConfig(**{**SIZES, **overrides})).train()


def batch(model: nn.Module, size: int = 4, length: int = 8, seed: int = 0) -> dict[str, Tensor]:
    """Random inputs with labels for a classifier; leaves the global generator alone."""
    config: Any = model.config
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, config.vocab_size, (size, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, length // 2 :] = 0
    labels = torch.randint(0, config.num_labels, (size,), generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def rows(count: int = 32) -> list[dict[str, Any]]:
    """A dataset for the Trainer: random tokens with two labels."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 30, (count, 8), generator=generator)
    labels = torch.randint(0, 2, (count,), generator=generator)
    return [{"input_ids": row, "labels": int(label)} for row, label in zip(ids, labels, strict=True)]
